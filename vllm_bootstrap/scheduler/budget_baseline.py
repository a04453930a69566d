"""What realtime is like without batch: when its answers begin. PURE.

Invariant: once there is a baseline there always is one; and a later one than that counts only when two hearings some
time apart came out later.

The answers of a second or two decide for minutes how much batch runs, because beside batch there are no others to
learn from. Whatever made an engine slow in just those seconds would count as what realtime is like alone, and batch
would be let in by that. Slow seconds are no rarity at just this time: realtime comes at another pace because something
has happened, and that may have brought a thousand batch requests with it. So an earlier baseline counts at once, a
later one is a doubt first.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

# Answers that make a hearing: needed, enough, and wanted. How many the baseline remembers, and for how long they are
# believed when no other is heard.
MIN_SAMPLES, ENOUGH_SAMPLES, GOOD_SAMPLES, BASELINE_SAMPLES, BASELINE_AGE_S = 8, 16, 32, 128, 300.0
# Whatever made an engine slow in one hearing is over by the second.
CONFIRM_S = 10.0
# Of so many answers the latest is later than nineteen of twenty.
BLOCK = 16
# Two hearings whose medians differ by less than this agree.
AGREE, LEAST_S = 0.85, 1e-6


class Baseline:
    """``median_s`` and ``tail_s``: the middle and the latest of what realtime is like alone, None and 0 before eight
    answers were heard. ``again_at``: from then on it wants to be heard a second time. ``firm``: there have been two
    hearings, some time apart."""

    def __init__(self) -> None:
        self._counts = _samples()
        self._heard = _samples()
        self._wanted = True
        # A hearing that came out later than what counts, and when that was.
        self._later: deque[float] | None = None
        self._later_at = self._at = -math.inf
        self._first_at = math.inf
        self.firm = False
        self.again_at = math.inf
        self.median_s: float | None = None
        self.tail_s = 0.0

    def knows(self, now: float, samples: int = MIN_SAMPLES) -> bool:
        """Whether so many answers have been heard since it was last wanted anew, and not too long ago."""
        return (not self._wanted or len(self._heard) >= samples) and now - self._at < BASELINE_AGE_S

    def hear(self, ttft_s: float, now: float) -> None:
        """A realtime answer began while no batch ran."""
        if now - self._at >= BASELINE_AGE_S:
            self._wanted = True
            self._heard.clear()
        self._at = now
        self._heard.append(ttft_s)
        if len(self._heard) >= GOOD_SAMPLES:
            self._conclude(now)
        elif self._wanted and not self._counts and len(self._heard) % MIN_SAMPLES == 0:
            self._judge(self._heard)

    def too_late(self, earlier: Iterable[float], now: float) -> None:
        """Answers have begun earlier than this says, although beside batch: they count until there is a better hearing,
        and that is wanted now."""
        self._counts, self._later = deque(earlier, maxlen=BASELINE_SAMPLES), None
        self._judge(self._counts)
        if not self._wanted:
            self.again_at = now

    def replace(self) -> None:
        """Realtime alone may not be any more what it was: what comes next is heard for a new baseline."""
        self._later = None
        self._at = -math.inf
        self.confirm()

    def confirm(self) -> None:
        """What comes next is a hearing of its own."""
        self._wanted, self.again_at = True, math.inf
        self._heard.clear()

    def settle(self, now: float) -> None:
        """No more answers come for now: the hearing that was wanted is over if it had enough. Idempotent."""
        if self._wanted:
            self.conclude(now)

    def conclude(self, now: float) -> None:
        """What was heard is a hearing if it is enough for one; of answers that nobody wanted to hear that is more."""
        if len(self._heard) >= (MIN_SAMPLES if self._wanted else ENOUGH_SAMPLES):
            self._conclude(now)

    def _conclude(self, now: float) -> None:
        heard, self._heard, self._wanted = self._heard, _samples(), False
        self.firm = self.firm or now >= self._first_at + CONFIRM_S
        if not self._counts:
            self._counts, self._first_at, self.again_at = heard, now, now + CONFIRM_S
        elif part(heard, 0.5) <= part(self._counts, 0.5) / AGREE:
            self._counts = _of_two(self._counts, heard)
            if self._later is not None or now >= self.again_at:
                self._later, self.again_at = None, math.inf
        elif self._later is None:
            self._later, self._later_at, self.again_at = heard, now, now + CONFIRM_S
        elif now >= self._later_at + CONFIRM_S:
            self._counts, self._later, self.again_at = _of_two(self._later, heard), None, math.inf
        self._judge(self._counts)

    def _judge(self, samples: deque[float]) -> None:
        self.median_s, self.tail_s = part(samples, 0.5), _latest(samples)


def _samples() -> deque[float]:
    return deque(maxlen=BASELINE_SAMPLES)


def _latest(samples: deque[float]) -> float:
    """What the latest twentieth takes: of sixteen the latest, in the middle of such. An engine that stood still for a
    moment made several in a row late, which are all of a twentieth and yet only one of these."""
    ordered = list(samples)
    size = min(BLOCK, len(ordered))
    latest = sorted(max(ordered[end - size : end]) for end in range(len(ordered), size - 1, -size))
    return latest[(len(latest) - 1) // 2]


def _of_two(first: deque[float], second: deque[float]) -> deque[float]:
    """Both where they agree, else the earlier."""
    later = part(second, 0.5) / max(part(first, 0.5), LEAST_S)
    if AGREE <= later <= 1 / AGREE:
        return deque([*first, *second], maxlen=BASELINE_SAMPLES)
    return second if later < AGREE else first


def part(samples: deque[float], share: float) -> float:
    """Such a share of ``samples``, of which there are some, is smaller."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
