"""The catalogue of the sync client.

Invariant: it differs from the async one (``async_models``) only in waiting. Each method raises what ``Client`` says,
and ``ModelNotFound`` for a name that stands for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar, Unpack

from vllm_bootstrap.sdk import calls as plain_calls
from vllm_bootstrap.sdk import model_calls as calls
from vllm_bootstrap.sdk.calls import Call
from vllm_bootstrap.sdk.failures import DaemonUnreachable
from vllm_bootstrap.sdk.model_calls import EntryFields, ModelFilter
from vllm_bootstrap.sdk.sync_wire import SyncWire
from vllm_bootstrap.sdk.transfers import Counted, OnBytes
from vllm_bootstrap.sdk.waiting import EndWait
from vllm_bootstrap.wire import Listing, ModelListing
from vllm_bootstrap.wire_models import (
    AdapterInfo,
    AdapterRemoved,
    DownloadInfo,
    FilesRemoved,
    FitInfo,
    ModelFiles,
    ModelRemoved,
    ModelStatus,
    ModelStatuses,
    PrefetchInfo,
)

T = TypeVar("T")


class Models:
    """Models by name: ``client.models``. A name may be an alias or that of an adapter."""

    def __init__(self, wire: SyncWire) -> None:
        self._wire = wire

    def __call__(self) -> ModelListing:
        """``client.models()``: what can be asked for by name, as far as the key may see it."""
        return self._wire.do(plain_calls.models())

    def list(self, **wanted: Unpack[ModelFilter]) -> ModelStatuses:
        """The catalogue, by name; ``after`` the last name of a page gives the next one."""
        return self._wire.do(calls.models(wanted))

    def get(self, name: str) -> ModelStatus:
        return self._wire.do(calls.model(name))

    def add(self, name: str, source: str, **entry: Unpack[EntryFields]) -> ModelStatus:
        """Add a model until it is removed, also across restarts. Raises ``Conflict`` when the name is taken."""
        return self._wire.do(calls.add(name, source, entry))

    def remove(self, name: str) -> ModelRemoved:
        """Forget a model that was added; its files stay. Raises ``Conflict`` for one of the catalogue's file."""
        return self._wire.do(calls.remove(name))

    def load(
        self,
        name: str,
        *,
        wait: bool = True,
        timeout_s: float | None = None,
        on_progress: Callable[[ModelStatus], object] | None = None,
    ) -> ModelStatus:
        """Load a model. With ``wait``, until it is loaded; ``on_progress`` gets it as it is seen on the way. Raises
        ``LoadFailed``, ``EndTimeout`` (it goes on loading)."""
        begun = self._wire.do(calls.load(name))
        if not wait:
            return begun
        waiting = EndWait(
            f"Loading {name}", timeout_s, calls.Loading().is_over, on_progress, slowest_s=calls.SLOWEST_LOAD_POLL_S
        )
        return self._wait(waiting, begun, calls.model(name))

    def unload(self, name: str, *, force: bool = False, timeout_s: float = calls.UNLOAD_TIMEOUT_S) -> ModelStatus:
        """Put a model away when what runs there has ended, or at once with ``force``; idempotent. Raises ``Conflict``
        for a pinned one without ``force``."""
        return self._wire.do(calls.unload(name, force=force, timeout_s=timeout_s))

    def check(self, name: str, *, gpu_count: int | None = None, max_model_len: int | None = None) -> FitInfo:
        """Whether a model fits into the daemon's GPUs, and what would."""
        return self._wire.do(calls.check(name, gpu_count, max_model_len))

    def pull(
        self,
        name: str,
        *,
        wait: bool = True,
        timeout_s: float | None = None,
        on_progress: Callable[[DownloadInfo], object] | None = None,
    ) -> DownloadInfo:
        """Fetch a model's weights to the daemon's disk. With ``wait``, until they are there. Raises
        ``DownloadFailed``, ``EndTimeout`` (the download goes on), ``StorageFull``."""
        begun = self._wire.do(calls.download("POST", name))
        if not wait:
            return begun
        waiting = EndWait(f"Downloading {name}", timeout_s, calls.is_fetched, on_progress)
        return self._wait(waiting, begun, calls.download("GET", name))

    def download(self, name: str) -> DownloadInfo:
        """How far its newest download is. Raises ``NotFound`` when there was none."""
        return self._wire.do(calls.download("GET", name))

    def watch_download(self, name: str) -> Generator[DownloadInfo]:
        """Its newest download now and after each change, until it has ended. Taken up again when the connection
        breaks."""
        for event in self._wire.follow(calls.watch_download(name)):
            yield DownloadInfo.model_validate_json(event.data)

    def cancel_download(self, name: str) -> DownloadInfo:
        """What has come stays; the next download goes on from there."""
        return self._wire.do(calls.download("DELETE", name))

    def files(self, name: str) -> ModelFiles:
        """What of a model lies on the daemon's disk, and how much of that in its memory."""
        return self._wire.do(calls.files(name))

    def delete_files(self, name: str) -> FilesRemoved:
        """Raises ``Conflict`` while it is loaded or downloaded."""
        return self._wire.do(calls.delete_files(name))

    def prefetch(
        self,
        name: str,
        *,
        wait: bool = True,
        timeout_s: float | None = None,
        on_progress: Callable[[PrefetchInfo], object] | None = None,
    ) -> PrefetchInfo:
        """Read a model's files into the daemon machine's memory, so that loading it takes less. With ``wait``, until
        that is done. Raises ``PrefetchFailed``, ``EndTimeout`` (it goes on)."""
        begun = self._wire.do(calls.prefetch("POST", name))
        if not wait:
            return begun
        waiting = EndWait(
            f"Reading {name} ahead", timeout_s, calls.is_read, on_progress, slowest_s=calls.SLOWEST_LOAD_POLL_S
        )
        return self._wait(waiting, begun, calls.prefetch("GET", name))

    def prefetched(self, name: str) -> PrefetchInfo:
        """How far reading ahead is. Raises ``NotFound`` when nobody asked for it."""
        return self._wire.do(calls.prefetch("GET", name))

    def cancel_prefetch(self, name: str) -> PrefetchInfo:
        return self._wire.do(calls.prefetch("DELETE", name))

    def adapters(self, name: str) -> Listing[AdapterInfo]:
        """LoRA adapters that were uploaded for a model: one's own, for monitors everybody's."""
        return self._wire.do(calls.adapters(name))

    def upload_adapter(
        self, base: str, path: str | Path, *, name: str | None = None, on_progress: OnBytes | None = None
    ) -> AdapterInfo:
        """Bring a LoRA adapter (tar, tar.gz or zip) for the model ``base``; ``name`` is its file's without ending,
        where none is given. Requests can name it as their model when this returns."""
        with Path(path).open("rb") as opened:
            source: Any = opened if on_progress is None else Counted(opened, on_progress)
            wanted = name or Path(path).name.partition(".")[0]
            return self._wire.do(calls.upload_adapter(base, wanted, source, Path(path).name))

    def delete_adapter(self, base: str, name: str) -> AdapterRemoved:
        return self._wire.do(calls.delete_adapter(base, name))

    def _wait(self, waiting: EndWait[T], begun: T, again: Call[T]) -> T:
        found = begun
        while not waiting.saw(found):
            found = self._next(waiting, again)
        return found

    def _next(self, waiting: EndWait[T], again: Call[T]) -> T:
        """The next look. A daemon that is restarted meanwhile is waited for."""
        while True:
            time.sleep(waiting.pause())
            try:
                return self._wire.do(again)
            except DaemonUnreachable as exc:
                waiting.missed(exc)
