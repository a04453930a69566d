"""What routes may ask of the catalogue, described from their point of view.

Invariant as of ``services``, of which this is a part: routes reach the catalogue only through this. Knows nothing of
HTTP requests.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from vllm_bootstrap.models.types import AdapterView, DownloadView, FitReport, ModelView, OnDisk, PrefetchView


class ModelDesk(Protocol):
    """The catalogue, what is loaded of it, and its weights. ``name`` is a model's own name, an alias or that of an
    adapter; one that stands for nothing raises ``ModelNotFound``. What has no ``async`` answers at once, from
    memory."""

    @property
    def note(self) -> str | None:
        """Why the last edit of the catalogue's file is not in force, None when it is."""

    def list(self) -> Sequence[ModelView]:
        """By name."""

    def get(self, name: str) -> ModelView: ...

    async def add(self, entry: Mapping[str, Any], owner: str) -> ModelView:
        """Take in an entry (with ``name``, spelled as in the file); on disk when this returns. Raises ``BadRequest``
        with the field, ``Conflict`` when one of its names is taken."""

    async def remove(self, name: str) -> None:
        """Forget an entry that was added; what is loaded of it is put away. Raises ``Conflict`` for one that cannot be
        removed from here (it stands in the file), saying where it comes from."""

    async def load(self, name: str, *, wait: bool) -> ModelView:
        """Load it, also when an earlier load has failed for good; idempotent. With ``wait``, returns when it is loaded
        and raises what keeps it from that (``Conflict``: it was unloaded meanwhile); else at once. Until it is loaded
        or has failed its state is ``loading`` or ``waking``, also while it waits for room."""

    async def unload(self, name: str, *, force: bool) -> ModelView:
        """Put it away when what runs there has ended, with ``force`` at once; returns when that is done. Idempotent.
        It is loaded again when it is asked for. Without ``force``, raises ``Conflict`` for a pinned model."""

    async def check(self, name: str, *, gpu_count: int | None, max_model_len: int | None) -> FitReport:
        """Whether it fits, as its entry says but for what is given."""

    async def download(self, name: str, owner: str) -> DownloadView:
        """Fetch its weights; the one that is under way when there is one. Raises ``StorageFull`` when there is no room,
        ``Conflict`` for a source that is a path."""

    def downloads(self) -> Sequence[DownloadView]:
        """The newest of each model."""

    def get_download(self, name: str) -> DownloadView:
        """Its newest. Raises ``NotFound`` when there was none."""

    async def cancel_download(self, name: str) -> DownloadView:
        """What is there stays, the next download goes on from it. Idempotent. Raises ``NotFound``."""

    def watch_download(self, name: str) -> AsyncGenerator[DownloadView, None]:
        """Its newest download now and after each change, at most twice a second, until it has ended."""

    async def on_disk(self, name: str) -> OnDisk: ...

    async def delete_files(self, name: str) -> int:
        """Returns how many bytes are free now. Raises ``Conflict`` while it is loaded or downloaded, or where its
        source is a path."""

    async def prefetch(self, name: str) -> PrefetchView:
        """Begin to read its files ahead; the one that is under way when there is one. Raises ``Conflict`` when nothing
        is on disk."""

    def prefetches(self) -> Sequence[PrefetchView]:
        """The newest of each model."""

    def get_prefetch(self, name: str) -> PrefetchView:
        """Its newest. Raises ``NotFound`` when there was none."""

    async def cancel_prefetch(self, name: str) -> PrefetchView:
        """Idempotent. Raises ``NotFound``."""

    def adapters(self, base: str) -> Sequence[AdapterView]:
        """Those that were uploaded for this model, by name."""

    async def receive_adapter(
        self, base: str, name: str, owner: str, pieces: AsyncGenerator[bytes, None]
    ) -> AdapterView:
        """Take an archive in; what ``pieces`` raises goes on to the caller. Checked, unpacked and on disk when this
        returns; whatever ends it earlier leaves nothing. Raises ``BadRequest`` for an archive that is none or holds
        what it must not, ``Conflict`` when the name is taken, ``PayloadTooLarge``, ``StorageFull``, ``Unavailable``
        when too many come at once."""

    async def delete_adapter(self, base: str, adapter: str, owner: str | None) -> None:
        """``owner`` None stands for an administrator; one of somebody else is ``NotFound``. Raises ``Conflict`` while
        an engine serves it."""
