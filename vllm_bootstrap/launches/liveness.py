"""Is a ready engine alive? Samples in, verdict out. PURE.

vLLM answers ``/health`` with 200 while its engine hangs, so health alone proves nothing. An engine is *moving* at a
sample when its token counters changed, or when it is healthy with nothing running. A busy engine that is not moving
for ``unresponsive_after_s`` gets no new requests (``UNRESPONSIVE``, a routing flag that goes away when it moves
again); after ``unhealthy_after_s`` it is given up (``FAILED``). A probe that times out counts as not moving unless
the counters were seen to change. Time in which nobody looked (a frozen daemon) proves nothing and is not counted.

Cases of ``observe``:
1. counters known and changed since the last known ones → moving
2. healthy, counters known, nothing running → moving
3. healthy, engine has no counters → moving (health is all there is)
4. anything else (unhealthy, timed out, running and still, counters unreadable) → not moving
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum


class Verdict(StrEnum):
    ALIVE = "alive"
    UNRESPONSIVE = "unresponsive"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at an engine. ``tokens`` is the sum of its token counters, None when they could not be read."""

    at: float
    healthy: bool
    has_metrics: bool
    running: float | None = None
    tokens: float | None = None


@dataclass(frozen=True, slots=True)
class Liveness:
    """What is remembered between samples. Times are monotonic seconds. Samples further apart than ``longest_gap_s``
    leave a time in which nobody looked."""

    moved_at: float
    tokens: float | None = None
    longest_gap_s: float = math.inf
    looked_at: float | None = None

    def observe(self, sample: Sample) -> Liveness:
        tokens = self.tokens if sample.tokens is None else sample.tokens
        if self._is_moving(sample):
            return replace(self, moved_at=sample.at, tokens=tokens, looked_at=sample.at)
        before = self.moved_at if self.looked_at is None else self.looked_at
        moved_at = self.moved_at + unwatched_s(before, sample.at, self.longest_gap_s)
        return replace(self, moved_at=moved_at, tokens=tokens, looked_at=sample.at)

    def _is_moving(self, sample: Sample) -> bool:
        if sample.tokens is not None and sample.tokens != self.tokens:
            return True  # 1
        if sample.healthy and sample.tokens is not None and not sample.running:
            return True  # 2
        return sample.healthy and not sample.has_metrics  # 3, else 4

    def verdict(self, now: float, *, unresponsive_after_s: float, unhealthy_after_s: float) -> Verdict:
        still_for = now - self.moved_at
        if still_for > unhealthy_after_s:
            return Verdict.FAILED
        return Verdict.UNRESPONSIVE if still_for > unresponsive_after_s else Verdict.ALIVE


def unwatched_s(looked_at: float, now: float, longest_gap_s: float) -> float:
    """How much of the time between two looks was longer than it takes: then the daemon did not run."""
    return max(0.0, now - looked_at - longest_gap_s)


def boot_timed_out(
    *, elapsed_s: float, since_progress_s: float, start_timeout_s: float, start_stall_timeout_s: float
) -> bool:
    """Whether a start is to be given up: late **and** without progress. A slow load that progresses goes on."""
    return elapsed_s > start_timeout_s and since_progress_s > min(start_stall_timeout_s, start_timeout_s)
