from __future__ import annotations

import itertools

import pytest

from vllm_bootstrap.launches.lifecycle import (
    BOOTSTRAPPING,
    FAILED,
    READY,
    STOPPED,
    STOPPING,
    TERMINAL,
    TRANSITIONS,
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

OPERATOR, TIMEOUT, UNHEALTHY, DIED = (
    STOPPING[why] for why in (Why.OPERATOR, Why.BOOT_TIMEOUT, Why.UNHEALTHY, Why.DIED)
)
NEVER = None

# The expected table, written apart from the code: rows are phases, columns the events in this order.
EVENTS = [
    Event.BECAME_READY, Event.STOP_REQUESTED, Event.BOOT_TIMED_OUT, Event.PROBES_FAILED, Event.MAIN_EXITED,
    Event.SHIM_LOST, Event.RELEASED,
]  # fmt: skip
EXPECTED = {
    BOOTSTRAPPING: [READY, OPERATOR, TIMEOUT, NEVER, DIED, DIED, NEVER],
    READY: [NEVER, OPERATOR, NEVER, UNHEALTHY, DIED, DIED, NEVER],
    OPERATOR: [OPERATOR, OPERATOR, OPERATOR, OPERATOR, OPERATOR, OPERATOR, STOPPED],
    TIMEOUT: [TIMEOUT, OPERATOR, TIMEOUT, TIMEOUT, TIMEOUT, TIMEOUT, FAILED],
    UNHEALTHY: [UNHEALTHY, OPERATOR, UNHEALTHY, UNHEALTHY, UNHEALTHY, UNHEALTHY, FAILED],
    DIED: [DIED, OPERATOR, DIED, DIED, DIED, DIED, FAILED],
    STOPPED: [STOPPED] * 7,
    FAILED: [FAILED] * 7,
}
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


def test_asleep_is_reserved_and_not_entered() -> None:
    entered = {to.state for row in TRANSITIONS.values() for to in row.values()} | {p.state for p in TRANSITIONS}
    assert entered == set(State) - {State.ASLEEP}


def test_gpus_are_owned_until_the_end() -> None:
    assert {phase.state for phase in TRANSITIONS if not owns_gpus(phase)} == TERMINAL == {State.STOPPED, State.FAILED}


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
