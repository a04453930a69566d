"""The single items of one key and one priority that go to one lane, oldest first.

Invariant: each item is given out at most once until it is returned or forgotten; at most ``MOST_BODIES`` bodies are in
memory beyond those given out. Must not know: storage, lanes, records.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Protocol

from vllm_bootstrap.batches.items_store import Waiting
from vllm_bootstrap.batches.work import Ending, Job
from vllm_bootstrap.errors import ApiError

log = logging.getLogger(__name__)

MOST_BODIES = 256
AGAIN_S = 1.0
JOINABLE = "/v1/completions"


class Owner(Protocol):
    """Whose items these are."""

    @property
    def may_take(self) -> bool: ...

    async def body(self, number: int) -> bytes | None: ...

    def item_ended(self, job: Job, ending: Ending) -> None: ...

    def item_noted(self, job: Job) -> None: ...


class ItemSource:
    """A ``work.Source``. ``latency_s``: an item that could be joined waits so long for others, unless ``max_joined``
    are there. ``ready`` is called when there is something to take after there was nothing."""

    def __init__(
        self,
        source_id: str,
        key_name: str,
        owner: Owner,
        *,
        priority: int,
        deadline: float,
        latency_s: float,
        max_joined: int,
    ) -> None:
        self.id, self.owner, self.priority, self.deadline = source_id, key_name, priority, deadline
        self.ready: Callable[[], None] = lambda: None
        self._items, self._latency_s, self._max_joined = owner, latency_s, max_joined
        self._loop = asyncio.get_running_loop()
        self._known: dict[int, Waiting] = {}
        self._behind: list[int] = []
        self._ahead: list[tuple[int, Job, float]] = []
        self._company = 0
        self._out: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def empty(self) -> bool:
        return not self._known

    @property
    def left(self) -> int:
        return len(self._known)

    def is_out(self, number: int) -> bool:
        """Whether it was given out and not returned."""
        return number in self._out

    def add(self, number: int, item: Waiting, body: bytes | None) -> None:
        """``body`` None: it is to be read when its turn comes."""
        self._known[number] = item
        if body is not None and not self._behind and len(self._ahead) < MOST_BODIES:
            self._offer(Job(self, number, item.path, body, item.attempts, item.deaths), wait=True)
        else:
            heappush(self._behind, number)
            self._read_more()

    def forget(self, number: int) -> None:
        """It has ended."""
        self._known.pop(number, None)
        self._out.discard(number)

    def close(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        if self._reading is not None:
            self._reading.cancel()

    def take(self) -> Job | None:
        if not self._items.may_take:
            return None
        while self._ahead:
            _, job, ripe_at = self._ahead[0]
            wanted = job.number in self._known
            if wanted and not self._is_ripe(ripe_at):
                return None
            heappop(self._ahead)
            self._read_more()
            if wanted:
                self._out.add(job.number)
                return job
        self._company = 0
        return None

    def _is_ripe(self, ripe_at: float) -> bool:
        if self._company > 0:  # the first of these has waited: they may go with it
            self._company -= 1
            return True
        if ripe_at <= self._loop.time() or len(self._ahead) >= self._max_joined:
            self._company = self._max_joined - 1 if ripe_at else 0
            return True
        if self._timer is None:
            self._timer = self._loop.call_at(ripe_at, self._ripened)
        return False

    def _ripened(self) -> None:
        self._timer = None
        self.ready()

    def ended(self, job: Job, ending: Ending) -> None:
        self._items.item_ended(job, ending)

    def returned(self, job: Job) -> None:
        self._out.discard(job.number)
        if job.number in self._known:
            self._offer(job, wait=False)

    def noted(self, job: Job) -> None:
        self._items.item_noted(job)

    def _offer(self, job: Job, *, wait: bool) -> None:
        joins = wait and self._max_joined > 1 and job.path == JOINABLE
        ripe_at = self._loop.time() + self._latency_s if joins else 0.0
        heappush(self._ahead, (job.number, job, ripe_at))
        self.ready()

    def _read_more(self) -> None:
        if self._behind and len(self._ahead) < MOST_BODIES and self._reading is None:
            self._reading = asyncio.create_task(self._read(), name=f"read items of {self.id}")

    async def _read(self) -> None:
        try:
            while self._behind and len(self._ahead) < MOST_BODIES:
                number = heappop(self._behind)
                try:
                    body = await self._items.body(number)
                except Exception as error:
                    if not isinstance(error, ApiError):
                        log.exception("An item cannot be read")
                    heappush(self._behind, number)
                    await asyncio.sleep(AGAIN_S)
                    continue
                item = self._known.get(number)
                if body is not None and item is not None:
                    self._offer(Job(self, number, item.path, body, item.attempts, item.deaths), wait=False)
        finally:
            self._reading = None
