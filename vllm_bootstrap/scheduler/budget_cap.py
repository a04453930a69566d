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

MIN_SAMPLES = 8
# Answers that make the baseline: wanted, and remembered; and for how long they are believed without a fresh one.
GOOD_SAMPLES, BASELINE_SAMPLES, BASELINE_AGE_S = 32, 64, 300.0
RECENT_SAMPLES = 40
# The latest answers: this part of them begins earlier. Answers later than these times the factor are late; so many of
# the last ones are too many.
TAIL = 0.95
LATE_SAMPLES, LATE_ONES = 96, 3
WIDEST = 1.5
# Parts of the room: below the first the cap grows, above the second it shrinks. What a step of growth adds must not
# lead from the one over the other.
GROW_BELOW, SHRINK_ABOVE = 0.2, 0.35
GROW_BY, SHRINK_BY = 1.25, 0.75
# After a change, sequences that were admitted before it still run.
SETTLE_S = 0.5


class Cap:
    """``factor``: how much later than alone a realtime answer may begin."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._alone: deque[float] = deque(maxlen=BASELINE_SAMPLES)
        self._alone_at = -math.inf
        self._recent: deque[float] = deque(maxlen=RECENT_SAMPLES)
        self._late: deque[bool] = deque(maxlen=LATE_SAMPLES)
        self._ran = 0
        self._told = 0
        self._changed_at = -math.inf
        self._median = self._tail = 0.0
        self.baseline_s: float | None = None
        """The middle of what realtime is like alone."""
        self._value: float | None = None

    def value(self, ceiling: int) -> int:
        """The cap. Until anything is known it is a thirty-second of what could run."""
        if self._value is None:
            self._value = max(1.0, ceiling / 32)
        return min(int(self._value), ceiling)

    @property
    def recent_s(self) -> float | None:
        """The middle of what it was like since the cap last moved."""
        return _part(self._recent, 0.5) if self._recent else None

    def knows(self, now: float, samples: int = MIN_SAMPLES) -> bool:
        """Whether there is a baseline of so many answers that can be trusted."""
        return len(self._alone) >= samples and now - self._alone_at < BASELINE_AGE_S

    def alone(self, ttft_s: float, now: float) -> None:
        """A realtime answer began while no batch ran."""
        if now - self._alone_at >= BASELINE_AGE_S:
            self._alone.clear()
        self._alone.append(ttft_s)
        self._alone_at = now
        self._told += 1
        if len(self._alone) <= MIN_SAMPLES or self._told % MIN_SAMPLES == 0:
            self._median, self._tail = _part(self._alone, 0.5), _part(self._alone, TAIL)
            self.baseline_s = self._median

    def forget(self) -> None:
        """Realtime alone may not be any more what it was: the next answers without batch replace the baseline. Until
        there are any, the old one is better than none."""
        self._alone_at = -math.inf

    def beside(self, ttft_s: float, batch: int, ceiling: int, now: float) -> None:
        """A realtime answer began while ``batch`` sequences ran."""
        if len(self._alone) < MIN_SAMPLES or now - self._changed_at < SETTLE_S:
            return
        self._recent.append(ttft_s)
        self._late.append(ttft_s > self._factor * self._tail)
        self._ran = max(self._ran, batch)
        self._told += 1
        if self._told % MIN_SAMPLES == 0 and len(self._recent) >= MIN_SAMPLES:
            self._judge(ceiling, now)

    def _judge(self, ceiling: int, now: float) -> None:
        room = (self._factor - 1) * min(self._tail, WIDEST * self._median)
        used = (_part(self._recent, 0.5) - self._median) / room if room > 0 else math.inf
        late = sum(self._late)
        cap = self.value(ceiling)
        if used > SHRINK_ABOVE or late >= LATE_ONES:
            # What ran may be less than the cap: then the cap was not what held it back.
            self._late.clear()
            self._move(min(cap, self._ran) * SHRINK_BY, now)
        elif used < GROW_BELOW and late < LATE_ONES - 1 and self._ran >= cap:
            self._move(min(max(cap + 1, cap * GROW_BY), ceiling), now)

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
        self._ran = 0
        self._recent.clear()


def _part(samples: deque[float], part: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]
