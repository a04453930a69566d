"""A clock that stands until it is told to go, with timers in the manner of an event loop."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count


class FakeTimer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class FakeTime:
    """``advance`` runs what is due in order; ``jump`` lets time pass without running anything, as a busy machine."""

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start
        self._order = count()
        self._timers: list[tuple[float, int, FakeTimer]] = []

    def now(self) -> float:
        return self._now

    @property
    def pending(self) -> int:
        return sum(timer.callback is not None for _, _, timer in self._timers)

    def call_later(self, delay: float, callback: Callable[[], None]) -> FakeTimer:
        timer = FakeTimer(callback)
        heappush(self._timers, (self._now + delay, next(self._order), timer))
        return timer

    def advance(self, seconds: float) -> None:
        end = self._now + seconds
        while self._timers and self._timers[0][0] <= end + 1e-9:
            at, _, timer = heappop(self._timers)
            self._now = max(self._now, at)
            if timer.callback is not None:
                callback, timer.callback = timer.callback, None
                callback()
        self._now = max(self._now, end)

    def jump(self, seconds: float) -> None:
        self._now += seconds
