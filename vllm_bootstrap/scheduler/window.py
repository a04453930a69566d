"""A sliding minute: of amounts, or of moments. PURE: time is an input.

Invariant: ``total(now)`` is exactly what was added within the last ``WINDOW_S`` seconds, less what was given back of
that. Adding and correcting look at the newest entry alone; what has become too old is dropped when somebody asks.
"""

from __future__ import annotations

from collections import deque

WINDOW_S = 60.0


class Entry:
    """One amount and when it was added."""

    __slots__ = ("amount", "at")

    def __init__(self, at: float, amount: int) -> None:
        self.at = at
        self.amount = amount


class Window:
    """What was added in the last minute. Each method may come at a later time than the one before, never earlier."""

    __slots__ = ("_entries", "_total")

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        self._total = 0

    def total(self, now: float) -> int:
        entries, old = self._entries, now - WINDOW_S
        while entries and entries[0].at <= old:
            self._total -= entries.popleft().amount
        return self._total

    def add(self, amount: int, now: float) -> Entry:
        entry = Entry(now, amount)
        self._entries.append(entry)
        self._total += amount
        return entry

    def correct(self, entry: Entry, amount: int, now: float) -> None:
        """``entry`` was ``amount`` only. Without effect once it is older than the window."""
        if entry.at > now - WINDOW_S:
            self._total += amount - entry.amount
            entry.amount = amount

    def empty_in(self, now: float) -> float:
        """Seconds until nothing of it is left."""
        return _left(self._entries[-1].at, now) if self._entries else 0.0

    def less_in(self, amount: int, now: float) -> float:
        """Seconds until it holds ``amount`` less than now; a full window when it does not hold so much."""
        self.total(now)
        for entry in self._entries:
            amount -= entry.amount
            if amount <= 0:
                return _left(entry.at, now)
        return WINDOW_S


class Moments:
    """When something happened in the last minute: a ``Window`` of ones, which takes no more than a number each."""

    __slots__ = ("_times", "add")

    def __init__(self) -> None:
        self._times: deque[float] = deque()
        self.add = self._times.append
        """``add(now)``: it has happened."""

    def total(self, now: float) -> int:
        times, old = self._times, now - WINDOW_S
        while times and times[0] <= old:
            times.popleft()
        return len(times)

    def empty_in(self, now: float) -> float:
        """Seconds until nothing of it is left."""
        times = self._times
        return _left(times[-1], now) if times else 0.0

    def less_in(self, amount: int, now: float) -> float:
        """Seconds until there are ``amount`` (1 or more) less than now; a full window when there are not so many."""
        return _left(self._times[amount - 1], now) if amount <= self.total(now) else WINDOW_S


def _left(at: float, now: float) -> float:
    """Seconds until ``at`` is a minute ago; never more than the minute, whatever rounding does."""
    passed = now - at
    return WINDOW_S - passed if passed < WINDOW_S else 0.0
