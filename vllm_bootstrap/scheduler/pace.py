"""How fast requests of one served model have finished lately, and so how long a queue takes to clear. PURE.

Invariant: a wait that is told rests on requests that have ``finished`` (``tickets.Ending``) within the last minute;
where there are none, a fixed guess is told. Recording costs one append. Time is an input.
"""

from __future__ import annotations

from collections import deque

DEFAULT_RETRY_S = 5.0
"""Used for Retry-After as long as nothing better is known (no ETA, no measured drain)."""
_SAMPLES, _WINDOW_S = 32, 60.0


class Pace:
    """The last ends of requests."""

    __slots__ = ("_finished", "finished")

    def __init__(self) -> None:
        self._finished: deque[float] = deque(maxlen=_SAMPLES)
        self.finished = self._finished.append
        """``finished(now)``: a request has."""

    def clears_in(self, requests: int, now: float) -> float:
        """Seconds until so many requests have gone through at today's pace."""
        lately = [time for time in self._finished if time > now - _WINDOW_S]
        if len(lately) < 2 or now <= lately[0]:
            return DEFAULT_RETRY_S
        return requests * (now - lately[0]) / len(lately)
