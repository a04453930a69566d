"""How many batch sequences may run beside realtime, learnt from when realtime answers begin. PURE.

Invariant: the cap is between 0 and its ceiling, it moves at most once per ``MIN_SAMPLES`` answers, and it is judged
only by answers of its own time. Without batch running an answer says what realtime is like alone; such answers make
the baseline and never lower the cap.

What is promised concerns the latest answers: they may be later than the latest ones alone, by a factor. What batch adds
comes on top of whatever makes them late alone, so that is how much room there is; where they are very late, so much
would be felt by all others, and the room ends at what one and a half times the median would give. It is measured at
the median, which moves evenly with the number of sequences in a step and is settled by few answers; a handful says
little about the tail. Beyond that, single late answers are counted, and several of them are no accident.
"""

from __future__ import annotations

import math
from collections import deque

from vllm_bootstrap.scheduler.budget_baseline import AGREE, GOOD_SAMPLES, MIN_SAMPLES, Baseline, part

RECENT_SAMPLES = 40
# Answers later than the latest ones alone times the factor are late; so many of the last ones are too many.
LATE_SAMPLES, LATE_ONES = 96, 3
WIDEST = 1.5
# Parts of the room: below the first the cap grows, above the second it shrinks. What a step of growth adds must not
# lead from the one over the other.
GROW_BELOW, SHRINK_ABOVE = 0.12, 0.25
GROW_BY, SHRINK_BY = 1.25, 0.75
# After a change, sequences that were admitted before it still run.
SETTLE_S = 0.5
# Where answers differ much their median says little: so large a part of them has to be earlier than the middle alone.
EARLIER = 0.8
# How long a cap of nothing stays: until eight answers have begun without batch, within bounds.
RECOVER_S, RECOVER_AT_MOST_S = 2.0, 60.0


class Cap:
    """``factor``: how much later than alone a realtime answer may begin."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self.baseline = Baseline()
        self._recent: deque[float] = deque(maxlen=RECENT_SAMPLES)
        self._late: deque[bool] = deque(maxlen=LATE_SAMPLES)
        self._ran = self._alone = 0
        self._told = 0
        self._judged_by_s: float | None = None
        self._changed_at = -math.inf
        self._value: float | None = None

    def value(self, ceiling: int) -> int:
        """The cap. Until anything is known it is a thirty-second of what could run."""
        if self._value is None:
            self._value = max(1.0, ceiling / 32)
        return min(int(self._value), ceiling)

    @property
    def recent_s(self) -> float | None:
        """The middle of what it was like since the cap last moved."""
        return part(self._recent, 0.5) if self._recent else None

    def is_late(self, ttft_s: float) -> bool:
        """Whether an answer begins later than the latest ones alone may. There is a baseline."""
        return ttft_s > self._factor * self.baseline.tail_s

    def beside(self, ttft_s: float, batch: int, ceiling: int, now: float) -> None:
        """A realtime answer began while ``batch`` sequences ran."""
        baseline = self.baseline
        if baseline.median_s is None or now - self._changed_at < SETTLE_S:
            return
        by_s = self._judged_by_s
        if by_s is None or not AGREE * by_s <= baseline.median_s <= by_s / AGREE:
            self._judged_by_s = baseline.median_s
            self._recent.clear()
        self._recent.append(ttft_s)
        self._late.append(self.is_late(ttft_s))
        self._ran = max(self._ran, batch)
        self._told += 1
        if self._told % MIN_SAMPLES == 0 and len(self._recent) >= MIN_SAMPLES:
            self._judge(baseline.median_s, baseline.tail_s, ceiling, now)

    def _judge(self, median_s: float, tail_s: float, ceiling: int, now: float) -> None:
        recent_s = part(self._recent, 0.5)
        # Batch makes no answer earlier: then the baseline is wrong, and to be sure of that comes before growth.
        wrong = recent_s < AGREE * median_s and part(self._recent, EARLIER) < median_s
        if wrong and len(self._recent) >= GOOD_SAMPLES:
            self.baseline.too_late(self._recent, now)
        room = (self._factor - 1) * min(tail_s, WIDEST * median_s)
        used = (recent_s - median_s) / room if room > 0 else math.inf
        late = sum(self._late)
        cap = self.value(ceiling)
        if used > SHRINK_ABOVE or late >= LATE_ONES:
            # What ran may be less than the cap: then the cap was not what held it back.
            self._late.clear()
            self._move(min(cap, self._ran) * SHRINK_BY, now)
        elif used < GROW_BELOW and not wrong and late < LATE_ONES - 1 and self._ran >= cap:
            self._move(min(max(cap + 1, cap * GROW_BY), ceiling), now)

    def shrink(self, now: float) -> None:
        """The engine itself says that it is too much."""
        if self._value is not None and now - self._changed_at >= SETTLE_S:
            self._move(self._value / 2, now)

    def recover(self, ceiling: int, now: float) -> None:
        """An answer began without batch. A cap of nothing proves nothing: try one again after a while, in which it
        costs nothing to hear what realtime is like alone."""
        if self.value(ceiling):
            return
        self._alone += 1
        since_s = now - self._changed_at
        if since_s >= RECOVER_S and (self._alone >= MIN_SAMPLES or since_s >= RECOVER_AT_MOST_S):
            self.baseline.conclude(now)
            self._move(min(1.0, ceiling), now)

    def _move(self, value: float, now: float) -> None:
        self._value = float(math.floor(value))
        self._changed_at = now
        self._ran = self._alone = 0
        self._recent.clear()
