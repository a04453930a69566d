"""Batches for those who ask: accepted, looked up, steered, forgotten.

Invariants: what was accepted is on disk, its input with it (a link of its own, so that nobody can delete it from under
the batch); at most ``MOST_OPEN`` batches are worked on at a time, the others wait for their turn, fairly between keys,
and get the place of one that stands still for long; changes of one batch are made one after the other; a key sees its
own. Must not know: HTTP, lines, engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from vllm_bootstrap.batches import acceptance, reading
from vllm_bootstrap.batches.blobs import Folder
from vllm_bootstrap.batches.jobs import TERMINAL, Event
from vllm_bootstrap.batches.run import Run
from vllm_bootstrap.batches.run_deps import RunDeps
from vllm_bootstrap.batches.store import Creation
from vllm_bootstrap.batches.types import BatchEvent, BatchRow, BatchView, NewBatch, Progress
from vllm_bootstrap.errors import (
    ApiError,
    BadRequest,
    Conflict,
    Draining,
    NotFound,
    StorageFailed,
    TooManyRequests,
)

T = TypeVar("T")
log = logging.getLogger(__name__)


MOST_OPEN = 64
LOOKS_S = 0.5
LOOK_S = 5.0
PATIENCE_S = 60.0
"""A batch that stands still for so long gives its place to one that waits, and waits itself."""
PURPOSE = "batch"


class BatchService:
    """``most_unfinished`` batches of all keys together may be unfinished. Belongs to one event loop."""

    def __init__(self, deps: RunDeps, *, most_unfinished: int) -> None:
        self._deps = deps
        self._most_unfinished = most_unfinished
        self._runs: dict[str, Run] = {}
        self._waiting: dict[str, BatchRow] = {}
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._accepting = asyncio.Lock()
        self._folder = Folder(deps.folder, reserve_bytes=0)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._idle_since: dict[str, float] = {}
        self._aside: dict[str, tuple[int, str]] = {}  # how often it gave its place away, and why it stood still
        self._looking: asyncio.Task[None] | None = None
        self._closed = False

    # Life

    async def start(self) -> None:
        """Go on with everything that has not ended."""
        rows = await self._deps.store.unfinished()
        self._waiting = {row.id: row for row in rows}
        self._open_more()
        self._looking = asyncio.create_task(self._look(), name="give places to batches")

    async def close(self) -> None:
        """Stop where things are; a later start goes on. Idempotent."""
        self._closed = True
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await asyncio.gather(*(run.close() for run in self._runs.values()))
        self._runs.clear()
        self._folder.close()

    @property
    def unfinished(self) -> int:
        return len(self._runs) + len(self._waiting)

    def states(self) -> Counter[str]:
        """Those that have not ended by state, and how many of them are ``paused``."""
        rows = [*(run.row for run in self._runs.values()), *self._waiting.values()]
        counts = Counter(row.phase.state.value for row in rows if row.phase.state not in TERMINAL)
        counts["paused"] = sum(row.paused for row in rows if row.phase.state not in TERMINAL)
        return counts

    # Creating

    async def create(self, new: NewBatch) -> BatchView:
        creation = None
        if new.idempotency_key is not None:
            creation = Creation(new.owner, new.idempotency_key, acceptance.fingerprint(new))
            before = await self._deps.store.recalled(creation)
            if before is not None:
                return await self.get(before.result_id, None)
        if new.launch_id is not None:
            self._deps.lanes.check_launch(new.owner, new.launch_id)
        file, blob = await self._deps.files.open(new.input_file_id, new.owner)
        if file.purpose != PURPOSE:
            raise BadRequest(
                f"The file {file.id} was uploaded for {file.purpose!r}: upload it with purpose {PURPOSE!r}.",
                param="input_file_id",
            )
        now = self._deps.clock()
        row = acceptance.row_of(new, now)
        # To its end also when the caller has gone: what is stored must be known here.
        return await asyncio.shield(self._accept(row, blob, creation))

    async def _accept(self, row: BatchRow, blob: Path, creation: Creation | None) -> BatchView:
        """The input's link is on disk before the row: a batch that is known has its input."""
        store, most = self._deps.store, self._most_unfinished
        async with self._accepting:
            if self.unfinished >= most:
                before = await store.recalled(creation)
                if before is None:
                    raise TooManyRequests(f"{most} batches have not ended yet: wait for some.", retry_after=60)
                return await self.get(before.result_id, None)
            await asyncio.to_thread(acceptance.take, self._folder, blob, self._deps.input(row.id))
            try:
                created = await store.create(row, creation)
            except StorageFailed:  # nobody knows whether the row is there: the next start looks
                raise
            except BaseException:
                await asyncio.to_thread(self._deps.remove, row.id)
                raise
            if created.again:
                await asyncio.to_thread(self._deps.remove, row.id)
                return await self.get(created.result_id, None)
            self._waiting[row.id] = row
            self._open_more()
            return self._view(row)

    # Looking

    async def get(self, batch_id: str, owner: str | None) -> BatchView:
        row = await self._row(batch_id, owner)
        run = self._runs.get(batch_id)
        if run is not None:
            await run.counted()
            row = run.row
        return self._view(row)

    async def list(self, owner: str | None, *, after: str | None, limit: int) -> tuple[Sequence[BatchView], bool]:
        rows = await self._deps.store.list(owner, after, limit + 1)
        return [self._view(row) for row in rows[:limit]], len(rows) > limit

    async def events(self, batch_id: str, owner: str | None, *, after: int, limit: int) -> Sequence[BatchEvent]:
        await self._row(batch_id, owner)
        return await self._deps.store.events(batch_id, after, limit)

    async def watch(self, batch_id: str, owner: str | None) -> AsyncGenerator[BatchView, None]:
        changed = asyncio.Event()
        watchers = self._watchers.setdefault(batch_id, set())
        watchers.add(changed)
        try:
            while True:
                changed.clear()
                view = await self.get(batch_id, owner)
                yield view
                if view.row.phase.state in TERMINAL:
                    return
                with contextlib.suppress(TimeoutError):  # why it waits changes without a word
                    await asyncio.wait_for(changed.wait(), LOOK_S)
                await asyncio.sleep(LOOKS_S)  # what changes all the time is told twice a second
        finally:
            watchers.discard(changed)
            if not watchers:
                self._watchers.pop(batch_id, None)

    async def partial(self, batch_id: str, owner: str | None, *, failed: bool) -> AsyncGenerator[bytes, None]:
        async for piece in reading.so_far(self._deps, await self._row(batch_id, owner), failed=failed):
            yield piece

    # Steering

    async def cancel(self, batch_id: str, owner: str | None) -> BatchView:
        async def work() -> None:
            run = await self._run(batch_id, owner)
            if run is not None:
                await run.change(Event.CANCEL_REQUESTED)

        await self._alone(batch_id, work())
        return await self.get(batch_id, owner)

    async def pause(self, batch_id: str, owner: str | None) -> BatchView:
        return await self._steer(batch_id, owner, lambda run: run.pause(True))

    async def resume(self, batch_id: str, owner: str | None) -> BatchView:
        return await self._steer(batch_id, owner, lambda run: run.pause(False))

    async def set_priority(self, batch_id: str, owner: str | None, priority: int) -> BatchView:
        return await self._steer(batch_id, owner, lambda run: run.set_priority(priority))

    async def _steer(self, batch_id: str, owner: str | None, change: Callable[[Run], Awaitable[None]]) -> BatchView:
        async def work() -> None:
            run = self._waiting_run(await self._row(batch_id, owner))
            if run is not None:
                await self._steer_waiting(run, change)
                return
            run = await self._run(batch_id, owner)
            if run is None:
                state = (await self._row(batch_id, owner)).phase.state.value
                raise Conflict(f"The batch has ended: it is {state}.")
            await change(run)

        await self._alone(batch_id, work())
        return await self.get(batch_id, owner)

    def _waiting_run(self, row: BatchRow) -> Run | None:
        """For one that waits for its turn: what can change it, without beginning with it."""
        if self._closed or row.id not in self._waiting:
            return None
        run = self._runs[row.id] = Run(self._waiting.pop(row.id), self._deps, lambda: self._tell(row.id))
        return run

    async def _steer_waiting(self, run: Run, change: Callable[[Run], Awaitable[None]]) -> None:
        """It goes on waiting: otherwise whoever steers a thousand of them has a thousand begun with."""
        try:
            await change(run)
        finally:
            self._runs.pop(run.row.id, None)
            self._waiting[run.row.id] = run.row
            self._open_more()

    async def retry(self, batch_id: str, owner: str | None) -> BatchView:
        await self._alone(batch_id, self._retry(batch_id, owner))
        return await self.get(batch_id, owner)

    async def _retry(self, batch_id: str, owner: str | None) -> None:
        row = await self._row(batch_id, owner)
        if row.phase.state not in TERMINAL or batch_id in self._runs:
            raise Conflict("The batch has not ended: what failed can be run again when it has.")
        if self._closed:
            raise Draining("The daemon is stopping", retry_after=5)
        run = Run(row, self._deps, lambda: self._tell(batch_id))
        self._runs[batch_id] = run
        try:
            await run.retry()
        except BaseException:
            del self._runs[batch_id]
            raise
        run.start(self._over)

    async def delete(self, batch_id: str, owner: str | None) -> None:
        await self._row(batch_id, owner)
        if not await self._alone(batch_id, self._forget(batch_id)):
            raise Conflict("The batch has not ended: cancel it first.")

    async def _forget(self, batch_id: str) -> bool:
        row = await self._deps.store.get(batch_id)
        if batch_id in self._runs or (row is not None and row.phase.state not in TERMINAL):
            return False
        await self._deps.store.delete(batch_id)
        await asyncio.to_thread(self._deps.remove, batch_id)
        return True

    async def _alone(self, batch_id: str, work: Coroutine[Any, Any, T]) -> T:
        """While nobody else changes that batch, and to its end also when the caller has gone."""
        lock = self._locks.get(batch_id)
        if lock is None:
            lock = self._locks[batch_id] = asyncio.Lock()

        async def locked(lock: asyncio.Lock) -> T:
            async with lock:
                return await work

        return await asyncio.shield(locked(lock))

    async def sweep(self, before: float) -> None:
        """Forget batches that ended before a time, and what lies around of batches that are not known."""
        for batch_id in await self._deps.store.ended_before(before):
            await self._alone(batch_id, self._forget(batch_id))

    async def sweep_strays(self) -> None:
        """Remove what is on disk of batches that nobody knows. At start, before anything is accepted."""
        names = await asyncio.to_thread(lambda: {path.name.split(".")[0] for path in self._deps.folder.iterdir()})
        for batch_id in names:
            if await self._deps.store.get(batch_id) is None:
                await asyncio.to_thread(self._deps.remove, batch_id)

    # Inside

    async def _row(self, batch_id: str, owner: str | None) -> BatchRow:
        run = self._runs.get(batch_id)
        row = run.row if run is not None else await self._deps.store.get(batch_id)
        if row is None or (owner is not None and row.owner != owner):
            raise NotFound(f"There is no batch {batch_id!r}.", param="batch_id")
        return row

    async def _run(self, batch_id: str, owner: str | None) -> Run | None:
        """What works on it; one is made for a batch that waits for its turn. None: it has ended."""
        row = await self._row(batch_id, owner)
        if self._closed:
            raise Draining("The daemon is stopping", retry_after=5)
        if batch_id not in self._runs and batch_id in self._waiting:
            self._open(self._waiting.pop(batch_id))
        run = self._runs.get(batch_id)
        return None if run is None or row.phase.state in TERMINAL else run

    def _view(self, row: BatchRow) -> BatchView:
        run = self._runs.get(row.id)
        if run is not None:
            return run.view()
        waits = None
        if row.id in self._waiting:
            _, reason = self._aside.get(row.id, (0, ""))
            waits = f"{reason}; others have their turn meanwhile" if reason else "other batches come first"
        return BatchView(row, Progress(waits_for=waits))

    def _open_more(self) -> None:
        """Begin with batches that wait: of the key that has the fewest under way, those first that gave their place
        away the least often, by priority, deadline, age."""
        while self._waiting and len(self._runs) < MOST_OPEN and not self._closed:
            busy = Counter(run.row.owner for run in self._runs.values())
            row = min(self._waiting.values(), key=lambda one: self._rank(one, busy))
            self._open(self._waiting.pop(row.id))

    def _rank(self, row: BatchRow, busy: Counter[str]) -> tuple[bool, int, int, int, float, str]:
        turns, _ = self._aside.get(row.id, (0, ""))
        return row.paused, busy[row.owner], turns, -row.priority, row.expires_at, row.id

    async def _look(self) -> None:
        """Now and then, see who stands still."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._rotate(asyncio.get_running_loop().time())
            except ApiError as error:
                log.error("Batches cannot change places: %s", error.message)

    async def _rotate(self, now: float) -> None:
        """Those that stand still for long give their places away, as far as others want them."""
        idle = {batch_id for batch_id, run in self._runs.items() if run.idle}
        self._idle_since = {batch_id: self._idle_since.get(batch_id, now) for batch_id in idle}
        wanted = sum(not row.paused for row in self._waiting.values()) - max(0, MOST_OPEN - len(self._runs))
        still = [batch_id for batch_id, since in self._idle_since.items() if now - since >= PATIENCE_S]
        still.sort(key=self._idle_since.__getitem__)
        for batch_id in (still or self._at_once())[: max(0, wanted)]:
            await self._alone(batch_id, self._set_aside(batch_id))
        self._open_more()

    def _at_once(self) -> Sequence[str]:
        """As many that stand still as there are keys that have no place, of keys that have more than one."""
        busy = Counter(run.row.owner for run in self._runs.values())
        without = {row.owner for row in self._waiting.values() if not row.paused} - busy.keys()
        spare = [batch_id for batch_id in self._idle_since if busy[self._runs[batch_id].row.owner] > 1]
        return spare[: len(without)]

    async def _set_aside(self, batch_id: str) -> None:
        run = self._runs.get(batch_id)
        if run is None or not run.idle:
            return
        turns, _ = self._aside.get(batch_id, (0, ""))
        self._aside[batch_id] = turns + 1, run.view().progress.waits_for or ""
        await run.close()
        row = await self._deps.store.get(batch_id)
        del self._runs[batch_id]
        if row is not None and row.phase.state not in TERMINAL:
            self._waiting[batch_id] = row
        self._tell(batch_id)

    def _open(self, row: BatchRow) -> None:
        run = self._runs[row.id] = Run(row, self._deps, lambda: self._tell(row.id))
        run.start(self._over)

    def _over(self, run: Run) -> None:
        """Nothing more is done for it. One that stands still, not having ended, stays to be looked at."""
        if run.row.phase.state in TERMINAL and self._runs.get(run.row.id) is run:
            del self._runs[run.row.id]
            self._aside.pop(run.row.id, None)
            self._tell(run.row.id)
            self._open_more()

    def _tell(self, batch_id: str) -> None:
        for watcher in self._watchers.get(batch_id, ()):
            watcher.set()
