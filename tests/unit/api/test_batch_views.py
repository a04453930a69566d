"""Batches and items as they are shown: every field from what is stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vllm_bootstrap.api import batch_views
from vllm_bootstrap.batches import jobs
from vllm_bootstrap.batches.jobs import Phase, State, Why
from vllm_bootstrap.batches.types import (
    BatchEvent,
    BatchRow,
    BatchView,
    Counts,
    ItemView,
    LineError,
    Progress,
    TokenUsage,
)
from vllm_bootstrap.wire_batches import BatchObject

NOW = 1_800_000_000.75
STAMPS = {state.value: NOW + at for at, state in enumerate(State)}


def view(progress: Progress | None = None, **fields: Any) -> BatchView:
    row = BatchRow(
        id="batch_1", owner="bob", endpoint="/v1/completions", input_file_id="file-1", completion_window="24h",
        created_at=NOW, expires_at=NOW + 86400, phase=jobs.VALIDATING,
    )  # fmt: skip
    return BatchView(replace(row, **fields), progress or Progress())


def test_a_batch_that_has_just_begun() -> None:
    assert batch_views.batch(view(progress=Progress(validated_bytes=10, input_bytes=99))).model_dump() == {
        "id": "batch_1", "object": "batch", "endpoint": "/v1/completions", "model": None, "errors": None,
        "input_file_id": "file-1", "completion_window": "24h", "status": "validating", "output_file_id": None,
        "error_file_id": None, "created_at": 1_800_000_000, "in_progress_at": None, "expires_at": 1_800_086_400,
        "finalizing_at": None, "completed_at": None, "failed_at": None, "expired_at": None, "cancelling_at": None,
        "cancelled_at": None, "request_counts": {"total": 0, "completed": 0, "failed": 0}, "usage": None,
        "metadata": None, "owner": "bob", "priority": 0, "paused": False, "models": {},
        "progress": {"percent": 0.0, "in_flight": 0, "lines_per_s": None, "eta_s": None, "waits_for": None,
                     "retried": 0, "validated_bytes": 10, "input_bytes": 99},
    }  # fmt: skip


def test_a_batch_that_runs() -> None:
    progress = Progress(in_flight=4, lines_per_s=2.34567, eta_s=119.999, waits_for="org/b to be launched", retried=3)
    shown = batch_views.batch(view(
        progress, phase=jobs.IN_PROGRESS, counts=Counts(7, 2, 1), usage=TokenUsage(10, 4, 20, 5), paused=True,
        priority=-3, metadata={"a": "b"}, models={"org/a": 6, "org/b": 1}, launch_id="l1",
        stamps={"validating": NOW, "in_progress": NOW + 1},
    ))  # fmt: skip
    assert shown.usage is not None
    assert shown.usage.model_dump() == {
        "input_tokens": 10, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 5}, "total_tokens": 30,
    }  # fmt: skip
    assert (shown.model, shown.models) == (None, {"org/a": 6, "org/b": 1})
    assert (shown.status, shown.paused, shown.priority, shown.metadata) == ("in_progress", True, -3, {"a": "b"})
    assert shown.request_counts.model_dump() == {"total": 7, "completed": 2, "failed": 1}
    assert shown.in_progress_at == 1_800_000_001
    found = shown.progress
    assert (found.percent, found.lines_per_s, found.eta_s, found.in_flight) == (42.85, 2.35, 120.0, 4)
    assert (found.waits_for, found.retried) == ("org/b to be launched", 3)


def test_the_only_model_is_the_model_and_errors_name_their_line() -> None:
    errors = (LineError("duplicate_custom_id", "twice", 7, "custom_id"), LineError("too_many_lines", "no"))
    shown = batch_views.batch(view(phase=jobs.FAILED, errors=errors, models={"org/a": 6}))
    assert shown.model == "org/a"
    assert shown.errors is not None
    assert shown.errors.model_dump() == {
        "object": "list",
        "data": [
            {"code": "duplicate_custom_id", "message": "twice", "line": 7, "param": "custom_id"},
            {"code": "too_many_lines", "message": "no", "line": None, "param": None},
        ],
    }


@pytest.mark.parametrize(
    ("counts", "percent"),
    [(Counts(), 0.0), (Counts(3, 1, 1), 66.66), (Counts(1_000_000, 999_998, 1), 99.99), (Counts(5, 3, 2), 100.0)],
)
def test_a_hundred_percent_means_that_nothing_is_left(counts: Counts, percent: float) -> None:
    assert batch_views.percent(counts) == percent


@pytest.mark.parametrize("state", State)
def test_times_are_those_of_the_way_to_the_present_state(state: State) -> None:
    """A batch that was retried has the stamps of other ends as well: those are not shown."""
    shown = _shown_in(state).model_dump()
    times = {name for name, value in shown.items() if name.endswith("_at") and value is not None}
    terminal = {f"{one.value}_at" for one in jobs.TERMINAL}
    assert times & terminal == ({f"{state.value}_at"} if state in jobs.TERMINAL else set())
    if state is not State.VALIDATING:
        assert shown[f"{state.value}_at"] == int(STAMPS[state.value])
    assert ("cancelling_at" in times) <= (state in {State.CANCELLING, State.CANCELLED, State.FAILED})


def _shown_in(state: State) -> BatchObject:
    phase = Phase(state, Why.COMPLETED if state is State.FINALIZING else None)
    return batch_views.batch(view(phase=phase, stamps=STAMPS))


def test_an_entry_of_the_history() -> None:
    row = BatchEvent(3, "batch_1", NOW, "paused", None, "in_progress", {"by": "bob"})
    assert batch_views.event(row).model_dump() == {
        "seq": 3, "at": NOW, "event": "paused", "from_status": None, "to_status": "in_progress",
        "detail": {"by": "bob"},
    }  # fmt: skip


def test_an_item() -> None:
    found = ItemView(
        "item_1", "bob", "/v1/completions", "m", None, 5, "failed", 2, NOW, NOW + 60, NOW + 9,
        error={"code": "upstream_error", "message": "no"},
    )  # fmt: skip
    assert batch_views.item(found).model_dump() == {
        "id": "item_1", "object": "batch.item", "endpoint": "/v1/completions", "model": "m", "launch_id": None,
        "status": "failed", "priority": 5, "attempts": 2, "created_at": 1_800_000_000, "expires_at": 1_800_000_060,
        "ended_at": 1_800_000_009, "waits_for": None, "response": None,
        "error": {"code": "upstream_error", "message": "no"},
    }  # fmt: skip
