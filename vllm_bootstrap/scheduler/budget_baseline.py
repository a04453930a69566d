"""What realtime is like without batch: when its answers begin. PURE.

Invariant: once there is a baseline there always is one: answers that are to replace it do so when there are enough of
them, and until then the old one counts. Of two that do not agree the earlier counts.

The answers of a second or two decide for minutes how much batch runs, because beside batch there are no others to
learn from. Whatever made an engine slow in just those seconds would count as what realtime is like alone: so the
baseline is heard twice, some time apart.
"""

from __future__ import annotations

import math
from collections import deque

# Answers that make the baseline: needed, wanted, and remembered; and for how long they are believed without a new one.
MIN_SAMPLES, GOOD_SAMPLES, BASELINE_SAMPLES, BASELINE_AGE_S = 8, 32, 64, 300.0
# The latest answers: this part of them begins earlier.
TAIL = 0.95
# Two hearings whose medians differ by less than this agree.
AGREE, LEAST_S = 0.85, 1e-6


class Baseline:
    """``median_s`` and ``tail_s``: the middle and the latest of what realtime is like alone, None and 0 before eight
    answers were heard."""

    def __init__(self) -> None:
        self._believed: deque[float] = deque(maxlen=BASELINE_SAMPLES)
        self._heard: deque[float] = deque(maxlen=BASELINE_SAMPLES)
        self._replaces, self._confirms = True, False
        self._told = 0
        self._at = -math.inf
        self.median_s: float | None = None
        self.tail_s = 0.0

    def knows(self, now: float, samples: int = MIN_SAMPLES) -> bool:
        """Whether so many answers have been heard since it was last wanted anew, and not too long ago."""
        heard = self._heard if self._replaces or self._confirms else self._believed
        return len(heard) >= samples and now - self._at < BASELINE_AGE_S

    def hear(self, ttft_s: float, now: float) -> None:
        """A realtime answer began while no batch ran."""
        if now - self._at >= BASELINE_AGE_S:
            self.replace()
        self._at = now
        if self._replaces or self._confirms:
            self._heard.append(ttft_s)
            if len(self._heard) >= (MIN_SAMPLES if self._replaces else GOOD_SAMPLES):
                self.settle()
            return
        self._believed.append(ttft_s)
        self._told += 1
        if self._told % MIN_SAMPLES == 0:
            self._judge()

    def replace(self) -> None:
        """Realtime alone may not be any more what it was: the next answers take the baseline's place."""
        self._replaces, self._confirms = True, False
        self._heard.clear()
        self._at = -math.inf

    def confirm(self) -> None:
        """Hear once more what it is like: both count where they agree, else the earlier."""
        if not self._replaces:
            self._confirms = True
            self._heard.clear()

    def settle(self) -> None:
        """No more answers come for now: what was heard counts, if that is enough. Idempotent."""
        if not (self._replaces or self._confirms):
            return
        if len(self._heard) >= MIN_SAMPLES:
            later = 0.0 if self._replaces else part(self._heard, 0.5) / max(part(self._believed, 0.5), LEAST_S)
            if later < AGREE:
                self._believed, self._heard = self._heard, deque(maxlen=BASELINE_SAMPLES)
            elif later <= 1 / AGREE:
                self._believed.extend(self._heard)
            self._judge()
            self._replaces = False
        self._confirms = False

    def _judge(self) -> None:
        self.median_s, self.tail_s = part(self._believed, 0.5), part(self._believed, TAIL)


def part(samples: deque[float], share: float) -> float:
    """Such a share of ``samples``, of which there are some, is smaller."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
