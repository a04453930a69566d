"""The life of a batch as data: the eight states of OpenAI's Batch API, events, one table, one ``advance``. PURE.

Invariant: no other file decides a state. A state that is not terminal has one task that owns the batch; a batch whose
input was accepted ends in a state with files in which every line has exactly one record. An absent (state, event) pair
is a programming error and raises.

``finalizing`` carries why: all lines are finished (``COMPLETED``) or its time is over (``EXPIRED``). Lines that fail do
not fail a batch: ``failed`` means that nothing could be begun (the input was refused) or that its storage is lost.
Being paused is no state but a wish beside it, as is waiting for a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """As the API shows them."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class Why(StrEnum):
    """What a batch that is finalizing becomes."""

    COMPLETED = "completed"
    EXPIRED = "expired"


class Event(StrEnum):
    """``INPUT_ACCEPTED``, ``INPUT_REFUSED``: every line was judged. ``LINES_FINISHED``: all have a record on disk.
    ``WINDOW_CLOSED``: the completion window is over. ``FILES_WRITTEN``: output and error file are on disk.
    ``RETRY_REQUESTED``: failed lines are to be run again. ``STORAGE_LOST``: what was stored of it cannot be read."""

    INPUT_ACCEPTED = "input_accepted"
    INPUT_REFUSED = "input_refused"
    LINES_FINISHED = "lines_finished"
    WINDOW_CLOSED = "window_closed"
    CANCEL_REQUESTED = "cancel_requested"
    FILES_WRITTEN = "files_written"
    RETRY_REQUESTED = "retry_requested"
    STORAGE_LOST = "storage_lost"


@dataclass(frozen=True, slots=True)
class Phase:
    """A state with its fact: ``why`` exists only while finalizing."""

    state: State
    why: Why | None = None

    def __post_init__(self) -> None:
        if (self.why is not None) != (self.state is State.FINALIZING):
            raise ValueError(f"{self.state} with why={self.why}")


VALIDATING = Phase(State.VALIDATING)
FAILED = Phase(State.FAILED)
IN_PROGRESS = Phase(State.IN_PROGRESS)
FINALIZING: Mapping[Why, Phase] = {why: Phase(State.FINALIZING, why) for why in Why}
COMPLETED = Phase(State.COMPLETED)
EXPIRED = Phase(State.EXPIRED)
CANCELLING = Phase(State.CANCELLING)
CANCELLED = Phase(State.CANCELLED)

TERMINAL = frozenset({State.FAILED, State.COMPLETED, State.EXPIRED, State.CANCELLED})
RETRYABLE = frozenset({State.COMPLETED, State.EXPIRED, State.CANCELLED})


def _ended(phase: Phase) -> dict[Event, Phase]:
    # Whoever cancels, or looks at the clock, a moment too late changes nothing.
    row = {Event.CANCEL_REQUESTED: phase, Event.WINDOW_CLOSED: phase}
    return {**row, Event.RETRY_REQUESTED: IN_PROGRESS} if phase.state in RETRYABLE else row


TRANSITIONS: Mapping[Phase, Mapping[Event, Phase]] = {
    VALIDATING: {
        Event.INPUT_ACCEPTED: IN_PROGRESS,
        Event.INPUT_REFUSED: FAILED,
        Event.CANCEL_REQUESTED: CANCELLING,
        Event.WINDOW_CLOSED: VALIDATING,  # first it must be known which lines have expired
        Event.STORAGE_LOST: FAILED,
    },
    IN_PROGRESS: {
        Event.LINES_FINISHED: FINALIZING[Why.COMPLETED],
        Event.WINDOW_CLOSED: FINALIZING[Why.EXPIRED],
        Event.CANCEL_REQUESTED: CANCELLING,
        Event.STORAGE_LOST: FAILED,
    },
    FINALIZING[Why.COMPLETED]: {
        Event.FILES_WRITTEN: COMPLETED,
        Event.CANCEL_REQUESTED: FINALIZING[Why.COMPLETED],
        Event.WINDOW_CLOSED: FINALIZING[Why.COMPLETED],
        Event.STORAGE_LOST: FAILED,
    },
    FINALIZING[Why.EXPIRED]: {
        Event.FILES_WRITTEN: EXPIRED,
        Event.CANCEL_REQUESTED: FINALIZING[Why.EXPIRED],
        Event.WINDOW_CLOSED: FINALIZING[Why.EXPIRED],
        Event.STORAGE_LOST: FAILED,
    },
    CANCELLING: {
        Event.FILES_WRITTEN: CANCELLED,
        # Cancelled before every line was judged: there is nothing to write, or the judging is over just now.
        Event.INPUT_ACCEPTED: CANCELLING,
        Event.INPUT_REFUSED: CANCELLING,
        Event.CANCEL_REQUESTED: CANCELLING,
        Event.LINES_FINISHED: CANCELLING,  # the last line came in while the wish to cancel was being written
        Event.WINDOW_CLOSED: CANCELLING,
        Event.STORAGE_LOST: FAILED,
    },
    FAILED: _ended(FAILED),
    COMPLETED: _ended(COMPLETED),
    EXPIRED: _ended(EXPIRED),
    CANCELLED: _ended(CANCELLED),
}


class IllegalTransition(Exception):
    """A (state, event) pair that the table does not have: a bug in the caller, never user input."""


def advance(phase: Phase, event: Event) -> Phase:
    """The next phase."""
    try:
        return TRANSITIONS[phase][event]
    except KeyError:
        raise IllegalTransition(f"{phase.state} ({phase.why}) has no transition for {event}") from None


def diagram() -> str:
    """The table as a Mermaid state diagram, for the docs (a test fails when they are stale)."""
    lines = ["stateDiagram-v2", "    [*] --> validating"]
    for phase, row in TRANSITIONS.items():
        grouped: dict[Phase, list[str]] = {}
        for event, following in row.items():
            if following != phase:
                grouped.setdefault(following, []).append(event.value)
        for following, events in grouped.items():
            lines.append(f"    {_name(phase)} --> {_name(following)}: {', '.join(events)}")
    return "\n".join([*lines, *(f"    {state.value} --> [*]" for state in sorted(TERMINAL))])


def _name(phase: Phase) -> str:
    return f"{phase.state.value}_{phase.why.value}" if phase.why else phase.state.value
