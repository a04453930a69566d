"""A sliding minute of amounts. PURE: time is an input.

Invariant: ``total(now)`` is exactly what was added within the last ``WINDOW_S`` seconds, less what was given back of
that.
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
        self.total(now)
        entry = Entry(now, amount)
        self._entries.append(entry)
        self._total += amount
        return entry

    def correct(self, entry: Entry, amount: int, now: float) -> None:
        """``entry`` was ``amount`` only. Without effect once it is older than the window."""
        self.total(now)
        if entry.at > now - WINDOW_S:
            self._total += amount - entry.amount
        entry.amount = amount

    def empty_in(self, now: float) -> float:
        """Seconds until nothing of it is left."""
        self.total(now)
        return self._entries[-1].at + WINDOW_S - now if self._entries else 0.0

    def less_in(self, amount: int, now: float) -> float:
        """Seconds until it holds ``amount`` less than now; a full window when it does not hold so much."""
        self.total(now)
        for entry in self._entries:
            amount -= entry.amount
            if amount <= 0:
                return entry.at + WINDOW_S - now
        return WINDOW_S
