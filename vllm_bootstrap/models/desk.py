"""All that routes may ask of models, answered by the part that knows: keeper, book, fitter, weights, adapters.

Invariant: a name is looked up once, here, and may be any that the model goes by; what is not in the catalogue (nor
loaded) is ``ModelNotFound``. Decides nothing itself. Must not know: HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping, Sequence
from typing import Any, Protocol

from vllm_bootstrap.errors import BadRequest, Conflict, ModelLoading, ModelNotFound, NotFound
from vllm_bootstrap.models.adapters import Adapters
from vllm_bootstrap.models.book import CatalogueBook
from vllm_bootstrap.models.fitting import Fitter
from vllm_bootstrap.models.keeper import Keeper
from vllm_bootstrap.models.record import NOTHING, Record, Seen, refusal
from vllm_bootstrap.models.showing import view_of
from vllm_bootstrap.models.types import (
    AdapterView,
    DownloadView,
    FitReport,
    ModelEntry,
    ModelView,
    OnDisk,
    PrefetchView,
)
from vllm_bootstrap.models.weights import Weights
from vllm_bootstrap.scheduler.ports import Demand
from vllm_bootstrap.serving import LoadReport


class Queues(Protocol):
    def demand(self) -> Mapping[str, Demand]: ...

    def load(self, launch_id: str) -> LoadReport: ...


class Desk:
    """Implements ``api.model_desk.ModelDesk``; see there what each method promises."""

    def __init__(
        self,
        keeper: Keeper,
        book: CatalogueBook,
        fitter: Fitter,
        weights: Weights,
        adapters: Adapters,
        queues: Queues,
        tick: Callable[[], float],
    ) -> None:
        self._keeper, self._book, self._fitter = keeper, book, fitter
        self._weights, self._adapters, self._queues, self._tick = weights, adapters, queues, tick

    @property
    def note(self) -> str | None:
        return self._book.note

    # Models

    def list(self) -> Sequence[ModelView]:
        seen, demand = self._keeper.look(), self._queues.demand()
        names = set(self._book.entries()) | set(seen)
        known = [self._keeper.records[name] for name in sorted(names) if name in self._keeper.records]
        return [self._view(record, demand, seen) for record in known]

    def get(self, name: str) -> ModelView:
        return self._view(self._record(name), self._queues.demand())

    async def add(self, entry: Mapping[str, Any], owner: str) -> ModelView:
        body = dict(entry)
        name = body.pop("name", None)
        if not isinstance(name, str) or not name:
            raise BadRequest("name: the model's name is missing.", param="name")
        if name in self._book.entries():
            raise Conflict(f"There is a model {name!r} already: remove it first.", param="name")
        await self._book.add(self._book.parse(name, body), owner)
        return self.get(name)

    async def remove(self, name: str) -> None:
        await self._book.remove(self._entry(name).name)

    async def load(self, name: str, *, wait: bool) -> ModelView:
        record = self._record(name)
        await self._keeper.load(record.entry.name)
        while wait:
            changes = asyncio.ensure_future(self._keeper.changes())
            try:
                if self._keeper.seen(record.entry.name).state == "loaded":
                    break
                error = refusal(record, self._tick())
                if error is not None:
                    raise error
                self._refuse_unwanted(name, record)
                await changes
            finally:
                changes.cancel()
        return self.get(name)

    def _refuse_unwanted(self, name: str, record: Record) -> None:
        """Raise where a load that somebody awaits will not come any more."""
        if self._record(name) is not record or record.down:
            raise Conflict(f"{name!r} was unloaded or changed before it was loaded.", param="model")
        if record.asks("realtime", self._tick()) is None:
            why = f": {record.obstacle}" if record.obstacle is not None else ""
            raise ModelLoading(f"{name!r} could not be loaded for so long that it is given up{why}.")

    async def unload(self, name: str, *, force: bool) -> ModelView:
        record = self._record(name)
        if record.entry.pin and not force:
            raise Conflict(
                f"{record.entry.name!r} is pinned: unload it with force, or change its entry.", param="force"
            )
        await self._keeper.unload(record.entry.name, force=force)
        return self.get(name)

    async def check(self, name: str, *, gpu_count: int | None, max_model_len: int | None) -> FitReport:
        entry = self._entry(name)
        return await self._fitter.check(entry, gpu_count=gpu_count, max_model_len=max_model_len, online=True)

    # Weights

    async def download(self, name: str, owner: str) -> DownloadView:
        return await self._weights.download(self._entry(name), owner)

    def downloads(self) -> Sequence[DownloadView]:
        newest: dict[str, DownloadView] = {}
        for view in self._weights.downloads():
            newest.setdefault(view.model, view)
        return list(newest.values())

    def get_download(self, name: str) -> DownloadView:
        return self._weights.newest(self._entry(name))

    async def cancel_download(self, name: str) -> DownloadView:
        return await self._weights.cancel(self.get_download(name).id)

    def watch_download(self, name: str) -> AsyncGenerator[DownloadView, None]:
        return self._weights.watch(self.get_download(name).id)

    async def on_disk(self, name: str) -> OnDisk:
        return await self._weights.on_disk(self._entry(name))

    async def delete_files(self, name: str) -> int:
        return await self._weights.delete(self._entry(name))

    async def prefetch(self, name: str) -> PrefetchView:
        return await self._weights.prefetch(self._entry(name))

    def prefetches(self) -> Sequence[PrefetchView]:
        return self._weights.prefetches()

    def get_prefetch(self, name: str) -> PrefetchView:
        return self._weights.prefetch_state(self._entry(name))

    async def cancel_prefetch(self, name: str) -> PrefetchView:
        return await self._weights.cancel_prefetch(self._entry(name))

    # Adapters

    def adapters(self, base: str) -> Sequence[AdapterView]:
        return sorted(self._adapters.all(self._entry(base).name), key=lambda view: view.name)

    async def receive_adapter(self, base: str, name: str, owner: str, pieces: AsyncIterable[bytes]) -> AdapterView:
        entry, taken = self._entry(base), self._book.find(name)
        if taken is not None:
            raise Conflict(f"{name!r} is a name of the model {taken.name!r} already.", param="name")
        return await self._adapters.receive(owner, entry.name, name, pieces)

    async def delete_adapter(self, base: str, adapter: str, owner: str | None) -> None:
        if all(view.name != adapter for view in self.adapters(base)):
            raise NotFound(f"{base!r} has no uploaded adapter {adapter!r}.", param="adapter")
        await self._adapters.delete(adapter, owner)

    # Inside

    def _entry(self, name: str) -> ModelEntry:
        return self._record(name).entry

    def _record(self, name: str) -> Record:
        entry = self._book.find(name)
        record = self._keeper.records.get(name if entry is None else entry.name)
        if record is None or (entry is None and name not in self._keeper.look()):
            raise ModelNotFound(f"There is no model {name!r} in the catalogue.", param="model")
        return record

    def _view(
        self, record: Record, demand: Mapping[str, Demand], looked: Mapping[str, Seen] | None = None
    ) -> ModelView:
        """``looked``: what is seen of all models, where that is known already."""
        seen = (self._keeper.look() if looked is None else looked).get(record.entry.name, NOTHING)
        loads = {view.launch_id: self._queues.load(view.launch_id) for view in seen.launches}
        return view_of(record, seen, demand, loads, self._tick())
