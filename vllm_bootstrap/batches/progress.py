"""How fast lines are finished, and when the rest will be. PURE: samples of a count in, figures out.

Invariants: times are monotonic seconds, so that a jump of the wall clock changes nothing; memory is bounded by the
time that is looked back, whatever the number of samples; a figure that cannot be told yet is None, never a guess.

The rate is that of the last minute; where little was finished in it, that of a longer time, so that a model which needs
minutes for a line has a rate as well. Nothing here knows batches, storage or why somebody pauses.
"""

from __future__ import annotations

from collections import deque

WINDOW_S = 60.0
LOOK_BACK_S = 600.0
SPACING_S = 5.0
MIN_SPAN_S = 2.0
FEW_LINES = 10


class Pace:
    """The pace of one batch. ``note`` is told the lines finished so far: when it begins, and whenever there are more.
    ``restart`` forgets what was, so that a pause does not look like slow work."""

    def __init__(self) -> None:
        self._kept: deque[tuple[float, int]] = deque()
        self._finished = 0

    def note(self, now: float, finished: int) -> None:
        """So many are finished. Fewer than before (failed ones are run again) is a new beginning."""
        if finished < self._finished:
            self._kept.clear()
        self._finished = finished
        if not self._kept or now - self._kept[-1][0] >= SPACING_S:
            self._kept.append((now, finished))
            while len(self._kept) > 2 and self._kept[1][0] <= now - LOOK_BACK_S:
                self._kept.popleft()

    def restart(self, now: float) -> None:
        """Work goes on after it stood still."""
        self._kept.clear()
        self.note(now, self._finished)

    def rate(self, now: float) -> float | None:
        """Lines a second, None as long as there is too little to say."""
        if not self._kept or now - self._kept[0][0] < MIN_SPAN_S:
            return None
        since, before = self._kept[0]
        for at, finished in reversed(self._kept):
            if now - at >= WINDOW_S and self._finished - finished >= FEW_LINES:
                since, before = at, finished
                break
        return (self._finished - before) / (now - since)

    def eta_s(self, now: float, left: int, *, running: bool = True) -> float | None:
        """Seconds until ``left`` more are finished; None where that cannot be told, as when work stands still."""
        if left <= 0:
            return 0.0
        rate = self.rate(now) if running else None
        return left / rate if rate else None


def percent(finished: int, total: int) -> float:
    """Never 100 before all are finished; nothing to do is done."""
    if finished >= total:
        return 100.0
    return min(int(1000 * finished / total) / 10, 99.9)
