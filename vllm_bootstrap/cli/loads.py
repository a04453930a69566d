"""What a launch or a group has to do, in words: requests by class, and what batch may use. PURE."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_bootstrap.wire import Load
from vllm_bootstrap.wording import duration


def requests_of(load: Load) -> str:
    """Requests by class, and how long the oldest of them waits."""
    slots = f" on {load.capacity} slots" if load.capacity else ""
    oldest = "" if load.oldest_wait_s is None else f", the oldest for {duration(load.oldest_wait_s)}"
    return f"{_by_class(load.in_flight)} running{slots}, {_by_class(load.queued)} queued{oldest}"


def _by_class(counts: Mapping[str, int]) -> str:
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{sum(counts.values())} ({parts})" if parts else "0"


def batch_of(load: Load) -> str:
    """What batch uses and may use, and why."""
    batch = load.batch
    if batch is None:
        return ""
    kept = f", {batch.reserve} kept for realtime" if batch.reserve else ""
    return f"{batch.batch_sequences} of {batch.allowance} allowed ({batch.slots} slots{kept}): {batch.reason}"


def batch_share(*loads: Load) -> str:
    """The same in a cell of a table, of all of them together."""
    known = [load.batch for load in loads if load.batch is not None]
    return f"{sum(b.batch_sequences for b in known)} of {sum(b.allowance for b in known)}" if known else "-"
