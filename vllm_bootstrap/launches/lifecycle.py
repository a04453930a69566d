"""The life of a launch as data: states, events, one table, one ``advance``. PURE.

Invariant: no other file decides a state. A launch owns its GPUs exactly while its state is neither terminal nor
``asleep``, and is routable only in ``ready``. An absent (state, event) pair is a programming error and raises.

Sleep: ``asleep`` is entered only once the GPUs' memory is seen free and the claims are parked, ``ready`` from there
only once the claims are taken again and the engine has answered. While it falls asleep or wakes it keeps its GPUs and
gets no requests. A launch that ends from ``asleep`` owns no GPU while it is stopping: its claims stay parked.

``released`` means that the process tree is seen dead **and** the GPUs have settled or were given up as unsettled.
What it leads to depends on why the launch was stopping and on whether the restart policy grants another attempt, so
the two deciding facts travel inside the state value (``why``) and the event (``restart``).

Every event carries the attempt it speaks about; ``is_stale`` tells whether it is to be dropped before ``advance``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """States as the API shows them."""

    BOOTSTRAPPING = "bootstrapping"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    FALLING_ASLEEP = "falling_asleep"
    ASLEEP = "asleep"
    WAKING = "waking"


class Why(StrEnum):
    """Why a launch is stopping. Only the operator's wish ends in ``stopped``."""

    OPERATOR = "operator"
    BOOT_TIMEOUT = "boot_timeout"
    UNHEALTHY = "unhealthy"
    WAKE_FAILED = "wake_failed"
    DIED = "died"


class Event(StrEnum):
    BECAME_READY = "became_ready"
    STOP_REQUESTED = "stop_requested"
    BOOT_TIMED_OUT = "boot_timed_out"
    PROBES_FAILED = "probes_failed"
    SLEEP_BEGUN = "sleep_begun"
    FELL_ASLEEP = "fell_asleep"
    STAYED_AWAKE = "stayed_awake"
    WAKE_BEGUN = "wake_begun"
    WOKE = "woke"
    STAYED_ASLEEP = "stayed_asleep"
    WAKE_FAILED = "wake_failed"
    MAIN_EXITED = "main_exited"
    SHIM_LOST = "shim_lost"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class Phase:
    """A state with its fact: ``why`` exists only while stopping."""

    state: State
    why: Why | None = None

    def __post_init__(self) -> None:
        if (self.why is not None) != (self.state is State.STOPPING):
            raise ValueError(f"{self.state} with why={self.why}")


BOOTSTRAPPING = Phase(State.BOOTSTRAPPING)
READY = Phase(State.READY)
FALLING_ASLEEP = Phase(State.FALLING_ASLEEP)
ASLEEP = Phase(State.ASLEEP)
WAKING = Phase(State.WAKING)
STOPPED = Phase(State.STOPPED)
FAILED = Phase(State.FAILED)
STOPPING: Mapping[Why, Phase] = {why: Phase(State.STOPPING, why) for why in Why}

_DEATHS = {Event.MAIN_EXITED: STOPPING[Why.DIED], Event.SHIM_LOST: STOPPING[Why.DIED]}


def _stays(phase: Phase) -> dict[Event, Phase]:
    return dict.fromkeys(Event, phase)


def _stopping(why: Why) -> dict[Event, Phase]:
    # RELEASED is the one event that leaves; the operator's wish overrides any earlier reason.
    row = _stays(STOPPING[why])
    row[Event.STOP_REQUESTED] = STOPPING[Why.OPERATOR]
    row[Event.RELEASED] = STOPPED if why is Why.OPERATOR else FAILED
    return row


TRANSITIONS: Mapping[Phase, Mapping[Event, Phase]] = {
    BOOTSTRAPPING: {
        Event.BECAME_READY: READY,
        Event.STOP_REQUESTED: STOPPING[Why.OPERATOR],
        Event.BOOT_TIMED_OUT: STOPPING[Why.BOOT_TIMEOUT],
        **_DEATHS,
    },
    READY: {
        Event.STOP_REQUESTED: STOPPING[Why.OPERATOR],
        Event.PROBES_FAILED: STOPPING[Why.UNHEALTHY],
        Event.SLEEP_BEGUN: FALLING_ASLEEP,
        **_DEATHS,
    },
    FALLING_ASLEEP: {
        Event.FELL_ASLEEP: ASLEEP,
        Event.STAYED_AWAKE: READY,
        Event.STOP_REQUESTED: STOPPING[Why.OPERATOR],
        # A probe that was under way when the sleep began may still report, and one that follows a failed sleep.
        Event.PROBES_FAILED: STOPPING[Why.UNHEALTHY],
        Event.WAKE_FAILED: STOPPING[Why.WAKE_FAILED],
        **_DEATHS,
    },
    ASLEEP: {
        Event.WAKE_BEGUN: WAKING,
        Event.STOP_REQUESTED: STOPPING[Why.OPERATOR],
        **_DEATHS,
    },
    WAKING: {
        Event.WOKE: READY,
        Event.STAYED_ASLEEP: ASLEEP,
        Event.STOP_REQUESTED: STOPPING[Why.OPERATOR],
        Event.WAKE_FAILED: STOPPING[Why.WAKE_FAILED],
        **_DEATHS,
    },
    **{STOPPING[why]: _stopping(why) for why in Why},
    STOPPED: _stays(STOPPED),
    FAILED: _stays(FAILED),
}

TERMINAL = frozenset({State.STOPPED, State.FAILED})


class IllegalTransition(Exception):
    """A (state, event) pair that the table does not have: a bug in the caller, never user input."""


def advance(phase: Phase, event: Event, *, restart: bool = False) -> Phase:
    """The next phase. ``restart`` is the restart policy's answer and matters only for ``released``."""
    try:
        following = TRANSITIONS[phase][event]
    except KeyError:
        raise IllegalTransition(f"{phase.state} ({phase.why}) has no transition for {event}") from None
    if event is Event.RELEASED and restart and following is FAILED and phase.state is State.STOPPING:
        return BOOTSTRAPPING
    return following


def is_stale(event_attempt: int, current_attempt: int) -> bool:
    """Whether an event speaks of an attempt that is over."""
    return event_attempt != current_attempt


def owns_gpus(phase: Phase) -> bool:
    """Whether the claims of a launch hold. One that stops from ``asleep`` has parked claims until it has ended."""
    return phase.state not in TERMINAL and phase.state is not State.ASLEEP


def is_routable(phase: Phase, *, unresponsive: bool) -> bool:
    """Whether new requests may be sent to the launch."""
    return phase.state is State.READY and not unresponsive


def diagram() -> str:
    """The table as a Mermaid state diagram, for the docs (a test fails when they are stale)."""
    lines = ["stateDiagram-v2", "    [*] --> bootstrapping"]
    for phase, row in TRANSITIONS.items():
        grouped: dict[Phase, list[str]] = {}
        for event, following in row.items():
            if following != phase:
                grouped.setdefault(following, []).append(event.value)
        for following, events in grouped.items():
            lines.append(f"    {_name(phase)} --> {_name(following)}: {', '.join(events)}")
        if phase.state is State.STOPPING and phase.why is not Why.OPERATOR:
            lines.append(f"    {_name(phase)} --> bootstrapping: released, restart granted")
    lines += ["    stopped --> [*]", "    failed --> [*]"]
    return "\n".join(lines)


def _name(phase: Phase) -> str:
    return f"{phase.state.value}_{phase.why.value}" if phase.why else phase.state.value
