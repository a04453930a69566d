"""What all batches share while they run: stores, lanes, folders, clocks. No behaviour of its own."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vllm_bootstrap.batches.files import FileStore
from vllm_bootstrap.batches.indexer import OnProgress, index
from vllm_bootstrap.batches.indexing import Outcome, Task
from vllm_bootstrap.batches.store import BatchStore
from vllm_bootstrap.batches.types import BatchRow
from vllm_bootstrap.batches.work import Source
from vllm_bootstrap.tallies import BatchTally

Index = Callable[[Task, OnProgress | None], Awaitable[Outcome]]


class Lanes(Protocol):
    """What carries lines to engines."""

    def add(self, source: Source, model: str, launch_id: str | None) -> Callable[[], None]:
        """Carry its jobs from now on. Returns what it calls when it has something to take again."""

    def check_launch(self, owner: str, launch_id: str) -> None:
        """Raises ``NotFound`` or ``LaunchNotReady`` for a launch that lines of this key can never go to."""

    def withdraw(self, source_id: str) -> None: ...
    def pause(self, source_id: str) -> None: ...
    def resume(self, source_id: str) -> None: ...
    def change(self, source_id: str, priority: int) -> None: ...
    def drop(self, source_id: str, number: int) -> None: ...
    def waits_for(self, source_id: str) -> str | None: ...
    def under_way(self, source_id: str) -> int: ...


@dataclass(frozen=True, slots=True)
class RunDeps:
    """What all batches share. ``clock``: unix seconds. ``tell(conn, row)`` is called inside the transaction that ends a
    batch whose end is to be told, ``told()`` after it. ``task(row, input, database)``: what is to be checked of an
    input; ``index`` does it. ``tally`` counts lines that ended. ``judging`` bounds how many inputs are looked
    through at once."""

    store: BatchStore
    files: FileStore
    lanes: Lanes
    folder: Path
    clock: Callable[[], float]
    tell: Callable[[sqlite3.Connection, BatchRow], None]
    told: Callable[[], None]
    task: Callable[[BatchRow, Path, Path], Task]
    index: Index = index
    tally: BatchTally = field(default_factory=BatchTally)
    judging: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    def input(self, batch_id: str) -> Path:
        return self.folder / f"{batch_id}.jsonl"

    def lines(self, batch_id: str) -> Path:
        return self.folder / f"{batch_id}.db"

    def remove(self, batch_id: str) -> None:
        """What lies on disk of a batch's lines. Idempotent; blocks."""
        # The database before its log: stopped in between, it must not be found without the records that are in there.
        self.lines(batch_id).unlink(missing_ok=True)
        for path in self.folder.glob(f"{batch_id}.*"):
            path.unlink(missing_ok=True)
