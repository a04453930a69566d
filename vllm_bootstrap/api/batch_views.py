"""Batches and single items as the public API shows them.

Pure functions. Times become whole unix seconds here, as everywhere on ``/v1``.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_bootstrap.batches.jobs import TERMINAL, State
from vllm_bootstrap.batches.types import (
    NO_USAGE,
    BatchEvent,
    BatchRow,
    BatchView,
    Counts,
    ItemView,
    LineError,
    Progress,
    TokenUsage,
)
from vllm_bootstrap.wire_batches import (
    BatchErrorEntry,
    BatchErrors,
    BatchEventEntry,
    BatchObject,
    BatchProgress,
    BatchUsage,
    InputTokensDetails,
    ItemObject,
    OutputTokensDetails,
    RequestCounts,
)

# A batch that was retried has been through states that its present one does not follow from: their times, kept as the
# last ones, would tell those who look for ``completed_at`` that it has ended.
_PASSED: Mapping[State, tuple[State, ...]] = {
    State.VALIDATING: (),
    State.FAILED: (State.IN_PROGRESS, State.FINALIZING, State.CANCELLING),
    State.IN_PROGRESS: (),
    State.FINALIZING: (State.IN_PROGRESS,),
    State.COMPLETED: (State.IN_PROGRESS, State.FINALIZING),
    State.EXPIRED: (State.IN_PROGRESS, State.FINALIZING),
    State.CANCELLING: (State.IN_PROGRESS,),
    State.CANCELLED: (State.IN_PROGRESS, State.CANCELLING),
}


def batch(view: BatchView) -> BatchObject:
    """A batch as OpenAI's SDK reads it, with what we add."""
    row = view.row
    ended = row.phase.state in TERMINAL
    only, *others = row.models or [None]
    return BatchObject(
        id=row.id,
        endpoint=row.endpoint,
        model=None if others else only,
        errors=BatchErrors(data=[_error(found) for found in row.errors]) if row.errors else None,
        input_file_id=row.input_file_id,
        completion_window=row.completion_window,
        status=row.phase.state.value,
        # Known before they are written, so that a crash makes no second ones; there for callers when they can be read.
        output_file_id=row.output_file_id if ended else None,
        error_file_id=row.error_file_id if ended else None,
        created_at=int(row.created_at),
        expires_at=int(row.expires_at),
        request_counts=RequestCounts(**row.counts._asdict()),
        usage=None if row.usage == NO_USAGE else _usage(row.usage),
        metadata=None if row.metadata is None else dict(row.metadata),
        owner=row.owner,
        priority=row.priority,
        paused=row.paused,
        models=dict(row.models),
        progress=_progress(row.counts, view.progress),
        **_times(row),
    )


def _times(row: BatchRow) -> dict[str, int]:
    state = row.phase.state
    shown = (*_PASSED[state], state) if state is not State.VALIDATING else ()
    return {f"{one.value}_at": int(row.stamps[one.value]) for one in shown if one.value in row.stamps}


def _error(found: LineError) -> BatchErrorEntry:
    return BatchErrorEntry(**found._asdict())


def _usage(sums: TokenUsage) -> BatchUsage:
    return BatchUsage(
        input_tokens=sums.prompt,
        input_tokens_details=InputTokensDetails(cached_tokens=sums.cached),
        output_tokens=sums.completion,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=sums.reasoning),
        total_tokens=sums.prompt + sums.completion,
    )


def _progress(counts: Counts, progress: Progress) -> BatchProgress:
    return BatchProgress(
        percent=percent(counts),
        in_flight=progress.in_flight,
        lines_per_s=_rounded(progress.lines_per_s),
        eta_s=_rounded(progress.eta_s),
        waits_for=progress.waits_for,
        retried=progress.retried,
        validated_bytes=progress.validated_bytes,
        input_bytes=progress.input_bytes,
    )


def percent(counts: Counts) -> float:
    """Finished lines in percent, cut off after two digits: 100 means that not one is left."""
    if counts.total == 0:
        return 0.0
    return 10_000 * (counts.total - counts.left) // counts.total / 100


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def event(row: BatchEvent) -> BatchEventEntry:
    """One entry of a batch's history."""
    return BatchEventEntry(
        seq=row.seq,
        at=row.at,
        event=row.event,
        from_status=row.from_state,
        to_status=row.to_state,
        detail=dict(row.detail),
    )


def item(view: ItemView) -> ItemObject:
    """A single item."""
    return ItemObject(
        id=view.id,
        endpoint=view.path,
        model=view.model,
        launch_id=view.launch_id,
        status=view.state,
        priority=view.priority,
        attempts=view.attempts,
        created_at=int(view.created_at),
        expires_at=int(view.expires_at),
        ended_at=None if view.ended_at is None else int(view.ended_at),
        waits_for=view.waits_for,
        response=None if view.response is None else dict(view.response),
        error=None if view.error is None else dict(view.error),
    )
