"""The least that batch gets. PURE.

Invariant: a batch request that waits is due before batch has gone without a minute, and while batch waits all the time
and its due requests are started, batch runs for ``share`` of it. While it waits or runs it is owed ``share`` of the
time; what runs pays that off, whether it was due or not, so that the floor costs realtime nothing as long as batch gets
along; what one pays beyond what it owes is not kept. Never is more owed than a minute's share: then it is due, and
stays so until one runs. A queue of batch that is empty forgets nothing for a minute, and then all.
"""

from __future__ import annotations

WINDOW_S = 60.0


class Floor:
    """``share``: a part of the time, from 0 to 1."""

    def __init__(self, share: float) -> None:
        self._share, self._most_s = share, share * WINDOW_S
        self._owed_s = self._at = 0.0
        self._waits = self._runs = False
        self.due_at: float | None = None
        """When a batch request must start for the floor's sake: now or earlier means that it is overdue. None: it need
        not, because one runs, none waits, or there is no floor."""

    def waits(self, waiting: bool, now: float) -> None:
        """Whether any batch request waits. Idempotent."""
        if waiting is not self._waits:
            self._settle(now)
            self._waits = waiting
            self._plan(now)

    def runs(self, running: bool, now: float) -> None:
        """Whether any batch request runs. Idempotent."""
        if running is not self._runs:
            self._settle(now)
            self._runs = running
            self._plan(now)

    def _settle(self, now: float) -> None:
        """What is owed by now, at the rates that held until now."""
        passed = max(0.0, now - self._at)
        if self._waits or self._runs:
            owed = self._owed_s + passed * (self._share - self._runs)
            self._owed_s = min(self._most_s, max(0.0, owed))
        elif passed >= WINDOW_S:
            self._owed_s = 0.0
        self._at = max(now, self._at)

    def _plan(self, now: float) -> None:
        due = self._share > 0 and self._waits and not self._runs
        self.due_at = now + (self._most_s - self._owed_s) / self._share if due else None
