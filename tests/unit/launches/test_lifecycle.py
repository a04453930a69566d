from __future__ import annotations

import itertools

import pytest

from vllm_bootstrap.launches.lifecycle import (
    ASLEEP,
    BOOTSTRAPPING,
    FAILED,
    FALLING_ASLEEP,
    READY,
    STOPPED,
    STOPPING,
    TERMINAL,
    TRANSITIONS,
    WAKING,
    Event,
    IllegalTransition,
    Phase,
    State,
    Why,
    advance,
    diagram,
    is_routable,
    is_stale,
    owns_gpus,
)

OPERATOR, TIMEOUT, UNHEALTHY, UNWOKEN, DIED = (
    STOPPING[why] for why in (Why.OPERATOR, Why.BOOT_TIMEOUT, Why.UNHEALTHY, Why.WAKE_FAILED, Why.DIED)
)
NEVER = None

# The expected table, written apart from the code: rows are phases, columns the events in this order.
EVENTS = [
    Event.BECAME_READY, Event.STOP_REQUESTED, Event.BOOT_TIMED_OUT, Event.PROBES_FAILED, Event.MAIN_EXITED,
    Event.SHIM_LOST, Event.RELEASED, Event.SLEEP_BEGUN, Event.FELL_ASLEEP, Event.STAYED_AWAKE, Event.WAKE_BEGUN,
    Event.WOKE, Event.STAYED_ASLEEP, Event.WAKE_FAILED,
]  # fmt: skip
_NEVER = [NEVER] * 7
EXPECTED = {
    BOOTSTRAPPING: [READY, OPERATOR, TIMEOUT, NEVER, DIED, DIED, NEVER, *_NEVER],
    READY: [NEVER, OPERATOR, NEVER, UNHEALTHY, DIED, DIED, NEVER, FALLING_ASLEEP, *_NEVER[1:]],
    FALLING_ASLEEP: [
        NEVER, OPERATOR, NEVER, UNHEALTHY, DIED, DIED, NEVER, NEVER, ASLEEP, READY, NEVER, NEVER, NEVER, UNWOKEN,
    ],
    ASLEEP: [NEVER, OPERATOR, NEVER, NEVER, DIED, DIED, NEVER, NEVER, NEVER, NEVER, WAKING, NEVER, NEVER, NEVER],
    WAKING: [NEVER, OPERATOR, NEVER, NEVER, DIED, DIED, NEVER, NEVER, NEVER, NEVER, NEVER, READY, ASLEEP, UNWOKEN],
    OPERATOR: [*[OPERATOR] * 6, STOPPED, *[OPERATOR] * 7],
    TIMEOUT: [TIMEOUT, OPERATOR, *[TIMEOUT] * 4, FAILED, *[TIMEOUT] * 7],
    UNHEALTHY: [UNHEALTHY, OPERATOR, *[UNHEALTHY] * 4, FAILED, *[UNHEALTHY] * 7],
    UNWOKEN: [UNWOKEN, OPERATOR, *[UNWOKEN] * 4, FAILED, *[UNWOKEN] * 7],
    DIED: [DIED, OPERATOR, *[DIED] * 4, FAILED, *[DIED] * 7],
    STOPPED: [STOPPED] * 14,
    FAILED: [FAILED] * 14,
}  # fmt: skip
PAIRS = [(phase, event, to) for phase, row in EXPECTED.items() for event, to in zip(EVENTS, row, strict=True)]


def name(value: object) -> str:
    return f"{value.state}-{value.why}" if isinstance(value, Phase) else str(value)


def test_the_expected_table_is_complete() -> None:
    assert set(EVENTS) == set(Event)
    assert set(EXPECTED) == set(TRANSITIONS)


@pytest.mark.parametrize(("phase", "event", "expected"), PAIRS, ids=name)
def test_advance(phase: Phase, event: Event, expected: Phase | None) -> None:
    if expected is NEVER:
        with pytest.raises(IllegalTransition, match=f"{phase.state}.*{event}"):
            advance(phase, event)
    else:
        assert advance(phase, event) == expected


@pytest.mark.parametrize(("phase", "event", "expected"), PAIRS, ids=name)
def test_a_granted_restart_matters_only_when_a_failed_launch_is_released(
    phase: Phase, event: Event, expected: Phase | None
) -> None:
    if expected is NEVER:
        with pytest.raises(IllegalTransition):
            advance(phase, event, restart=True)
        return
    restarted = event is Event.RELEASED and phase.state is State.STOPPING and phase.why is not Why.OPERATOR
    assert advance(phase, event, restart=True) == (BOOTSTRAPPING if restarted else expected)


def test_a_reason_exists_exactly_while_stopping() -> None:
    for state, why in itertools.product(State, [None, *Why]):
        if (why is not None) == (state is State.STOPPING):
            assert Phase(state, why).why is why
        else:
            with pytest.raises(ValueError, match="why"):
                Phase(state, why)


def test_every_state_is_entered() -> None:
    entered = {to.state for row in TRANSITIONS.values() for to in row.values()} | {BOOTSTRAPPING.state}
    assert entered == set(State)


def test_gpus_are_owned_until_the_end_but_for_the_sleep() -> None:
    assert {State.STOPPED, State.FAILED} == TERMINAL
    assert {phase.state for phase in TRANSITIONS if not owns_gpus(phase)} == TERMINAL | {State.ASLEEP}


def test_a_launch_sleeps_and_wakes() -> None:
    phase = READY
    for event, state in [
        (Event.SLEEP_BEGUN, State.FALLING_ASLEEP), (Event.FELL_ASLEEP, State.ASLEEP),
        (Event.WAKE_BEGUN, State.WAKING), (Event.WOKE, State.READY),
    ]:  # fmt: skip
        phase = advance(phase, event)
        assert phase.state is state


def test_only_ready_and_responsive_launches_get_requests() -> None:
    assert [phase for phase in TRANSITIONS if is_routable(phase, unresponsive=False)] == [READY]
    assert not any(is_routable(phase, unresponsive=True) for phase in TRANSITIONS)


def test_events_of_another_attempt_are_stale() -> None:
    assert is_stale(1, 2)
    assert is_stale(3, 2)
    assert not is_stale(2, 2)


def test_the_diagram_shows_every_change() -> None:
    lines = diagram().splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> bootstrapping"]
    assert "    bootstrapping --> ready: became_ready" in lines
    assert "    ready --> stopping_died: main_exited, shim_lost" in lines
    assert "    stopping_operator --> stopped: released" in lines
    assert "    stopping_died --> bootstrapping: released, restart granted" in lines
    assert "    stopping_operator --> bootstrapping: released, restart granted" not in lines
    arrows = {
        (name_in_diagram(phase), name_in_diagram(to))
        for phase, row in TRANSITIONS.items()
        for to in row.values()
        if to != phase
    }
    shown = {tuple(line.strip().split(":")[0].split(" --> ")) for line in lines if " --> " in line}
    assert arrows <= shown


def name_in_diagram(phase: Phase) -> str:
    return phase.state.value + (f"_{phase.why.value}" if phase.why else "")
