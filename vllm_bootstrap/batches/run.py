"""One batch from its acceptance to its end: judged, worked off, its files written.

Invariants: one task does the work of a batch, and every change of its state goes through ``change``, one at a time:
decided by ``jobs``, on disk before anybody is told. A line is finished when its record is on disk. What is interrupted
at any point is done again from what is on disk, and comes to the same.

Must not know: HTTP, how lines reach an engine, who may ask for what.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from vllm_bootstrap import ids
from vllm_bootstrap.batches import output
from vllm_bootstrap.batches.files import OUTPUT
from vllm_bootstrap.batches.indexer import IndexingFailed, Outcome
from vllm_bootstrap.batches.jobs import RETRYABLE, TERMINAL, Event, Phase, State, Why, advance
from vllm_bootstrap.batches.linestore import LineStore, Totals
from vllm_bootstrap.batches.progress import Pace
from vllm_bootstrap.batches.run_deps import RunDeps
from vllm_bootstrap.batches.types import BatchRow, BatchView, Counts, LineError, Progress
from vllm_bootstrap.batches.windows import window_s
from vllm_bootstrap.batches.working import Working
from vllm_bootstrap.db import CannotOpen, Damaged
from vllm_bootstrap.errors import ApiError, Conflict, StorageFailed

log = logging.getLogger(__name__)

AGAIN_S = 1.0
LOOK_S, COUNTED_WITHIN_S = 5.0, 0.5
AFTER_BUG_S = 30.0
KEEP_COUNTS_S = 10.0
"""So old at most are the counts that a batch is shown with right after a restart, until its lines are open."""
INDEX_AGAIN_S = (0.2, 1.0, 5.0)
"""Waits before an input is looked through again after the helper came to no end: killed for memory, for example."""
REASONS = {
    State.CANCELLING: ("batch_cancelled", "The batch was cancelled before this line was finished."),
    State.FINALIZING: ("batch_expired", "The batch's completion window closed before this line was finished."),
}


class Run:
    """A batch that has not ended. ``start`` once; ``close`` when the daemon stops. ``row`` is what is on disk;
    ``changed`` is called after everything that somebody may want to see."""

    def __init__(self, row: BatchRow, deps: RunDeps, changed: Callable[[], None]) -> None:
        self.row = row
        self._deps, self._changed = deps, changed
        self._deadline = asyncio.get_running_loop().time() + max(0.0, row.expires_at - deps.clock())
        self._lock = asyncio.Lock()
        self._wake, self._counted = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._lines: LineStore | None = None
        self._working: Working | None = None
        self._pace = Pace()
        self._counts, self._usage, self._retried = row.counts, row.usage, 0
        self._kept_at = asyncio.get_running_loop().time()
        self._judged: tuple[int, int] | None = None
        self._problem: str | None = None

    # For others

    def start(self, over: Callable[[Run], None]) -> None:
        """Go on with it from where it is. ``over`` is called when nothing more is done for it."""
        self._task = asyncio.create_task(self._run(), name=f"batch {self.row.id}")
        self._task.add_done_callback(lambda _: over(self))

    async def close(self) -> None:
        """Stop where it is: what is on disk is enough to go on later."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            with contextlib.suppress(ApiError):  # it is for show
                await self._keep_counts()

    @property
    def idle(self) -> bool:
        """Whether its lines are to be run and none is under way."""
        return self.row.phase.state is State.IN_PROGRESS and self._working is not None and not self._working.in_flight

    async def counted(self) -> None:
        """Return when its counts are known: a batch that goes on after a restart is looked through first."""
        if self.row.phase.state is State.IN_PROGRESS:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._counted.wait(), COUNTED_WITHIN_S)

    def view(self) -> BatchView:
        row = replace(self.row, counts=self._counts, usage=self._usage)
        now = asyncio.get_running_loop().time()
        waits_for = self._waits_for()
        running = row.phase.state is State.IN_PROGRESS and waits_for is None
        judged, size = self._judged or (None, None)
        progress = Progress(
            in_flight=self._working.in_flight if self._working is not None else 0,
            lines_per_s=self._pace.rate(now) if running else None,
            eta_s=self._pace.eta_s(now, row.counts.left, running=running) if row.counts.total else None,
            waits_for=waits_for,
            retried=self._retried,
            validated_bytes=judged,
            input_bytes=size,
        )
        return BatchView(row, progress)

    def _waits_for(self) -> str | None:
        if self._problem is not None or self.row.phase.state is not State.IN_PROGRESS:
            return self._problem
        if self.row.paused:
            return "it is paused"
        return self._working.waits_for() if self._working is not None else None

    async def retry(self) -> None:
        """Before ``start``: failed lines of an ended batch are to be run again. Raises ``Conflict`` without any."""
        if self.row.phase.state not in RETRYABLE or not self._deps.lines(self.row.id).exists():
            raise Conflict("No line of this batch can be run again.")
        try:
            dropped = await (lines := await self._open()).forget_failed()
            self._note(await lines.totals())
            if not dropped and not self._counts.left:
                raise Conflict("No line of this batch has failed.")
            before, now = self.row, self._deps.clock()
            expires_at = now + window_s(before.completion_window)
            self._deadline = asyncio.get_running_loop().time() + (expires_at - now)
            detail = {"lines": dropped}
            await self.change(
                Event.RETRY_REQUESTED,
                detail,
                expires_at=expires_at,
                paused=False,
                output_file_id=None,
                error_file_id=None,
            )
        except CannotOpen as exc:
            raise Conflict(f"The lines of this batch cannot be run again: {exc}") from exc
        finally:
            await self._close_lines()
        for file_id in filter(None, (before.output_file_id, before.error_file_id)):
            try:
                await self._deps.files.delete(file_id, None)
            except ApiError as error:  # it is gone already, or in nobody's way if it stays
                log.info("The file %s of batch %s was not deleted: %s", file_id, self.row.id, error.message)

    async def pause(self, paused: bool) -> None:
        await self._wish("paused" if paused else "resumed", {}, paused=paused)
        if self._working is not None:
            self._working.pause(paused)
        self._pace.restart(asyncio.get_running_loop().time())
        self._changed()

    async def set_priority(self, priority: int) -> None:
        await self._wish("priority_changed", {"priority": priority}, priority=priority)
        if self._working is not None:
            self._working.change(priority)
        self._changed()

    async def _wish(self, event: str, detail: Mapping[str, Any], **fields: Any) -> None:
        async with self._lock:
            if self.row.phase.state in TERMINAL:
                raise Conflict(f"The batch has ended: it is {self.row.phase.state.value}.")
            row = replace(self.row, **fields)
            if row != self.row:
                await self._store(row, event, self.row.phase, detail)

    # Changes of state

    async def change(
        self, event: Event, detail: Mapping[str, Any] | None = None, *, only: State | None = None, **fields: Any
    ) -> None:
        """Let ``event`` happen. ``fields`` are what else changes in the row. ``only``: in that state, else not."""
        async with self._lock:
            before = self.row.phase
            if only not in (None, before.state):
                return
            phase = advance(before, event)
            if phase == before and not fields:
                return
            now = self._deps.clock()
            stamps = dict(self.row.stamps)
            if phase != before:
                stamps[phase.state.value] = now
                if phase.state in REASONS:
                    fields |= {"output_file_id": self._new_file_id(now), "error_file_id": self._new_file_id(now)}
            fields = {"counts": self._counts, "usage": self._usage} | fields
            row = replace(self.row, phase=phase, stamps=stamps, **fields)
            await self._store(row, event.value, before, detail)
        self._wake.set()
        self._changed()

    async def _store(self, row: BatchRow, event: str, before: Phase, detail: Mapping[str, Any] | None = None) -> None:
        ends = row.phase.state in TERMINAL and before.state not in TERMINAL
        tells = ends and row.webhook is not None
        also = (lambda conn: self._deps.tell(conn, row)) if tells else None
        await self._deps.store.change(row, self._deps.clock(), event, before, detail or {}, also)
        self.row = row
        if tells:
            self._deps.told()

    def _new_file_id(self, now: float) -> str:
        return ids.new_id(ids.FILE_PREFIX, int(now * 1000), os.urandom(ids.RANDOM_BYTES))

    # The work

    async def _run(self) -> None:
        try:
            while self.row.phase.state not in TERMINAL:
                try:
                    await self._step()
                    self._problem = None
                except StorageFailed:
                    raise
                except (ApiError, CannotOpen) as error:  # a full disk, for the most part: go on when there is room
                    if self._problem != str(error):
                        log.error("Batch %s waits: %s", self.row.id, error)
                    self._problem = str(error)
                    self._changed()
                    await asyncio.sleep(AGAIN_S)
                except Exception:
                    log.exception("Batch %s was stopped by an error, and goes on in a while", self.row.id)
                    self._problem = "an error in the daemon stopped it, the log says more: it is tried again"
                    self._changed()
                    await asyncio.sleep(AFTER_BUG_S)
        except StorageFailed as error:
            self._problem = error.message
            log.critical("Batch %s stands still until the daemon is started anew: %s", self.row.id, error.message)
        finally:
            await self._close_lines()
            self._changed()

    async def _step(self) -> None:
        steps: Mapping[State, Callable[[], Awaitable[None]]] = {
            State.VALIDATING: self._judge,
            State.IN_PROGRESS: self._work,
            State.FINALIZING: self._finish,
            State.CANCELLING: self._finish,
        }
        try:
            await steps[self.row.phase.state]()
        except Damaged as exc:
            log.error("Batch %s: %s", self.row.id, exc)
            await self.change(Event.STORAGE_LOST, errors=(LineError("storage_lost", str(exc)),))

    async def _until(self, task: asyncio.Task[Any], state: State) -> bool:
        """Wait for ``task`` as long as the state stays. False: it has changed, the task was cancelled."""
        while not task.done() and self.row.phase.state is state:
            self._wake.clear()
            waking = asyncio.ensure_future(self._wake.wait())
            try:
                await asyncio.wait({task, waking}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waking.cancel()
        if task.done() and self.row.phase.state is state:
            return True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return False

    async def _judge(self) -> None:
        """Validating: every line is looked at before any is run."""
        task = asyncio.create_task(self._index_in_turn())
        try:
            if not await self._until(task, State.VALIDATING):
                return
            try:
                verdict = task.result()
            except IndexingFailed as exc:
                log.error("Batch %s could not be validated: %s", self.row.id, exc)
                error = LineError("validation_failed", f"The input could not be checked: {exc}")
                verdict = Outcome(errors=[error], error_count=1)
        finally:
            self._judged = None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if verdict.errors:
            await self.change(Event.INPUT_REFUSED, {"errors": verdict.error_count}, errors=tuple(verdict.errors))
            await asyncio.to_thread(self._deps.remove, self.row.id)
        else:
            self._counts = Counts(verdict.lines)
            await self.change(Event.INPUT_ACCEPTED, {"lines": verdict.lines}, models=dict(verdict.models))

    async def _index_in_turn(self) -> Outcome:
        async with self._deps.judging:
            return await self._index()

    async def _index(self) -> Outcome:
        row, deps = self.row, self._deps
        source = deps.input(row.id)
        if not source.exists():
            raise Damaged(f"{source} is missing: the input of this batch is lost")
        size = source.stat().st_size

        def progress(done: int, _lines: int) -> None:
            self._judged = done, size
            self._changed()

        task = deps.task(row, source, deps.lines(row.id))
        for wait_s in INDEX_AGAIN_S:
            try:
                return await deps.index(task, progress)
            except IndexingFailed as exc:
                log.warning("Batch %s is validated again: %s", row.id, exc)
                await asyncio.sleep(wait_s)
        return await deps.index(task, progress)

    async def _open(self) -> LineStore:
        if self._lines is None:
            row = self.row
            self._lines = await asyncio.to_thread(LineStore.open, self._deps.lines(row.id), self._deps.input(row.id))
            self._note(await self._lines.totals())
            self._counted.set()
        return self._lines

    async def _close_lines(self) -> None:
        lines, self._lines = self._lines, None
        if lines is not None:
            await asyncio.to_thread(lines.close)

    # In progress

    async def _work(self) -> None:
        """Every line without a record is run, until there is none, or no more time, or no wish."""
        lines = await self._open()  # first: meanwhile the row may change
        working = self._working = Working(self.row, self._deps, lines, self._note)
        try:
            await working.start()
            await self._until_over(working)
            working.stop()
            if self.row.phase.state is not State.IN_PROGRESS:
                await working.drain()
        finally:
            self._working = None
            await working.close()

    async def _until_over(self, working: Working) -> None:
        loop = asyncio.get_running_loop()
        while self.row.phase.state is State.IN_PROGRESS:
            if working.failed is not None:
                raise working.failed
            if self._counts.left == 0:
                await self.change(Event.LINES_FINISHED, only=State.IN_PROGRESS)
            elif loop.time() >= self._deadline:
                working.stop()
                await working.drain()
                await self.change(Event.WINDOW_CLOSED)
            else:
                if loop.time() - self._kept_at >= KEEP_COUNTS_S:
                    await self._keep_counts()
                    continue
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), min(LOOK_S, self._deadline - loop.time()))

    async def _keep_counts(self) -> None:
        self._kept_at = asyncio.get_running_loop().time()
        if self.row.phase.state is State.IN_PROGRESS and self._counts != self.row.counts:
            await self._deps.store.note(self.row.id, self._counts, self._usage)

    def _note(self, totals: Totals) -> None:
        self._counts, self._usage, self._retried = totals
        self._pace.note(asyncio.get_running_loop().time(), self._counts.completed + self._counts.failed)
        if self._counts.left == 0:
            self._wake.set()
        self._changed()

    # The end

    async def _finish(self) -> None:
        """Cancelling and finalizing: every line gets its record, and the records their files."""
        row, deps = self.row, self._deps
        if not row.models and not deps.lines(row.id).exists():  # cancelled before its lines were known
            await self.change(Event.FILES_WRITTEN, output_file_id=None, error_file_id=None)
            await asyncio.to_thread(deps.remove, row.id)
            return
        lines = await self._open()
        if row.phase.state is State.CANCELLING or row.phase.why is Why.EXPIRED:
            self._note(await lines.fail_rest(*REASONS[row.phase.state], deps.clock()))
        made = await self._write(lines, row.output_file_id, ok=True)
        wrong = await self._write(lines, row.error_file_id, ok=False)
        await self.change(Event.FILES_WRITTEN, output_file_id=made, error_file_id=wrong)
        await self._close_lines()
        if not self._counts.failed:  # nothing is left that could be run again
            await asyncio.to_thread(deps.remove, row.id)

    async def _write(self, lines: LineStore, file_id: str | None, *, ok: bool) -> str | None:
        """One of the two files; None where it would be empty."""
        row = self.row
        if not (self._counts.completed if ok else self._counts.failed):
            return None
        name = f"{row.id}_{'output' if ok else 'error'}.jsonl"
        file = self._deps.files.receive(row.owner, OUTPUT, name, row.output_expires_after_s, file_id=file_id)
        try:
            await output.write_file(lines, file, ok=ok)
            return (await file.commit()).id
        finally:
            await file.abort()
