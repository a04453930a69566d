"""What keeps a lane, or one of its sources, from beginning anything, and for how long.

Invariants: whatever holds is let go by somebody: a pause by ``resume``, a refused key by ``keys_changed``, a limit of
a key by its time or by an end that makes room, all else by its time. One key's limits hold up its own sources only.
Must not know: jobs, engines, why somebody pauses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

LOOKAHEAD = 16
"""Requests that may wait in the scheduler's queue: enough to fill what comes free between two looks."""
FULL_QUEUE_S = 10.0
"""So long fewer may wait there, once it was full."""
STANDS_STILL_MAX_S = 5.0
"""How long nothing is begun where the queue is full of the requests of others."""


class _Hold(NamedTuple):
    """``timer``: when it is over by itself, None where only another key helps. ``owner``: whose requests make room when
    they end."""

    reason: str
    timer: asyncio.TimerHandle | None = None
    owner: str | None = None


class Brakes:
    """``released(source_id)``: that source may go again. ``wake()``: the lane may."""

    def __init__(self, released: Callable[[str], None], wake: Callable[[], None]) -> None:
        self._released, self._wake = released, wake
        self._loop = asyncio.get_running_loop()
        self._paused: set[str] = set()
        self._holds: dict[str, _Hold] = {}
        self._still: tuple[str, asyncio.TimerHandle] | None = None
        self._narrow: asyncio.TimerHandle | None = None
        self.lookahead = LOOKAHEAD

    def close(self) -> None:
        """Forget everything, tell nobody. Idempotent."""
        for source_id in list(self._holds):
            self._let_go(source_id)
        self._paused.clear()
        if self._narrow is not None:
            self._narrow.cancel()
        self._unstall()

    # One source

    @property
    def wait_for_keys(self) -> bool:
        """Whether only another key helps any of them."""
        return any(hold.timer is None for hold in self._holds.values())

    def stops(self, source_id: str) -> bool:
        """Whether nothing of it may begin."""
        return source_id in self._paused or source_id in self._holds

    def reason(self, source_id: str) -> str | None:
        """Why nothing of it may begin, None when it may."""
        if source_id in self._paused:
            return "it is paused"
        hold = self._holds.get(source_id)
        return None if hold is None else hold.reason

    def pause(self, source_id: str) -> None:
        self._paused.add(source_id)

    def resume(self, source_id: str) -> None:
        self._paused.discard(source_id)
        self._tell(source_id)

    def hold(self, source_id: str, reason: str) -> None:
        """Until keys change."""
        self._let_go(source_id)
        self._holds[source_id] = _Hold(reason)

    def rest(self, source_id: str, owner: str, reason: str, seconds: float) -> None:
        """Its owner's key has had enough, for so long or until one of its requests ends: that gives back at least what
        it had reserved and did not use."""
        hold = self._holds.get(source_id)
        if hold is None or hold.timer is not None:
            self._let_go(source_id)
            timer = self._loop.call_later(seconds, self._release, source_id)
            self._holds[source_id] = _Hold(reason, timer, owner)

    def eased(self, owner: str) -> None:
        """A request of this owner has ended."""
        for source_id in [one for one, hold in self._holds.items() if hold.owner == owner]:
            self._release(source_id)

    def forget(self, source_id: str) -> None:
        """It is not there any more. Idempotent."""
        self._paused.discard(source_id)
        self._let_go(source_id)

    def engines_changed(self) -> None:
        """What there is to go to is other than it was, and so is who may go there."""
        self.go_on()
        self.keys_changed()

    def keys_changed(self) -> None:
        """Keys may have come back, or have other limits."""
        for source_id in list(self._holds):
            self._release(source_id)

    def _release(self, source_id: str) -> None:
        self._let_go(source_id)
        self._tell(source_id)

    def _tell(self, source_id: str) -> None:
        if not self.stops(source_id):
            self._released(source_id)

    def _let_go(self, source_id: str) -> None:
        hold = self._holds.pop(source_id, None)
        if hold is not None and hold.timer is not None:
            hold.timer.cancel()

    # The whole lane

    @property
    def still(self) -> str | None:
        """Why nothing at all may begin, None when something may."""
        return None if self._still is None else self._still[0]

    def stand_still(self, reason: str, seconds: float) -> None:
        self._unstall()
        self._still = reason, self._loop.call_later(seconds, self.go_on)

    def go_on(self) -> None:
        """Something has changed. Idempotent."""
        self._unstall()
        self._wake()

    def queue_full(self, waiting: int, reason: str, seconds: float) -> None:
        """The scheduler's queue took no more than the ``waiting`` that are there."""
        if not waiting:
            self.stand_still(reason, min(seconds, STANDS_STILL_MAX_S))
            return
        self.lookahead = min(self.lookahead, waiting)
        if self._narrow is None:
            self._narrow = self._loop.call_later(FULL_QUEUE_S, self._widen)

    def _widen(self) -> None:
        self._narrow, self.lookahead = None, LOOKAHEAD
        self._wake()

    def _unstall(self) -> None:
        if self._still is not None:
            self._still[1].cancel()
            self._still = None
