"""The weights of models on this machine: fetched, looked at, warmed, removed. The one thing that others know of it.

Invariants: what is being fetched, warmed or served is not removed; a model's own folder never is. A commit that was
downloaded stays the one that is served until it is downloaded anew. Nothing here blocks the loop.

Must not know: HTTP, how engines are run. Who needs a repository now is asked through a callback.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import BadRequest, Conflict, NotFound
from vllm_bootstrap.models.disk import Found, find, look
from vllm_bootstrap.models.download_rows import DownloadRows
from vllm_bootstrap.models.downloads import DownloadConfig, Downloads
from vllm_bootstrap.models.hubcache import MAIN, RepoCache, hub_folder, is_repo, is_revision, sweep_deleted
from vllm_bootstrap.models.prefetch import RESERVE_BYTES, Prefetches
from vllm_bootstrap.models.types import DownloadView, Fetched, ModelEntry, OnDisk, PrefetchView

Needed = Callable[[str], str | None]
"""Who needs a source now: asked with a repository or path, answers with a launch's id, or None."""

_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class WeightsConfig:
    """``base_env`` is what engines inherit, ``hf_token`` goes with it. ``downloads_at_once`` fetch at a time.
    ``disk_reserve_bytes`` and ``memory_reserve_bytes`` stay free. ``uid``, ``gid``: who owns what is fetched, None: the
    daemon's user."""

    hf_home: Path
    base_env: Mapping[str, str] = field(default_factory=dict)
    hf_token: str | None = field(default=None, repr=False)
    downloads_at_once: int = 1
    disk_reserve_bytes: int = 0
    memory_reserve_bytes: int = RESERVE_BYTES
    uid: int | None = None
    gid: int | None = None
    node_id: str = "local"

    @property
    def hub(self) -> Path:
        return hub_folder(self.hf_home, self.base_env)

    def helper_env(self) -> dict[str, str]:
        env = {**self.base_env, "HF_HOME": str(self.hf_home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        env.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        if self.hf_token is not None and _TOKEN.fullmatch(self.hf_token):
            env["HF_TOKEN"] = self.hf_token
        return env


class Weights:
    """``needed`` tells the launch that uses a source now, ``on_bytes`` is told how many bytes more have come.
    ``start`` first, ``close`` at the end; the downloads that are under way then are gone on with at the next start."""

    def __init__(
        self,
        db: Database,
        config: WeightsConfig,
        *,
        needed: Needed = lambda _source: None,
        on_bytes: Callable[[int], None] = lambda _count: None,
    ) -> None:
        self._config, self._hub, self._needed = config, config.hub, needed
        self._pinned: dict[tuple[str, str], str] = {}
        self._removing: set[str] = set()
        self._prefetches = Prefetches(config.base_env, reserve_bytes=config.memory_reserve_bytes)
        helpers = DownloadConfig(
            hub=self._hub,
            env=config.helper_env(),
            at_once=config.downloads_at_once,
            reserve_bytes=config.disk_reserve_bytes,
            uid=config.uid,
            gid=config.gid,
            node_id=config.node_id,
        )
        self._downloads = Downloads(helpers, DownloadRows(db), on_done=self._downloaded, on_bytes=on_bytes)

    async def start(self) -> None:
        await asyncio.to_thread(sweep_deleted, self._hub)
        await self._downloads.start()

    async def close(self) -> None:
        """Kill the helpers. Idempotent."""
        await self._downloads.close()
        await self._prefetches.close()

    # -- downloads ----------------------------------------------------------------------------------------------

    async def download(self, entry: ModelEntry, owner: str) -> DownloadView:
        """Fetch what an engine needs of a model's repository, or join who does. Returns when it is settled what that
        is, at the latest after ten seconds. Raises ``BadRequest``, ``StorageFull``, and ``Conflict`` while it is being
        removed."""
        repo = self._repository(entry)
        revision = entry.revision or MAIN
        if not is_revision(revision):
            raise BadRequest(f"The revision {revision!r} cannot name a branch, a tag or a commit.", param="revision")
        if repo in self._removing:
            raise Conflict(f"{repo} is being deleted: try again soon.", retry_after=2)
        return await self._downloads.download(entry.name, repo, revision, owner, load_format=_load_format(entry))

    def downloads(self) -> list[DownloadView]:
        """All that are known, the newest first."""
        return self._downloads.all()

    def newest(self, entry: ModelEntry) -> DownloadView:
        """The newest download of what an entry names, whichever model it was asked for. Raises ``NotFound``."""
        for view in self._downloads.all():
            if (view.repo, view.revision) == (entry.source, entry.revision or MAIN):
                return view
        raise NotFound(f"Nothing was downloaded for {entry.name!r}.", param="name")

    def get(self, download_id: str) -> DownloadView:
        """Raises ``NotFound``."""
        return self._downloads.get(download_id)

    async def cancel(self, download_id: str) -> DownloadView:
        """Stop a download; what has arrived stays. One that has ended is answered as it is. Raises ``NotFound``."""
        return await self._downloads.cancel(download_id)

    def watch(self, download_id: str) -> AsyncGenerator[DownloadView, None]:
        """How it is now, then each change, at most twice a second, until it has ended. Raises ``NotFound``, at once."""
        self._downloads.get(download_id)
        return self._downloads.watch(download_id)

    def resolved(self, entry: ModelEntry) -> Fetched | None:
        """What was downloaded for an entry, None where nothing was (or it is gone)."""
        commit = self._pinned.get((entry.source, entry.revision or MAIN))
        if commit is None:
            return None
        cache = RepoCache(self._hub, entry.source)
        if cache.commit_of(commit) is None:
            return None
        wanted = self._downloads.wanted(entry.source, commit)
        # Another format may need other files than those that were fetched.
        if wanted is None or _load_format(entry) or not all(cache.pointer(commit, path).exists() for path in wanted):
            return Fetched(commit)
        return Fetched(commit, str(cache.snapshots / commit))

    # -- on disk ------------------------------------------------------------------------------------------------

    async def on_disk(self, entry: ModelEntry, *, residency: bool = True) -> OnDisk:
        """What of a model is on this machine. ``residency``: also how much of it is in the page cache."""
        found = await self._find(entry)
        wanted = self._downloads.wanted(entry.source, found.commit) if found.commit is not None else None
        return await asyncio.to_thread(partial(look, entry.source, found, wanted, residency=residency))

    async def delete(self, entry: ModelEntry) -> int:
        """Remove a model's files from the cache: those of its revision alone if it names one, else all of the
        repository. Returns how many bytes went.

        Raises ``BadRequest`` for a folder of the operator's, ``NotFound`` when nothing is there, and ``Conflict`` while
        a launch, a download or a prefetch needs them.
        """
        repo = self._repository(entry, "is a folder of yours: nothing in it is deleted from here.")
        launch = self._needed(repo)
        if launch is not None:
            raise Conflict(f"{repo} is in use by {launch}: unload the model first.", should_retry=False)
        if self._downloads.current(repo) is not None:
            raise Conflict(f"{repo} is being downloaded: cancel that first.", should_retry=False)
        if any(self._prefetches.is_running(name) for name in {entry.name, repo}) or repo in self._removing:
            raise Conflict(f"{repo} is being prefetched or deleted: cancel that, or wait.", should_retry=False)
        cache = RepoCache(self._hub, repo)
        self._removing.add(repo)
        try:
            commit = None
            if entry.revision is not None:
                commit = (await self._find(entry)).commit
            if entry.revision is not None and commit is None:
                raise NotFound(f"{repo} at {entry.revision} is not on this machine.")
            gone = await asyncio.to_thread(cache.remove, commit)
            await self._downloads.forget(repo, commit)
        finally:
            self._removing.discard(repo)
        self._pinned = {
            key: value for key, value in self._pinned.items() if key[0] != repo or commit not in {None, value}
        }
        if not gone:
            raise NotFound(f"{repo} is not on this machine.")
        return gone

    # -- prefetch -----------------------------------------------------------------------------------------------

    async def prefetch(self, entry: ModelEntry) -> PrefetchView:
        """Begin to read a model's files into the page cache. Raises ``Conflict`` when they are not on this machine, and
        ``NotEnoughMemory`` (409 as well) with numbers when memory does not hold them."""
        found = await self._find(entry)
        disk = await asyncio.to_thread(partial(look, entry.source, found, None, residency=False))
        if not disk.files:
            raise Conflict(f"{entry.source} is not on this machine: download it first.", should_retry=False)
        if entry.source in self._removing:
            raise Conflict(f"{entry.source} is being deleted.", should_retry=False)
        return self._prefetches.begin(entry.name, list(found.paths.values()), disk.bytes)

    def prefetches(self) -> list[PrefetchView]:
        """The last one of each model."""
        return self._prefetches.all()

    def prefetch_state(self, entry: ModelEntry) -> PrefetchView:
        """The last prefetch of a model. Raises ``NotFound``."""
        return self._prefetches.state(entry.name)

    async def cancel_prefetch(self, entry: ModelEntry) -> PrefetchView:
        """Stop it; what is in memory stays for now. Raises ``NotFound``."""
        return await self._prefetches.cancel(entry.name)

    # -- inside -------------------------------------------------------------------------------------------------

    def _downloaded(self, repo: str, revision: str, commit: str) -> None:
        self._pinned[repo, revision] = commit

    def _repository(self, entry: ModelEntry, otherwise: str = "is a folder: there is nothing to download.") -> str:
        if entry.source.startswith("/"):
            raise BadRequest(f"{entry.source} {otherwise}", param="source")
        if not is_repo(entry.source):
            raise BadRequest(f"{entry.source!r} is not the id of a repository.", param="source")
        return entry.source

    async def _find(self, entry: ModelEntry) -> Found:
        pinned = self._pinned.get((entry.source, entry.revision or MAIN))
        return await asyncio.to_thread(find, self._hub, entry.source, entry.revision, pinned)


def _load_format(entry: ModelEntry) -> str | None:
    """The one that its entry names."""
    named = entry.args.get("load_format") or entry.extra_args.get("load-format")
    return str(named) if named else None
