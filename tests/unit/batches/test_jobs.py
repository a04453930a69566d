"""The life of a batch as a table: every way leads to an end, nothing is decided twice, what is absent raises."""

from __future__ import annotations

import pytest

from vllm_bootstrap.batches import jobs
from vllm_bootstrap.batches.jobs import (
    CANCELLED,
    CANCELLING,
    COMPLETED,
    EXPIRED,
    FAILED,
    FINALIZING,
    IN_PROGRESS,
    RETRYABLE,
    TERMINAL,
    TRANSITIONS,
    VALIDATING,
    Event,
    IllegalTransition,
    Phase,
    State,
    Why,
    advance,
)

WAYS = {
    COMPLETED: [Event.INPUT_ACCEPTED, Event.LINES_FINISHED, Event.FILES_WRITTEN],
    EXPIRED: [Event.WINDOW_CLOSED, Event.INPUT_ACCEPTED, Event.WINDOW_CLOSED, Event.FILES_WRITTEN],
    CANCELLED: [Event.INPUT_ACCEPTED, Event.CANCEL_REQUESTED, Event.FILES_WRITTEN],
    FAILED: [Event.INPUT_REFUSED],
}


@pytest.mark.parametrize("end", WAYS, ids=lambda phase: phase.state.value)
def test_a_batch_comes_to_its_end(end: Phase) -> None:
    phase = VALIDATING
    for event in WAYS[end]:
        phase = advance(phase, event)
    assert phase == end
    assert phase.state in TERMINAL


def test_every_state_is_there_and_every_unfinished_one_leads_on() -> None:
    assert {phase.state for phase in TRANSITIONS} == set(State)
    for phase, row in TRANSITIONS.items():
        if phase.state not in TERMINAL:
            assert set(row.values()) - {phase}, phase


@pytest.mark.parametrize("phase", TRANSITIONS, ids=lambda phase: f"{phase.state}-{phase.why}")
def test_cancelling_and_the_clock_may_come_at_any_time(phase: Phase) -> None:
    """And change nothing of what has ended, or is being written down."""
    for event in (Event.CANCEL_REQUESTED, Event.WINDOW_CLOSED):
        following = advance(phase, event)
        if phase.state in TERMINAL or phase.state is State.FINALIZING:
            assert following == phase


@pytest.mark.parametrize("phase", TRANSITIONS, ids=lambda phase: f"{phase.state}-{phase.why}")
def test_only_what_has_ended_with_lines_can_be_retried(phase: Phase) -> None:
    if phase.state in RETRYABLE:
        assert advance(phase, Event.RETRY_REQUESTED) == IN_PROGRESS
        return
    with pytest.raises(IllegalTransition, match=phase.state.value):
        advance(phase, Event.RETRY_REQUESTED)


def test_what_cannot_happen_raises_and_names_both() -> None:
    with pytest.raises(IllegalTransition, match=r"validating.*files_written"):
        advance(VALIDATING, Event.FILES_WRITTEN)
    with pytest.raises(IllegalTransition):
        advance(COMPLETED, Event.LINES_FINISHED)


@pytest.mark.parametrize(("state", "why"), [(State.FINALIZING, None), (State.COMPLETED, Why.EXPIRED)])
def test_why_belongs_to_finalizing_alone(state: State, why: Why | None) -> None:
    with pytest.raises(ValueError, match="why"):
        Phase(state, why)


def test_lost_storage_ends_whatever_is_unfinished() -> None:
    for phase in (VALIDATING, IN_PROGRESS, CANCELLING, *FINALIZING.values()):
        assert advance(phase, Event.STORAGE_LOST) == FAILED


def test_the_diagram_names_every_change() -> None:
    drawn = jobs.diagram()
    for phase, row in TRANSITIONS.items():
        for event, following in row.items():
            assert (event.value in drawn) or following == phase
    assert drawn.count("[*]") == len(TERMINAL) + 1
