"""Moving an upload: from the client to disk, and from there to an engine, each no faster than its slower end.

Invariant: while a transfer works, its source is paused or its target waited for; nothing piles up in memory. Cancelling
ends it at once and calls nobody. Must not know: what the upload is for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from vllm_bootstrap.errors import ApiError, StorageFull
from vllm_bootstrap.gateway.uploads import Upload
from vllm_bootstrap.gateway.upstream import UpstreamConnection

Done = Callable[[ApiError | None], None]


class Transfer:
    """One piece of work on an upload. ``done`` is called with None or with what went wrong."""

    def __init__(self, work: Coroutine[Any, Any, None], done: Done) -> None:
        self._done: Done | None = done
        self._task = asyncio.get_running_loop().create_task(work)
        self._task.add_done_callback(self._finished)

    def cancel(self) -> None:
        """Stop. Idempotent."""
        self._done = None
        self._task.cancel()

    def _finished(self, task: asyncio.Task[None]) -> None:
        done, self._done = self._done, None
        if task.cancelled():
            return
        problem = task.exception()
        if done is None:
            return
        if problem is None or isinstance(problem, ApiError):
            done(problem)
        elif isinstance(problem, OSError):
            done(StorageFull(f"The upload cannot be stored: {problem.strerror}"))
        else:
            done(ApiError("The upload cannot be passed on"))
            raise problem


def digest(upload: Upload, done: Done) -> Transfer:
    """Read what has come of the upload, and bring what is too much for memory to its file."""

    async def work() -> None:
        while upload.has_backlog:
            await upload.digest()

    return Transfer(work(), done)


class Sending:
    """An upload on its way to an engine. ``on_writable`` must be called when the connection has caught up."""

    def __init__(self, upload: Upload, connection: UpstreamConnection, done: Done) -> None:
        self._writable = asyncio.Event()
        self._transfer = Transfer(self._work(upload, connection), done)

    def on_writable(self) -> None:
        self._writable.set()

    def cancel(self) -> None:
        self._transfer.cancel()

    async def _work(self, upload: Upload, connection: UpstreamConnection) -> None:
        async for piece in upload.chunks():
            self._writable.clear()
            connection.write(piece)
            if connection.write_paused:
                await self._writable.wait()
