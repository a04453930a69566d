"""Files, batches and single items of the sync client.

Invariant: they differ from the async ones (``async_batches``) only in waiting. Each method raises what ``Client`` says.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from vllm_bootstrap.sdk import batch_calls as calls
from vllm_bootstrap.sdk.batch_calls import ENDED_BATCH, ENDED_ITEM, BatchFields, FileFilter, ItemFilter
from vllm_bootstrap.sdk.failures import DaemonUnreachable
from vllm_bootstrap.sdk.sync_wire import SyncWire
from vllm_bootstrap.sdk.transfers import Counted, Download, OnBytes
from vllm_bootstrap.sdk.waiting import EndWait
from vllm_bootstrap.wire_batches import (
    BatchDeleted,
    BatchEventEntry,
    BatchObject,
    FileDeleted,
    FileObject,
    ItemObject,
    Page,
)


class Files:
    """Stored files: ``client.files``."""

    def __init__(self, wire: SyncWire) -> None:
        self._wire = wire

    def upload(
        self,
        path: str | Path,
        *,
        purpose: str = "batch",
        filename: str | None = None,
        expires_after_s: int | None = None,
        on_progress: OnBytes | None = None,
    ) -> FileObject:
        """Send a file from the disk, without reading it into memory. On the daemon's disk when this returns."""
        with Path(path).open("rb") as opened:
            source: Any = opened if on_progress is None else Counted(opened, on_progress)
            return self._wire.do(calls.upload(source, filename or Path(path).name, purpose, expires_after_s))

    def get(self, file_id: str) -> FileObject:
        return self._wire.do(calls.file(file_id))

    def list(self, **wanted: Unpack[FileFilter]) -> Page[FileObject]:
        return self._wire.do(calls.files(wanted))

    def content(self, file_id: str, *, start: int = 0, on_progress: OnBytes | None = None) -> Generator[bytes]:
        """The bytes of a file from ``start`` on. Goes on where it was when the connection breaks."""
        yield from self._wire.fetch(calls.content_path(file_id), Download(start, on_progress))

    def download(self, file_id: str, path: str | Path, *, on_progress: OnBytes | None = None) -> Path:
        """Store a file as ``path``, which is there only when it is whole. Returns it."""
        target = Path(path)
        coming = target.with_name(f"{target.name}.part")
        with coming.open("wb") as sink:
            for piece in self.content(file_id, on_progress=on_progress):
                sink.write(piece)
        coming.replace(target)
        return target

    def delete(self, file_id: str) -> FileDeleted:
        """Batches that were made from it go on."""
        return self._wire.do(calls.delete_file(file_id))


class Batches:
    """Batches: ``client.batches``."""

    def __init__(self, wire: SyncWire) -> None:
        self._wire = wire

    def create(
        self, input_file_id: str, endpoint: str, *, idempotency_key: str | None = None, **fields: Unpack[BatchFields]
    ) -> BatchObject:
        """Run the requests of an uploaded file; returns as soon as the batch is on the daemon's disk. The same
        ``idempotency_key`` again gives the same batch; one is made when none is given."""
        return self._wire.do(calls.create(input_file_id, endpoint, fields, idempotency_key or uuid.uuid4().hex))

    def get(self, batch_id: str) -> BatchObject:
        return self._wire.do(calls.batch(batch_id))

    def list(self, *, after: str | None = None, limit: int = 20) -> Page[BatchObject]:
        """Newest first; ``after`` the last id of a page gives the next one."""
        return self._wire.do(calls.batches(after, limit))

    def cancel(self, batch_id: str) -> BatchObject:
        """What is finished stays in the output. Idempotent."""
        return self._wire.do(calls.change(batch_id, "cancel"))

    def pause(self, batch_id: str) -> BatchObject:
        """Begin nothing new; what runs ends. Idempotent. Raises ``Conflict`` when the batch has ended."""
        return self._wire.do(calls.change(batch_id, "pause"))

    def resume(self, batch_id: str) -> BatchObject:
        return self._wire.do(calls.change(batch_id, "resume"))

    def retry(self, batch_id: str) -> BatchObject:
        """Run the failed lines of an ended batch again. Raises ``Conflict`` where there are none or it runs."""
        return self._wire.do(calls.change(batch_id, "retry"))

    def set_priority(self, batch_id: str, priority: int) -> BatchObject:
        """From -100 to 100; higher goes first."""
        return self._wire.do(calls.set_priority(batch_id, priority))

    def delete(self, batch_id: str) -> BatchDeleted:
        """Forget an ended batch; its files stay. Raises ``Conflict`` while it has not ended."""
        return self._wire.do(calls.delete_batch(batch_id))

    def history(self, batch_id: str, *, after: int = 0) -> Generator[BatchEventEntry]:
        """What has happened to a batch, behind the event number ``after``."""
        more = True
        while more:
            page = self._wire.do(calls.history(batch_id, after, limit=1000))
            yield from page.data
            more, after = page.has_more, page.data[-1].seq if page.data else after

    def watch(self, batch_id: str) -> Generator[BatchObject]:
        """The batch now and after each change, until it has ended. Taken up again when the connection breaks."""
        for event in self._wire.follow(calls.watch(batch_id)):
            yield BatchObject.model_validate_json(event.data)

    def wait(
        self,
        batch_id: str,
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[BatchObject], object] | None = None,
    ) -> BatchObject:
        """Wait until a batch has ended, whatever way; ``on_progress`` gets it as it was seen on the way. Raises
        ``EndTimeout`` (the batch goes on). A daemon that is restarted meanwhile is waited for."""
        waiting = EndWait(f"Batch {batch_id}", timeout_s, _batch_is_over, on_progress)
        while True:
            try:
                if waiting.saw(found := self.get(batch_id)):
                    return found
            except DaemonUnreachable as exc:
                waiting.missed(exc)
            time.sleep(waiting.pause())

    def output(self, batch_id: str) -> Generator[bytes]:
        """The answers there are so far, as lines of the output file; readable while the batch runs."""
        yield from self._wire.lines(calls.partial_path(batch_id, failed=False))

    def errors(self, batch_id: str) -> Generator[bytes]:
        """The lines that have failed so far, as lines of the error file; readable while the batch runs."""
        yield from self._wire.lines(calls.partial_path(batch_id, failed=True))


class Items:
    """Single requests that are carried out durably: ``client.items``."""

    def __init__(self, wire: SyncWire) -> None:
        self._wire = wire

    def submit(
        self,
        *,
        model: str | None = None,
        prompt: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        launch_id: str | None = None,
        priority: int | None = None,
        expires_after_s: float | None = None,
        idempotency_key: str | None = None,
        **engine: Any,
    ) -> ItemObject:
        """Hand in a request; on the daemon's disk when this returns. Either ``model`` or ``launch_id``, either
        ``prompt`` or ``messages``; ``engine`` goes to the engine as it is (``max_tokens``, ``temperature``). The same
        ``idempotency_key`` again gives the same item; one is made when none is given."""
        own = {"model": model, "prompt": prompt, "messages": messages, "launch_id": launch_id, "priority": priority}
        fields = {**engine, **own, "expires_after_s": expires_after_s}
        return self._wire.do(calls.submit(fields, idempotency_key or uuid.uuid4().hex))

    def get(self, item_id: str, *, wait_s: float = 0) -> ItemObject:
        """The item; with ``wait_s`` (up to 60) when it has ended, or as it is after so long."""
        return self._wire.do(calls.item(item_id, wait_s))

    def wait(self, item_id: str, *, timeout_s: float | None = None) -> ItemObject:
        """Wait until an item has ended, whatever way. Raises ``EndTimeout`` (the item goes on)."""
        waiting = EndWait(f"Item {item_id}", timeout_s, _item_is_over)
        while True:
            try:
                if waiting.saw(found := self.get(item_id, wait_s=waiting.left(calls.LONGEST_ITEM_WAIT_S))):
                    return found
            except DaemonUnreachable as exc:
                waiting.missed(exc)
            time.sleep(waiting.pause())

    def list(self, **wanted: Unpack[ItemFilter]) -> Page[ItemObject]:
        """Newest first."""
        return self._wire.do(calls.items(wanted))

    def cancel(self, item_id: str) -> ItemObject:
        """Give an item up. Idempotent; one that has ended stays as it is."""
        return self._wire.do(calls.cancel_item(item_id))


def _batch_is_over(batch: BatchObject) -> bool:
    return batch.status in ENDED_BATCH


def _item_is_over(item: ItemObject) -> bool:
    return item.status in ENDED_ITEM
