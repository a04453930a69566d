"""Records on their way to the disk: collected while the one before is written, then written together.

Invariants: a record leaves memory when it is committed and not before; one write is under way at a time, and whatever
came meanwhile goes with the next (that is the group commit). While more than ``MOST_WAITING`` records or ``MOST_BYTES``
wait, ``full`` says so and nothing new should be begun. A full disk is waited for; a failed one ends it, with an error
that is shown and nothing claimed.

Must not know: where lines come from, states of batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_bootstrap.batches.linestore import Totals
from vllm_bootstrap.batches.types import Record
from vllm_bootstrap.errors import ApiError, StorageFailed

log = logging.getLogger(__name__)

MOST_WAITING, MOST_BYTES = 2000, 64 * 1024**2
ENOUGH = 64
AGAIN_S = 1.0
LAST_S = 2.0
"""How long a stop waits for the disk to take what is finished."""


class Ledger(Protocol):
    """Where they are written."""

    async def finish(self, records: Sequence[Record], now: float) -> Totals: ...

    async def note(self, troubles: Sequence[tuple[int, int, int]]) -> None: ...


class Recorder:
    """``written(totals)`` is called after each write, ``freed`` when there is room again after there was none. A write
    waits ``gather_s`` for company, unless ``ENOUGH`` records are there: engines answer in waves, and each write costs
    the same whatever is in it."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        clock: Callable[[], float],
        written: Callable[[Totals], None],
        freed: Callable[[], None],
        gather_s: float = 0.0,
    ) -> None:
        self._ledger, self._clock, self._written, self._freed = ledger, clock, written, freed
        self._gather_s = gather_s
        self._hurry = asyncio.Event()
        self._records: list[Record] = []
        self._troubles: dict[int, tuple[int, int]] = {}
        self._bytes = 0
        self._something = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task = asyncio.create_task(self._run(), name="write records")
        self.problem: str | None = None
        self.failed: StorageFailed | None = None

    @property
    def full(self) -> bool:
        return len(self._records) >= MOST_WAITING or self._bytes >= MOST_BYTES or self.problem is not None

    def add(self, record: Record) -> None:
        self._records.append(record)
        self._bytes += len(record.data)
        self._idle.clear()
        self._something.set()

    def note(self, line: int, attempts: int, deaths: int) -> None:
        """Remember what was tried of a line that goes on."""
        self._troubles[line] = attempts, deaths
        self._idle.clear()
        self._something.set()

    async def drain(self) -> None:
        """Return when everything is on disk. Raises ``StorageFailed``."""
        self._hurry.set()
        try:
            await self._idle.wait()
        finally:
            self._hurry.clear()
        if self.failed is not None:
            raise self.failed

    async def close(self) -> None:
        """Stop. What the disk does not take in a moment is lost, as in a crash. Idempotent."""
        if self.problem is None and not self._task.done():
            with contextlib.suppress(TimeoutError, StorageFailed):
                await asyncio.wait_for(self.drain(), LAST_S)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            await self._write_forever()
        except Exception as exc:
            log.exception("Records of a batch cannot be written")
            self._fail(StorageFailed(f"An error in the daemon keeps records from being written: {exc!r}"))

    def _fail(self, error: StorageFailed) -> None:
        self.failed, self.problem = error, error.message
        self._idle.set()

    async def _write_forever(self) -> None:
        while True:
            await self._something.wait()
            if self._gather_s and len(self._records) < ENOUGH:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), self._gather_s)
            self._something.clear()
            was_full = self.full
            records, self._records = self._records, []
            troubles, self._troubles = self._troubles, {}
            size, self._bytes = self._bytes, 0
            try:
                if troubles:
                    await self._ledger.note([(line, *what) for line, what in troubles.items()])
                totals = await self._ledger.finish(records, self._clock()) if records else None
            except ApiError as error:
                self._records = records + self._records
                self._troubles = troubles | self._troubles
                self._bytes += size
                if isinstance(error, StorageFailed):
                    self._fail(error)
                    return
                if self.problem is None:
                    log.error("Records of a batch wait for the disk: %s", error.message)
                self.problem = error.message
                self._something.set()
                await asyncio.sleep(AGAIN_S)
                continue
            was_full = was_full or self.problem is not None
            self.problem = None
            if totals is not None:
                self._written(totals)
            if not self._something.is_set():
                self._idle.set()
            if was_full:
                self._freed()
