"""All of models as one thing: made from values and what lies around it, started, closed.

Two steps, because the scheduler asks about models and models ask the scheduler: what needs no launches is made first
(``prospects`` knows nothing until then), the rest by ``connect``.

Invariant: nothing is loaded before ``start`` and after ``close``; closing ends no engine. Must not know: settings,
HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.launches.types import LaunchOrder
from vllm_bootstrap.models.adapters import Adapters
from vllm_bootstrap.models.book import CatalogueBook
from vllm_bootstrap.models.desk import Desk
from vllm_bootstrap.models.fitting import Fitter
from vllm_bootstrap.models.keeper import Keeper
from vllm_bootstrap.models.outlook import Outlook
from vllm_bootstrap.models.ports import Devices, KeeperConfig, KeeperDeps, Launches, Queues, Tally, Unsettled
from vllm_bootstrap.models.types import ModelEntry
from vllm_bootstrap.models.weights import Weights, WeightsConfig
from vllm_bootstrap.scheduler import refusals
from vllm_bootstrap.scheduler.ports import NoProspects, Prospects
from vllm_bootstrap.serving import Advert, RequestClass

log = logging.getLogger(__name__)


class LateProspects:
    """Nothing may be loaded until there is somebody who loads."""

    def __init__(self) -> None:
        self.real: Prospects = NoProspects()

    def base_of(self, name: str) -> str | None:
        return self.real.base_of(name)

    def refusal(self, name: str) -> ApiError | None:
        return self.real.refusal(name)

    def asked(self, name: str, cls: RequestClass, *, comes_back: bool) -> None:
        self.real.asked(name, cls, comes_back=comes_back)

    def ready_in_s(self, name: str) -> float | None:
        return self.real.ready_in_s(name)

    def waits_for(self, name: str) -> str | None:
        return self.real.waits_for(name)


@dataclass(frozen=True, slots=True)
class ModelsConfig:
    """``keeper``: what it keeps to. ``adapters``: the folder of those that were uploaded. ``one_model``: the model of
    one-model mode. Sizes in bytes."""

    keeper: KeeperConfig
    weights: WeightsConfig
    adapters: Path
    adapter_max_bytes: int
    adapter_gid: int | None
    one_model: str | None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What there is once launches are. ``estimate(order)``: what its start will take."""

    launches: Launches
    queues: Queues
    devices: Devices
    ledger: Ledger
    gpus: Unsettled
    estimate: Callable[[LaunchOrder], Awaitable[float | None]]
    batch_lines: Callable[[], Mapping[str, int]]


class ModelDepartment:
    """``make_book(adapters, resolved)`` makes the catalogue. ``tally`` counts what happens."""

    def __init__(
        self,
        config: ModelsConfig,
        db: Database,
        fitter: Fitter,
        make_book: Callable[[Adapters, Weights], CatalogueBook],
        tally: Tally,
        *,
        on_bytes: Callable[[int], None] = lambda _count: None,
    ) -> None:
        self._config, self._fitter, self._tally = config, fitter, tally
        self.prospects = LateProspects()
        self._launches: Launches | None = None
        self._warming: set[asyncio.Task[None]] = set()
        self.weights = Weights(db, config.weights, needed=self._needs, on_bytes=on_bytes)
        self.adapters = Adapters(
            db,
            config.adapters,
            max_bytes=config.adapter_max_bytes,
            reserve_bytes=config.weights.disk_reserve_bytes,
            node_id=config.weights.node_id,
            gid=config.adapter_gid,
            needed=self._serves,
        )
        self.book = make_book(self.adapters, self.weights)

    def connect(self, around: Surroundings) -> None:
        """Make the rest. Once, before ``start``."""
        self._launches = around.launches

        async def estimate(entry: ModelEntry) -> float | None:
            return await around.estimate(self.book.order_of(entry))

        deps = KeeperDeps(
            launches=around.launches,
            queues=around.queues,
            book=self.book,
            devices=around.devices,
            ledger=around.ledger,
            gpus=around.gpus,
            smallest=self._fitter.smallest,
            estimate=estimate,
            batch_lines=around.batch_lines,
            tally=self._tally,
            tick=time.monotonic,
            clock=time.time,
            warm=self._warm,
        )
        self.keeper = Keeper(self._config.keeper, deps)
        self.outlook = Outlook(self._config.keeper, deps, self.keeper)
        self.prospects.real = self.outlook
        self.desk = Desk(
            self.keeper, self.book, self._fitter, self.weights, self.adapters, around.queues, time.monotonic
        )

    async def start(self) -> None:
        """Take up what was left, and begin to keep. Raises ``StorageFailed``."""
        await self.adapters.start()
        await self.weights.start()
        self.adapters.on_change(self.book.refresh)
        self.book.on_change(self.keeper.book_changed)
        await self.book.start()
        await self.keeper.start()

    async def close(self) -> None:
        """Begin nothing more, end helpers. Engines stay as they are. Idempotent."""
        await self.keeper.close()
        for task in list(self._warming):
            task.cancel()
        await asyncio.gather(*self._warming, return_exceptions=True)
        await self.book.close()
        await self.weights.close()
        self.adapters.close()

    def _warm(self, entry: ModelEntry) -> None:
        """Read its files ahead while others still have its GPUs, where they are here and memory holds them."""
        task = asyncio.create_task(self._prefetch(entry), name=f"warm {entry.name}")
        self._warming.add(task)
        task.add_done_callback(self._warming.discard)

    async def _prefetch(self, entry: ModelEntry) -> None:
        try:
            await self.weights.prefetch(entry)
        except ApiError as error:  # not downloaded yet, mostly: the load does that, or says what is wrong
            log.debug("%s is not read ahead: %s", entry.name, error.message)

    # For the data plane, all of it from memory

    def default_model(self) -> str | None:
        """Where requests go that name none."""
        return self._config.one_model

    def progress_of(self, name: str) -> str | None:
        return self.outlook.progress_of(name)

    def wants_progress(self, name: str) -> bool:
        return self.outlook.wants_progress(name)

    def advert(self, advert: Advert) -> None:
        """A launch has changed."""
        self.keeper.advert(advert)

    def may_come(self, name: str) -> bool:
        """Whether that model is loaded when it is asked for."""
        return self.prospects.base_of(name) is not None and self.prospects.refusal(name) is None

    def absence(self, name: str) -> str | None:
        """Why a model that nothing serves is not loaded yet, None where it never will be."""
        if not self.may_come(name):
            return None
        return self.prospects.waits_for(name) or "it is loaded as soon as there is room for it"

    def not_ready(self) -> ApiError | None:
        """In one-model mode, why that model does not serve now; None when it does, and without one."""
        one = self._config.one_model
        if one is None or self.keeper.seen(one).state == "loaded":
            return None
        return self.prospects.refusal(one) or refusals.loading(one, self.prospects)

    def busy(self) -> str | None:
        """What goes on here that is no request: it keeps the box from being idle."""
        if any(view.state in ("queued", "running") for view in self.weights.downloads()):
            return "weights are downloaded"
        if any(view.state == "running" for view in self.weights.prefetches()):
            return "files are prefetched"
        return None

    # Who uses what

    def _needs(self, source: str) -> str | None:
        launches = () if self._launches is None else self._launches.list(include_ended=False)
        return next((view.launch_id for view in launches if view.model == source), None)

    def _serves(self, base: str, name: str) -> str | None:
        entry = self.book.find(name)
        if self._launches is None or entry is None or entry.name != base:
            return None
        return next((view.launch_id for view in self.keeper.seen(base).launches), None)
