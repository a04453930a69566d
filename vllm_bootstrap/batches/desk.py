"""All of batches as one thing: made from values and what lies below, started, swept now and then, closed.

Invariant: nothing of batches runs before ``start`` and after ``close``; closing loses nothing, because what was
accepted and what is finished is on disk. Must not know: settings, HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.batches import webhooks
from vllm_bootstrap.batches.dispatch import Dispatcher
from vllm_bootstrap.batches.files import FileStore
from vllm_bootstrap.batches.indexer import index
from vllm_bootstrap.batches.indexing import Task
from vllm_bootstrap.batches.items import ItemService
from vllm_bootstrap.batches.items_store import ItemStore
from vllm_bootstrap.batches.run_deps import Index, RunDeps
from vllm_bootstrap.batches.service import BatchService
from vllm_bootstrap.batches.store import BatchStore
from vllm_bootstrap.batches.types import BatchRow
from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.ids import RANDOM_BYTES
from vllm_bootstrap.serving import Advert
from vllm_bootstrap.tallies import BatchTally

log = logging.getLogger(__name__)

SWEEP_S = 60.0
KEYS_S = 5.0
KEYS_KEPT_S = 2 * 86400.0


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """Settings of the same names, without their prefixes."""

    folder: Path
    node_id: str
    max_lines: int
    max_line_bytes: int
    max_unfinished: int
    line_attempts: int
    prefix_order: bool
    kept_s: float
    max_size: int
    max_latency_s: float
    item_expires_after_s: float
    items_max_queued: int
    webhook_allow_private: bool
    webhook_attempts: int


class BatchDepartment:
    """``key_named(name)``: that key as it is now, None when it is not valid. ``dispatcher`` carries lines to engines,
    ``index`` judges inputs, ``tally`` counts what ended."""

    def __init__(
        self,
        config: BatchConfig,
        db: Database,
        files: FileStore,
        gateway: Gateway,
        key_named: Callable[[str], Principal | None],
        clock: Callable[[], float] = time.time,
        *,
        dispatcher: type[Dispatcher] = Dispatcher,
        index: Index = index,
        tally: BatchTally | None = None,
    ) -> None:
        tally = tally or BatchTally()
        self._config, self._clock, self._files = config, clock, files
        self._key_named = key_named
        self.dispatcher = dispatcher(
            gateway, key_named=key_named, attempts=config.line_attempts, max_joined=config.max_size
        )
        self._webhooks = webhooks.Webhooks(
            db, allow_private=config.webhook_allow_private, attempts=config.webhook_attempts, clock=clock
        )
        self._batch_store, self._item_store = BatchStore(db, config.node_id), ItemStore(db, config.node_id)
        deps = RunDeps(
            store=self._batch_store,
            files=files,
            lanes=self.dispatcher,
            folder=config.folder,
            clock=clock,
            tell=self._tell,
            told=self._webhooks.kick,
            task=self._task,
            index=index,
            tally=tally,
        )
        self.batches = BatchService(deps, most_unfinished=config.max_unfinished)
        self.items = ItemService(
            self._item_store,
            self.dispatcher,
            most_waiting=config.items_max_queued,
            expires_after_s=config.item_expires_after_s,
            latency_s=config.max_latency_s,
            max_joined=config.max_size,
            clock=clock,
            tally=tally,
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Go on with what has not ended."""
        await self.batches.sweep_strays()
        self._tasks = [
            asyncio.create_task(self._webhooks.run(), name="webhooks"),
            asyncio.create_task(self._sweep(), name="sweep batches"),
            asyncio.create_task(self._look_at_keys(), name="look at keys for batches"),
        ]
        await self.items.start()
        await self.batches.start()

    async def close(self) -> None:
        """Stop where things are. Idempotent."""
        await self.batches.close()
        await self.items.close()
        self.dispatcher.close()
        await self._webhooks.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What launches say

    def advert(self, advert: Advert) -> None:
        self.dispatcher.advert(advert)

    def forget(self, launch_id: str) -> None:
        self.dispatcher.forget(launch_id)

    # Inside

    def _task(self, row: BatchRow, source: Path, database: Path) -> Task:
        """What is to be checked of an input, with what its key may ask for now."""
        config = self._config
        key = self._key_named(row.owner)
        models = None if key is None or key.models is None else list(key.models)
        return Task(
            str(source),
            str(database),
            row.endpoint,
            config.max_lines,
            config.max_line_bytes,
            models=models,
            model_optional=row.launch_id is not None,
            prefixes=config.prefix_order,
        )

    def _tell(self, conn: sqlite3.Connection, row: BatchRow) -> None:
        """Inside the transaction that ends a batch."""
        state = row.phase.state.value
        assert row.webhook is not None  # noqa: S101 - else nobody is told
        entropy = os.urandom(RANDOM_BYTES)
        notice = webhooks.announcement(row.id, row.owner, row.webhook, state, row.stamps[state], entropy)
        webhooks.insert(conn, notice)

    async def _look_at_keys(self) -> None:
        while True:
            await asyncio.sleep(KEYS_S)
            self.dispatcher.look_at_keys()

    async def _sweep(self) -> None:
        """Forget what has been kept for long enough."""
        while True:
            now = self._clock()
            try:
                await self._files.sweep(now)
                await self.batches.sweep(now - self._config.kept_s)
                await self._item_store.sweep(now - self._config.kept_s)
                await self._batch_store.forget_keys(now - KEYS_KEPT_S)
            except ApiError as error:
                log.error("What is over time cannot be removed: %s", error.message)
            except OSError:
                log.exception("What is over time cannot be removed")
            await asyncio.sleep(SWEEP_S)
