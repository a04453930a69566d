"""How many batch sequences may run beside realtime, learnt from when realtime answers begin. PURE.

Invariant: the cap is between 0 and its ceiling, it moves at most once per ``MIN_SAMPLES`` answers, and it is judged
only by answers of its own time. Without batch running an answer says what realtime is like alone; such answers make
the baseline and never lower the cap.

The median moves evenly with the number of sequences in a step, and few answers settle it; it steers. The tail is what
is promised, but a handful of answers says little about it; single late ones are counted, two of them are no accident.
"""

from __future__ import annotations

import math
from collections import deque

MIN_SAMPLES = 8
# Answers that make the baseline, and for how long they are believed without a fresh one.
BASELINE_SAMPLES, BASELINE_AGE_S = 64, 600.0
# What is late, is later than this part of realtime's answers alone, times the factor.
TAIL = 0.95
TAIL_SAMPLES, LATE_ONES = 40, 2
# Parts of the way from 1 to the factor: below the first the cap may grow, above the second it shrinks.
GROW_BELOW, SHRINK_ABOVE = 0.5, 0.8
SHRINK_BY = 0.75
# After a change, sequences that were admitted before it still run.
SETTLE_S = 0.5


class Cap:
    """``factor``: how much later than alone a realtime answer may begin."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._alone: deque[float] = deque(maxlen=BASELINE_SAMPLES)
        self._alone_at = -math.inf
        self._recent: deque[float] = deque(maxlen=TAIL_SAMPLES)
        self._told = 0
        self._changed_at = -math.inf
        self._median = self._tail = 0.0
        self._value: float | None = None

    def value(self, ceiling: int) -> int:
        """The cap. Until anything is known it is a thirty-second of what could run."""
        if self._value is None:
            self._value = max(1.0, ceiling / 32)
        return min(int(self._value), ceiling)

    @property
    def baseline_s(self) -> float | None:
        """The middle of what realtime is like alone."""
        return self._median if self._alone else None

    @property
    def recent_s(self) -> float | None:
        """The middle of what it was like since the cap last moved."""
        return _part(self._recent, 0.5) if self._recent else None

    def knows(self, now: float) -> bool:
        """Whether there is a baseline that can be trusted."""
        return len(self._alone) >= MIN_SAMPLES and now - self._alone_at < BASELINE_AGE_S

    def alone(self, ttft_s: float, now: float) -> None:
        """A realtime answer began while no batch ran."""
        if now - self._alone_at >= BASELINE_AGE_S:
            self._alone.clear()
        self._alone.append(ttft_s)
        self._alone_at = now
        self._told += 1
        if len(self._alone) <= MIN_SAMPLES or self._told % MIN_SAMPLES == 0:
            self._median, self._tail = _part(self._alone, 0.5), _part(self._alone, TAIL)

    def beside(self, ttft_s: float, batch: int, ceiling: int, now: float) -> None:
        """A realtime answer began while ``batch`` sequences ran."""
        if len(self._alone) < MIN_SAMPLES or now - self._changed_at < SETTLE_S:
            return
        self._recent.append(ttft_s)
        self._told += 1
        if self._told % MIN_SAMPLES == 0 and len(self._recent) >= MIN_SAMPLES:
            self._judge(batch, ceiling, now)

    def _judge(self, batch: int, ceiling: int, now: float) -> None:
        more = _part(self._recent, 0.5) / self._median - 1
        late = sum(one > self._factor * self._tail for one in self._recent)
        allowed = self._factor - 1
        cap = self.value(ceiling)
        if more > SHRINK_ABOVE * allowed or late >= LATE_ONES:
            # What runs may be less than the cap: then the cap was not what held it back.
            self._move(min(cap, batch) * SHRINK_BY, now)
        elif more < GROW_BELOW * allowed and not late and batch >= cap - 1:
            self._move(min(cap + max(1, cap // 16), ceiling), now)

    def shrink(self, now: float) -> None:
        """The engine itself says that it is too much."""
        if self._value is not None and now - self._changed_at >= SETTLE_S:
            self._move(self._value / 2, now)

    def recover(self, ceiling: int, now: float) -> None:
        """A cap of nothing proves nothing: try one again after a while."""
        if self.value(ceiling) == 0 and now - self._changed_at >= 4 * SETTLE_S:
            self._move(min(1.0, ceiling), now)

    def _move(self, value: float, now: float) -> None:
        self._value = float(math.floor(value))
        self._changed_at = now
        self._recent.clear()


def _part(samples: deque[float], part: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]
