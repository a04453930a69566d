"""Single items: accepted one by one, carried by the same lanes as the lines of batches.

Invariants: an item that was accepted is on disk; each ends once, with a record on disk before anybody is told; memory
holds what is needed to find the next one, and the bodies of a bounded number. Must not know: HTTP, how a request
reaches an engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush

from vllm_bootstrap import ids
from vllm_bootstrap.batches import outcomes, output
from vllm_bootstrap.batches.item_source import ItemSource
from vllm_bootstrap.batches.items_store import Ended, ItemStore, Waiting
from vllm_bootstrap.batches.linestore import Totals
from vllm_bootstrap.batches.records import Recorder
from vllm_bootstrap.batches.run_deps import Lanes
from vllm_bootstrap.batches.store import Creation
from vllm_bootstrap.batches.types import NO_COUNTS, NO_USAGE, ItemView, NewItem, Record
from vllm_bootstrap.batches.work import Answered, Ending, Job
from vllm_bootstrap.errors import ApiError, BadRequest, NotFound, QueueFull
from vllm_bootstrap.pulse import until_pulse
from vllm_bootstrap.tallies import BatchTally

log = logging.getLogger(__name__)

LOOK_S = 1.0
FEW_EXPIRIES = 1000
_NOTHING = Totals(NO_COUNTS, NO_USAGE, 0)
SourceKey = tuple[str, str | None, str | None, int]


class ItemService:
    """``most_waiting`` items of all keys may wait, each for ``expires_after_s`` unless it says otherwise. ``latency_s``
    and ``max_joined``: how long one may wait for others to be sent with, and how many go together. ``tally`` counts
    what ended."""

    def __init__(
        self,
        store: ItemStore,
        lanes: Lanes,
        *,
        most_waiting: int,
        expires_after_s: float,
        latency_s: float,
        max_joined: int,
        clock: Callable[[], float] = time.time,
        tally: BatchTally | None = None,
    ) -> None:
        self._tally = tally or BatchTally()
        self._store, self._lanes, self._clock = store, lanes, clock
        self._most_waiting, self._expires_after_s = most_waiting, expires_after_s
        self._latency_s, self._max_joined = latency_s, max_joined
        self._waiting: dict[str, Waiting] = {}
        self._numbers: dict[int, str] = {}
        self._number_of: dict[str, int] = {}
        self._next = itertools.count(1)
        self._sources: dict[SourceKey, ItemSource] = {}
        self._expiries: list[tuple[float, str]] = []
        self._coming = 0
        self._made = itertools.count(1)
        self._ending: dict[int, str] = {}
        self._listeners: dict[str, set[asyncio.Event]] = {}
        self._recorder: Recorder | None = None
        self._looking: asyncio.Task[None] | None = None
        self._closed = False

    # Life

    async def start(self) -> None:
        """Go on with everything that has not ended."""
        self._recorder = Recorder(self, clock=self._clock, written=lambda _: None, freed=self._freed)
        for item in await self._store.waiting():
            self._take_in(item, None)
        self._looking = asyncio.create_task(self._look(), name="expire items")

    async def close(self) -> None:
        """Stop where things are. Idempotent."""
        self._closed = True
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        for source in self._sources.values():  # nothing begins any more; what has ended is still written
            self._lanes.withdraw(source.id)
            source.close()
        if self._recorder is not None:
            await self._recorder.close()
        self._sources.clear()

    # What callers ask

    async def submit(self, new: NewItem) -> ItemView:
        try:
            body = json.dumps(new.body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except ValueError:
            raise BadRequest("A number in the request is larger than JSON's readers can hold.") from None
        creation = None
        if new.idempotency_key is not None:
            what = json.dumps([new.path, new.launch_id, new.priority, new.expires_after_s, body])
            creation = Creation(new.owner, new.idempotency_key, hashlib.sha256(what.encode()).hexdigest())
            before = await self._store.recalled(creation)
            if before is not None:
                return await self.get(before.result_id, None)
        if new.launch_id is not None:
            self._lanes.check_launch(new.owner, new.launch_id)
        now = self._clock()
        expires_at = now + (new.expires_after_s or self._expires_after_s)
        item_id = ids.new_id(ids.ITEM_PREFIX, int(now * 1000), os.urandom(ids.RANDOM_BYTES))
        item = Waiting(item_id, new.owner, new.path, new.model, new.launch_id, new.priority, 0, 0, expires_at)
        # To its end also when the caller has gone: what is stored must be known here.
        return await asyncio.shield(self._accept(item, body, now, creation))

    async def _accept(self, item: Waiting, body: str, now: float, creation: Creation | None) -> ItemView:
        if len(self._waiting) + self._coming >= self._most_waiting:
            before = await self._store.recalled(creation)
            if before is None:
                raise QueueFull(f"{self._most_waiting} items wait already: try again later.", retry_after=10)
            return await self.get(before.result_id, None)
        self._coming += 1
        try:
            created = await self._store.create(item, body, now, creation)
        finally:
            self._coming -= 1
        if not created.again:
            self._take_in(item, body.encode())
        return await self.get(created.result_id, None)

    async def get(self, item_id: str, owner: str | None, *, wait_s: float = 0) -> ItemView:
        item = self._waiting.get(item_id)
        if wait_s > 0 and item is not None and owner in (None, item.owner):
            await self._wait(item_id, wait_s)
        found = await self._store.get(item_id)
        if found is None or (owner is not None and found.owner != owner):
            raise NotFound(f"There is no item {item_id!r}.", param="item_id")
        return self._live(found)

    async def list(
        self, owner: str | None, *, state: str | None, after: str | None, limit: int
    ) -> tuple[Sequence[ItemView], bool]:
        stored = "queued" if state == "in_progress" else state
        found: list[ItemView] = []
        while True:
            rows = await self._store.list(owner, stored, after, limit + 1)
            views = [self._live(row) for row in rows]
            found += [view for view in views if state is None or view.state == state]
            if len(rows) <= limit or len(found) > limit:
                return found[:limit], len(found) > limit
            after = rows[-1].id

    async def cancel(self, item_id: str, owner: str | None) -> ItemView:
        await self.get(item_id, owner)
        item = self._waiting.get(item_id)
        if item is not None:
            ending = self._end_now(item, "cancelled", "item_cancelled", "The item was cancelled.")
            await asyncio.shield(ending)
        return await self.get(item_id, owner)

    async def _wait(self, item_id: str, wait_s: float) -> None:
        over = asyncio.Event()
        listeners = self._listeners.setdefault(item_id, set())
        listeners.add(over)
        try:
            await asyncio.wait_for(over.wait(), wait_s)
        except TimeoutError:
            pass
        finally:
            listeners.discard(over)
            if not listeners:
                self._listeners.pop(item_id, None)

    def _live(self, view: ItemView) -> ItemView:
        item = self._waiting.get(view.id)
        if item is None:
            return view
        source = self._sources.get(_key(item))
        if source is None:  # all is being closed
            return view
        number = self._number_of[view.id]
        if source.is_out(number):
            return replace(view, state="in_progress", attempts=item.attempts)
        return replace(view, attempts=item.attempts, waits_for=self._lanes.waits_for(source.id))

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    # Inside

    def _take_in(self, item: Waiting, body: bytes | None) -> None:
        if self._closed:  # it is on disk, and the next start goes on with it
            return
        number = next(self._next)
        self._waiting[item.id] = item
        self._numbers[number] = item.id
        self._number_of[item.id] = number
        self._note_expiry(item)
        key = _key(item)
        source = self._sources.get(key)
        if source is None:
            source = self._sources[key] = ItemSource(
                f"items.{next(self._made):012d}",
                item.owner,
                self,
                priority=item.priority,
                deadline=item.expires_at,
                latency_s=self._latency_s,
                max_joined=self._max_joined,
            )
            source.ready = self._lanes.add(source, item.model or "", item.launch_id)
        source.add(number, item, body)

    def _note_expiry(self, item: Waiting) -> None:
        heappush(self._expiries, (item.expires_at, item.id))
        if len(self._expiries) > 2 * len(self._waiting) + FEW_EXPIRIES:  # of most it does not matter any more
            self._expiries = [(one.expires_at, one.id) for one in self._waiting.values()]
            heapify(self._expiries)

    async def body(self, number: int) -> bytes | None:
        """What the engine gets for an item; None: it has ended."""
        item_id = self._numbers.get(number)
        return None if item_id is None else await self._store.body(item_id)

    @property
    def may_take(self) -> bool:
        return self._recorder is not None and not self._recorder.full

    def item_ended(self, job: Job, ending: Ending) -> None:
        """Its record is on its way to the disk."""
        item_id = self._numbers.get(job.number)
        if item_id is None or self._recorder is None:
            return
        if isinstance(ending, Answered):
            made = output.answer_line(item_id, "", ending.status, ending.request_id, ending.body)
        else:
            made = output.Rendered(False, output.error_line(item_id, "", ending.code, ending.message))
        self._ending[job.number] = "completed" if made.ok else "failed"
        self._tally.ended(ok=made.ok, attempts=job.executions, isolated=outcomes.isolated(ending))
        self._recorder.add(Record(job.number, made.ok, job.executions, made.data))

    def item_noted(self, job: Job) -> None:
        item_id = self._numbers.get(job.number)
        if item_id is not None and self._recorder is not None:
            self._waiting[item_id] = replace(self._waiting[item_id], attempts=job.attempts, deaths=job.deaths)
            self._recorder.note(job.number, job.attempts, job.deaths)

    # As the recorder's ledger

    async def finish(self, records: Sequence[Record], now: float) -> Totals:
        """Store what has ended, then tell those who wait for it."""
        known = [record for record in records if record.number in self._numbers]
        ended = [Ended(self._numbers[r.number], self._ending[r.number], r.attempts, r.data) for r in known]
        await self._store.end(ended, now)
        for record in known:
            if record.number in self._numbers:  # not cancelled meanwhile
                self._forget(record.number)
        return _NOTHING

    async def note(self, troubles: Sequence[tuple[int, int, int]]) -> None:
        known = [(self._numbers[n], attempts, deaths) for n, attempts, deaths in troubles if n in self._numbers]
        await self._store.note(known)

    def _forget(self, number: int) -> None:
        item_id = self._numbers.pop(number)
        item = self._waiting.pop(item_id)
        del self._number_of[item_id]
        self._ending.pop(number, None)
        for over in self._listeners.get(item_id, ()):
            over.set()
        key = _key(item)
        source = self._sources[key]
        source.forget(number)
        if source.empty:
            del self._sources[key]
            self._lanes.withdraw(source.id)
            source.close()

    def _freed(self) -> None:
        for source in self._sources.values():
            source.ready()

    async def _end_now(self, item: Waiting, state: str, code: str, message: str) -> None:
        """It ends without an answer, whatever is being done for it."""
        data = output.error_line(item.id, "", code, message)
        await self._store.end([Ended(item.id, state, item.attempts, data)], self._clock())
        number = self._number_of.get(item.id)
        if number is not None:
            self._lanes.drop(self._sources[_key(item)].id, number)
            self._forget(number)

    async def _look(self) -> None:
        """End what has waited for too long."""
        while True:
            await asyncio.sleep(until_pulse(LOOK_S, time.monotonic()))
            now = self._clock()
            while self._expiries and self._expiries[0][0] <= now:
                due = heappop(self._expiries)
                item = self._waiting.get(due[1])
                try:
                    if item is not None:
                        await self._end_now(item, "expired", "item_expired", "The item was not done in its time.")
                except ApiError as error:
                    log.error("Items that are over time cannot be ended: %s", error.message)
                    heappush(self._expiries, due)
                    break


def _key(item: Waiting) -> SourceKey:
    """Items of one priority stand together: they go before batches of a lower one, and behind those of a higher."""
    return item.owner, item.model if item.launch_id is None else None, item.launch_id, item.priority
