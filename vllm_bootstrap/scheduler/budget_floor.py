"""The least that batch gets. PURE.

Invariant: in every minute in which batch waits throughout and its due requests are started, at least one batch request
runs for ``share`` of that minute. What batch gets anyway counts; the rest falls due at the minute's end, so that the
floor costs realtime nothing as long as batch gets along. Where no slot came free by then it stays due until one does.
"""

from __future__ import annotations

WINDOW_S = 60.0


class Floor:
    """``share``: a part of each minute, from 0 to 1."""

    def __init__(self, share: float) -> None:
        self._wanted_s = share * WINDOW_S
        self._window: float | None = None
        self._busy_s = 0.0
        self._since: float | None = None
        self._owed = False

    def waits(self, waiting: bool, now: float) -> None:
        """Whether any batch request waits."""
        if not waiting:
            self._window, self._owed = None, False
        elif self._window is None:
            self._window, self._busy_s = now, 0.0
            self._since = None if self._since is None else now

    def runs(self, running: bool, now: float) -> None:
        """Whether any batch request runs."""
        self._roll(now)
        if running and self._since is None:
            self._since, self._owed = now, False
        elif not running and self._since is not None:
            self._busy_s += max(0.0, now - self._since)
            self._since = None

    def due_at(self, now: float) -> float | None:
        """When a batch request must start for the floor's sake: now or earlier means that it is overdue. None: it need
        not, because one runs, none waits, or there is no floor."""
        self._roll(now)
        if self._window is None or self._since is not None or self._wanted_s <= 0:
            return None
        if self._owed:
            return self._window
        missing = self._wanted_s - self._busy_s
        end = self._window + WINDOW_S
        return end - missing if missing > 0 else end + WINDOW_S - self._wanted_s

    def _roll(self, now: float) -> None:
        """Begin the next minute, or as many as have gone by."""
        if self._window is None or now < self._window + WINDOW_S:
            return
        self._owed = self._owed or (self._since is None and self._busy_s < self._wanted_s)
        self._window += WINDOW_S * ((now - self._window) // WINDOW_S)
        self._busy_s = 0.0
        self._since = None if self._since is None else max(self._since, self._window)
