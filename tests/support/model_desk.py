"""The catalogue in memory: what the routes' protocol promises, without disk, engines, hub or time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_bootstrap.errors import BadRequest, Conflict, ModelNotFound, NotFound, PayloadTooLarge
from vllm_bootstrap.models.types import (
    AdapterEntry,
    AdapterView,
    DiskFile,
    DownloadView,
    FitReport,
    ModelEntry,
    ModelLaunch,
    ModelProgress,
    ModelTrouble,
    ModelView,
    OnDisk,
    PrefetchView,
)

NOW = 1_800_000_000.0
LAUNCH = f"l{7:020d}"
MIB = 1024**2
OOM = ModelTrouble("oom", "The weights need more than there is.", "Give it more GPUs.", NOW + 1, NOW + 31, LAUNCH)


def entry(name: str = "org/chat", **fields: Any) -> ModelEntry:
    return ModelEntry(name, **{"source": f"hub/{name.rpartition('/')[2]}", **fields})


def rich(name: str = "org/chat") -> ModelEntry:
    """An entry with other names, and an adapter."""
    lora = AdapterEntry("sql", "hub/sql-lora", ("sql-2",))
    return entry(
        name,
        aliases=("chat", "gpt-4o"),
        args={"max_model_len": 8192},
        adapters=(lora,),
        env={"TOKEN_LIKE": "a value to hide"},
        description="For talk.",
    )


@dataclass
class FakeModels:
    """``calls``: what was asked for. ``news``: further views of a watched download. ``trouble``: what a load ends in.
    ``steps``: states that a load goes through, one at each look at the model, before it is loaded. ``closed``: watched
    downloads that were closed."""

    views: dict[str, ModelView] = field(default_factory=dict)
    calls: list[Any] = field(default_factory=list)
    note: str | None = None
    trouble: ModelTrouble | None = None
    steps: list[ModelView] = field(default_factory=list)
    fit: FitReport = field(default_factory=lambda: FitReport(fits=True, why="It fits.", gpu_count=1))
    fetched: dict[str, DownloadView] = field(default_factory=dict)
    news: asyncio.Queue[DownloadView] | None = None
    closed: list[str] = field(default_factory=list)
    warmed: dict[str, PrefetchView] = field(default_factory=dict)
    files: dict[str, OnDisk] = field(default_factory=dict)
    uploaded: dict[tuple[str, str], AdapterView] = field(default_factory=dict)
    archives: list[bytes] = field(default_factory=list)
    max_bytes: int = 4 * MIB

    def put(self, found: ModelEntry, **fields: Any) -> ModelView:
        """A model as it stands."""
        view = ModelView(found, **{"state": "unloaded", **fields})
        self.views[found.name] = view
        return view

    def list(self) -> list[ModelView]:
        return [self.views[name] for name in sorted(self.views)]

    def get(self, name: str) -> ModelView:
        found = next((view for view in self.views.values() if name in view.entry.served_names), None)
        if found is None:
            raise ModelNotFound(f"No model {name!r}.", param="model")
        if self.steps and found.state in {"loading", "waking"}:
            self.views[found.entry.name] = self.steps.pop(0)
        return found

    def _change(self, name: str, **fields: Any) -> ModelView:
        own = self.get(name).entry.name
        self.views[own] = replace(self.views[own], **fields)
        return self.views[own]

    async def add(self, entry: Mapping[str, Any], owner: str) -> ModelView:
        self.calls.append(("add", dict(entry), owner))
        if "gpu" in entry:
            raise BadRequest("models.gpu: no such key.", param="gpu")
        if entry["name"] in self.views:
            raise Conflict(f"There is a model {entry['name']!r} already.", param="name")
        return self.put(ModelEntry(entry["name"], entry["source"], origin="runtime"))

    async def remove(self, name: str) -> None:
        if self.get(name).entry.origin != "runtime":
            raise Conflict(f"{name!r} stands in the catalogue's file: take it out there.", param="model")
        del self.views[name]

    async def load(self, name: str, *, wait: bool) -> ModelView:
        self.calls.append(("load", name, wait))
        if self.trouble is not None:
            return self._change(name, state="failed", trouble=self.trouble)
        if wait:
            return self.loaded(name)
        return self._change(name, state="loading", progress=ModelProgress("weights", 0.5, 3.0, 4.0))

    def loaded(self, name: str) -> ModelView:
        running = (ModelLaunch(LAUNCH, "ready", 1),)
        return self._change(name, state="loaded", launches=running, loaded_at=NOW + 9, progress=None, trouble=None)

    async def unload(self, name: str, *, force: bool) -> ModelView:
        self.calls.append(("unload", name, force))
        if self.get(name).entry.pin and not force:
            raise Conflict("It is pinned.", param="model")
        return self._change(name, state="unloaded", launches=(), loaded_at=None)

    async def check(self, name: str, *, gpu_count: int | None, max_model_len: int | None) -> FitReport:
        self.calls.append(("check", name, gpu_count, max_model_len))
        return self.fit

    async def download(self, name: str, owner: str) -> DownloadView:
        self.calls.append(("download", name, owner))
        source = self.get(name).entry.source
        base = DownloadView(f"d{1:020d}", name, source, "main", owner, "running", created_at=NOW)
        return self.fetched.setdefault(name, base)

    def downloads(self) -> Sequence[DownloadView]:
        return [*self.fetched.values()]

    def get_download(self, name: str) -> DownloadView:
        if name not in self.fetched:
            raise NotFound(f"{name!r} was not downloaded.", param="model")
        return self.fetched[name]

    async def cancel_download(self, name: str) -> DownloadView:
        found = self.fetched[name] = replace(self.get_download(name), state="cancelled", ended_at=NOW + 3)
        return found

    async def watch_download(self, name: str) -> AsyncGenerator[DownloadView, None]:
        try:
            view = self.get_download(name)
            yield view
            while self.news is not None and view.state in {"queued", "running"}:
                view = self.fetched[name] = await self.news.get()
                yield view
        finally:
            self.closed.append(name)

    async def on_disk(self, name: str) -> OnDisk:
        found = OnDisk(self.get(name).entry.source, None, None, 0, complete=False)
        return self.files.get(name, found)

    def store(self, name: str) -> OnDisk:
        """Put a model's files on the disk."""
        both = (DiskFile("config.json", 400, 400), DiskFile("model.safetensors", 8 * MIB, 4 * MIB))
        total, cached = sum(one.bytes for one in both), sum(one.cached_bytes or 0 for one in both)
        self.files[name] = OnDisk(
            self.get(name).entry.source, "/cache/hub/model", "c0ffee", total, complete=True, files=both,
            cached_bytes=cached,
        )  # fmt: skip
        return self.files[name]

    async def delete_files(self, name: str) -> int:
        if self.get(name).launches:
            raise Conflict("It is loaded: unload it first.", param="model")
        found = self.files.pop(name, None)
        return 0 if found is None else found.bytes

    async def prefetch(self, name: str) -> PrefetchView:
        self.calls.append(("prefetch", name))
        if name not in self.files:
            raise Conflict("Nothing of it is on the disk.", param="model")
        started = PrefetchView(name, "running", self.files[name].bytes, MIB, 0.5)
        return self.warmed.setdefault(name, started)

    def prefetches(self) -> Sequence[PrefetchView]:
        return [*self.warmed.values()]

    def get_prefetch(self, name: str) -> PrefetchView:
        if name not in self.warmed:
            raise NotFound(f"{name!r} was not read ahead.", param="model")
        return self.warmed[name]

    async def cancel_prefetch(self, name: str) -> PrefetchView:
        found = self.warmed[name] = replace(self.get_prefetch(name), state="cancelled")
        return found

    def adapters(self, base: str) -> Sequence[AdapterView]:
        return [self.uploaded[key] for key in sorted(self.uploaded) if key[0] == base]

    async def receive_adapter(
        self, base: str, name: str, owner: str, pieces: AsyncGenerator[bytes, None]
    ) -> AdapterView:
        if name in {known for _, known in self.uploaded}:
            raise Conflict(f"There is an adapter {name!r} already.", param="name")
        content = b""
        async for piece in pieces:
            content += piece
            if len(content) > self.max_bytes:
                raise PayloadTooLarge(f"An adapter may have {self.max_bytes} bytes.", param="file")
        if content == b"no archive":
            raise BadRequest("The file is no archive.", param="file")
        self.archives.append(content)
        made = AdapterView(name, base, owner, len(content), 8, f"/adapters/{name}", NOW)
        self.uploaded[base, name] = made
        return made

    async def delete_adapter(self, base: str, adapter: str, owner: str | None) -> None:
        found = self.uploaded.get((base, adapter))
        if found is None or owner not in {None, found.owner}:
            raise NotFound(f"No adapter {adapter!r}.", param="adapter")
        del self.uploaded[base, adapter]
