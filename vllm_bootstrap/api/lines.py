"""An answer made of JSON lines as they come out of their source, at the pace at which the client takes them.

Invariant: one piece is held in memory; the source is closed on every way out. An answer that cannot be finished is cut
off, never ended in good order: who reads it must be able to tell that there was more. Knows nothing of what lines mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm_bootstrap.api.envelope import HEAD_FLAG
from vllm_bootstrap.api.sse import disconnected

log = logging.getLogger(__name__)
MEDIA_TYPE = "application/jsonl"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


async def answer_lines(
    request: Request, source: AsyncGenerator[bytes, None], may_go_on: Callable[[], bool]
) -> Response:
    """The answer that streams ``source``. What the source raises at its begin is raised here, while there is a status
    left to tell it by. ``HEAD`` gets no more than that."""
    try:
        first = await anext(source, None)
    except BaseException:
        await source.aclose()
        raise
    if HEAD_FLAG in request.scope:
        await source.aclose()
        return _Lines(None, source, may_go_on)
    return _Lines(first, source, may_go_on)


class _Lines(Response):
    """``may_go_on`` is asked before each piece: a revoked key and a daemon that shuts down cut the answer off."""

    media_type = MEDIA_TYPE

    def __init__(self, first: bytes | None, source: AsyncGenerator[bytes, None], may_go_on: Callable[[], bool]) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._first, self._source, self._may_go_on = first, source, may_go_on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        gone = asyncio.ensure_future(disconnected(receive))
        piece = self._first
        try:
            while piece is not None and not gone.done():
                if not self._may_go_on():
                    log.info("%s is cut off: its key or the daemon has come to an end", scope["path"])
                    return
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                piece = await anext(self._source, None)
        finally:
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            await self._source.aclose()
        if piece is None:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
