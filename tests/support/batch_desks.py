"""Files, batches and items in memory: what the routes' protocols promise, without disk, engines or time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from vllm_bootstrap.api.services import FileShelf, IncomingFile
from vllm_bootstrap.batches import jobs
from vllm_bootstrap.batches.jobs import Event
from vllm_bootstrap.batches.types import (
    BatchEvent,
    BatchRow,
    BatchView,
    FileRow,
    ItemView,
    NewBatch,
    NewItem,
    Progress,
)
from vllm_bootstrap.errors import BadRequest, Conflict, NotFound, StorageFailed, StorageFull

NOW = 1_800_000_000.0
T = TypeVar("T")


def page_of(rows: list[T], ids: list[str], after: str | None, limit: int) -> tuple[list[T], bool]:
    """Newest first, behind ``after``."""
    newest = [row for name, row in sorted(zip(ids, rows, strict=True), key=lambda pair: pair[0], reverse=True)
              if after is None or name < after]  # fmt: skip
    return newest[:limit], len(newest) > limit


class Repeats:
    """Idempotency-Keys of one desk."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[Any, str]] = {}

    def earlier(self, new: NewBatch | NewItem) -> str | None:
        found = self._known.get((new.owner, new.idempotency_key or ""))
        if found is None:
            return None
        if found[0] != new:
            raise BadRequest("This Idempotency-Key was used for another request.", param="idempotency-key")
        return found[1]

    def note(self, new: NewBatch | NewItem, made: str) -> None:
        if new.idempotency_key is not None:
            self._known[new.owner, new.idempotency_key] = (new, made)


@dataclass
class FakeShelf:
    """Files that have only a row. Lists are newest first."""

    rows: dict[str, FileRow] = field(default_factory=dict)

    def add(self, file_id: str, owner: str, purpose: str = "batch") -> FileRow:
        self.rows[file_id] = row = FileRow(file_id, owner, purpose, "in.jsonl", 10, NOW, None)
        return row

    def receive(
        self, owner: str, purpose: str, filename: str, expires_after_s: float | None, *, expected_bytes: int = 0
    ) -> IncomingFile:
        raise StorageFull("There is room for rows only.")

    async def get(self, file_id: str, owner: str | None) -> FileRow:
        row = self.rows.get(file_id)
        if row is None or owner not in {None, row.owner}:
            raise NotFound(f"No file {file_id!r}.", param="file_id")
        return row

    async def list(
        self, owner: str | None, *, purpose: str | None, after: str | None, limit: int, ascending: bool
    ) -> tuple[Sequence[FileRow], bool]:
        found = [row for row in self.rows.values() if owner in {None, row.owner} and purpose in {None, row.purpose}]
        return page_of(found, [row.id for row in found], after, limit)

    async def open(self, file_id: str, owner: str | None) -> tuple[FileRow, Path]:
        raise StorageFailed(f"Of {(await self.get(file_id, owner)).id} there is only a row.")

    async def delete(self, file_id: str, owner: str | None) -> None:
        del self.rows[(await self.get(file_id, owner)).id]


@dataclass
class FakeBatches:
    """``shelf``: where inputs must be. ``accepted``: what was asked for, by id. ``pieces``: what partial output comes
    in; an exception is raised in its place. ``news``: further views of a watched batch. ``closed``: generators that
    were closed."""

    shelf: FileShelf = field(default_factory=FakeShelf)
    views: dict[str, BatchView] = field(default_factory=dict)
    accepted: dict[str, NewBatch] = field(default_factory=dict)
    history: dict[str, list[BatchEvent]] = field(default_factory=dict)
    pieces: dict[bool, list[bytes | Exception]] = field(default_factory=lambda: {False: [], True: []})
    news: asyncio.Queue[BatchView] | None = None
    closed: list[str] = field(default_factory=list)
    repeats: Repeats = field(default_factory=Repeats)

    def put(self, number: int, owner: str, **fields: Any) -> BatchView:
        """A batch as it stands."""
        progress = fields.pop("progress", Progress())
        base = BatchRow(
            id=batch_id(number), owner=owner, endpoint="/v1/completions", input_file_id="file-1",
            completion_window="24h", created_at=NOW, expires_at=NOW + 86400, phase=jobs.IN_PROGRESS,
        )  # fmt: skip
        return self._store(BatchView(replace(base, **fields), progress))

    def _store(self, view: BatchView) -> BatchView:
        self.views[view.row.id] = view
        return view

    def _change(self, view: BatchView, **fields: Any) -> BatchView:
        return self._store(replace(view, row=replace(view.row, **fields)))

    def states(self) -> dict[str, int]:
        live = [view.row for view in self.views.values() if view.row.phase.state not in jobs.TERMINAL]
        return {**Counter(row.phase.state.value for row in live), "paused": sum(row.paused for row in live)}

    async def create(self, new: NewBatch) -> BatchView:
        if (await self.shelf.get(new.input_file_id, new.owner)).purpose != "batch":
            raise BadRequest("The file was uploaded for something else.", param="input_file_id")
        known = self.repeats.earlier(new)
        if known is not None:
            return self.views[known]
        view = self.put(
            len(self.views) + 1, new.owner, endpoint=new.endpoint, input_file_id=new.input_file_id,
            completion_window=new.completion_window, expires_at=NOW + new.window_s, phase=jobs.VALIDATING,
            priority=new.priority, launch_id=new.launch_id, metadata=new.metadata, webhook=new.webhook,
        )  # fmt: skip
        self.accepted[view.row.id] = new
        self.repeats.note(new, view.row.id)
        return view

    async def get(self, batch_id: str, owner: str | None) -> BatchView:
        view = self.views.get(batch_id)
        if view is None or owner not in {None, view.row.owner}:
            raise NotFound(f"No batch {batch_id!r}.", param="batch_id")
        return view

    async def list(self, owner: str | None, *, after: str | None, limit: int) -> tuple[Sequence[BatchView], bool]:
        found = [view for view in self.views.values() if owner in {None, view.row.owner}]
        return page_of(found, [view.row.id for view in found], after, limit)

    async def cancel(self, batch_id: str, owner: str | None) -> BatchView:
        view = await self.get(batch_id, owner)
        return self._change(view, phase=jobs.advance(view.row.phase, Event.CANCEL_REQUESTED))

    async def _live(self, batch_id: str, owner: str | None) -> BatchView:
        view = await self.get(batch_id, owner)
        if view.row.phase.state in jobs.TERMINAL:
            raise Conflict("It has ended.", param="batch_id")
        return view

    async def pause(self, batch_id: str, owner: str | None) -> BatchView:
        return self._change(await self._live(batch_id, owner), paused=True)

    async def resume(self, batch_id: str, owner: str | None) -> BatchView:
        return self._change(await self._live(batch_id, owner), paused=False)

    async def retry(self, batch_id: str, owner: str | None) -> BatchView:
        view = await self.get(batch_id, owner)
        if view.row.phase.state not in jobs.RETRYABLE or not view.row.counts.failed:
            raise Conflict("There is nothing to run again.", param="batch_id")
        phase = jobs.advance(view.row.phase, Event.RETRY_REQUESTED)
        return self._change(view, phase=phase, counts=view.row.counts._replace(failed=0))

    async def set_priority(self, batch_id: str, owner: str | None, priority: int) -> BatchView:
        return self._change(await self.get(batch_id, owner), priority=priority)

    async def delete(self, batch_id: str, owner: str | None) -> None:
        view = await self.get(batch_id, owner)
        if view.row.phase.state not in jobs.TERMINAL:
            raise Conflict("It has not ended.", param="batch_id")
        del self.views[view.row.id]

    async def events(self, batch_id: str, owner: str | None, *, after: int, limit: int) -> Sequence[BatchEvent]:
        await self.get(batch_id, owner)
        return [row for row in self.history.get(batch_id, []) if row.seq > after][:limit]

    async def watch(self, batch_id: str, owner: str | None) -> AsyncGenerator[BatchView, None]:
        try:
            view = await self.get(batch_id, owner)
            yield view
            while self.news is not None and view.row.phase.state not in jobs.TERMINAL:
                view = await self.news.get()
                yield view
        finally:
            self.closed.append(batch_id)

    async def partial(self, batch_id: str, owner: str | None, *, failed: bool) -> AsyncGenerator[bytes, None]:
        try:
            await self.get(batch_id, owner)
            for piece in self.pieces[failed]:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.closed.append(batch_id)


@dataclass
class FakeItems:
    """``waiting``: how many wait for an item's end at the moment; ``patience``: what each was ready to wait."""

    views: dict[str, ItemView] = field(default_factory=dict)
    accepted: dict[str, NewItem] = field(default_factory=dict)
    waiting: int = 0
    patience: list[float] = field(default_factory=list)
    repeats: Repeats = field(default_factory=Repeats)
    changed: dict[str, asyncio.Event] = field(default_factory=dict)

    def put(self, number: int, owner: str, **fields: Any) -> ItemView:
        """An item as it stands."""
        base = ItemView(
            id=item_id(number), owner=owner, path="/v1/completions", model="m", launch_id=None, priority=0,
            state="queued", attempts=0, created_at=NOW, expires_at=NOW + 86400,
        )  # fmt: skip
        return self._store(replace(base, **fields))

    def _store(self, view: ItemView) -> ItemView:
        self.views[view.id] = view
        if view.ended_at is not None and view.id in self.changed:
            self.changed[view.id].set()
        return view

    def finish(self, number: int) -> ItemView:
        view = self.views[item_id(number)]
        response = {"status_code": 200, "request_id": "req-1", "body": {"choices": []}}
        return self._store(replace(view, state="completed", attempts=1, ended_at=NOW + 9, response=response))

    async def submit(self, new: NewItem) -> ItemView:
        known = self.repeats.earlier(new)
        if known is not None:
            return self.views[known]
        view = self.put(
            len(self.views) + 1, new.owner, path=new.path, model=new.model, launch_id=new.launch_id,
            priority=new.priority, expires_at=NOW + (new.expires_after_s or 86400),
        )  # fmt: skip
        self.accepted[view.id] = new
        self.repeats.note(new, view.id)
        return view

    async def get(self, item_id: str, owner: str | None, *, wait_s: float = 0) -> ItemView:
        view = self.views.get(item_id)
        if view is None or owner not in {None, view.owner}:
            raise NotFound(f"No item {item_id!r}.", param="item_id")
        if wait_s and view.ended_at is None:
            self.patience.append(wait_s)
            self.waiting += 1
            event = self.changed[item_id] = asyncio.Event()
            try:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), wait_s)
            finally:
                self.waiting -= 1
        return self.views[item_id]

    async def list(
        self, owner: str | None, *, state: str | None, after: str | None, limit: int
    ) -> tuple[Sequence[ItemView], bool]:
        found = [v for v in self.views.values() if owner in {None, v.owner} and state in {None, v.state}]
        return page_of(found, [view.id for view in found], after, limit)

    async def cancel(self, item_id: str, owner: str | None) -> ItemView:
        view = await self.get(item_id, owner)
        if view.ended_at is not None:
            return view
        return self._store(replace(view, state="cancelled", ended_at=NOW + 5))


def batch_id(number: int) -> str:
    return f"batch_{number:020d}"


def item_id(number: int) -> str:
    return f"item_{number:020d}"
