"""The real file store behind the control plane, for clients that upload and download, and a way to cut answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.batch_desks import FakeBatches, FakeItems
from tests.support.control_plane import make
from tests.support.listening import Listening
from vllm_bootstrap.api.app import build_api
from vllm_bootstrap.api.services import Services
from vllm_bootstrap.batches.files import FileStore
from vllm_bootstrap.db import Database


class BatchBox(Listening):
    """The control plane with files on disk. ``cuts``: after so many bytes each of the next downloads breaks off."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.cuts: list[int] = []
        self.ranges: list[str | None] = []
        inner = build_api(services)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if not scope["path"].endswith("/content"):
                await inner(scope, receive, send)
                return
            self.ranges.append(dict(scope["headers"]).get(b"range", b"").decode() or None)
            left = self.cuts.pop(0) if self.cuts else None

            async def cut_send(message: Any) -> None:
                nonlocal left
                body = message.get("body", b"")
                if left is not None and message["type"] == "http.response.body" and len(body) >= left:
                    await send({**message, "body": body[:left], "more_body": True})
                    raise ConnectionAbortedError
                if left is not None:
                    left -= len(body)
                await send(message)

            try:
                await inner(scope, receive, cut_send)
            except ConnectionAbortedError:
                return

        super().__init__(app)

    @property
    def batches(self) -> FakeBatches:
        assert isinstance(self.services.batches, FakeBatches)
        return self.services.batches

    @property
    def items(self) -> FakeItems:
        assert isinstance(self.services.items, FakeItems)
        return self.services.items


@contextmanager
def batch_box(folder: Path) -> Iterator[BatchBox]:
    """A daemon whose files lie in ``folder``; batches and items are made up."""
    db = Database.open(folder / "state.db")
    services = make()
    store = FileStore(db, folder / "files", max_bytes=2**30, expires_after_s=86400, reserve_bytes=0)
    services.files = store
    assert isinstance(services.batches, FakeBatches)
    services.batches.shelf = store
    try:
        with BatchBox(services) as box:
            yield box
    finally:
        store.close()
        db.close()
