"""Server-sent events: a response that ends when its source ends, its client goes, or its caller may no longer listen.

Invariant: at most one event is held in memory; the source is closed on every way out. A comment is sent from time to
time, so that proxies keep the connection and a dead client is noticed. Knows nothing of what events mean.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm_bootstrap.api.envelope import HEAD_FLAG

TICK_S = 1.0
HEARTBEAT_S = 15.0
MEDIA_TYPE = "text/event-stream"


def wanted(request: Request, *, follow: bool = False) -> bool:
    """Whether the client asked for a stream. ``HEAD`` never gets one."""
    accepted = [part.split(";")[0].strip() for part in request.headers.get("accept", "").split(",")]
    return (follow or MEDIA_TYPE in accepted) and HEAD_FLAG not in request.scope


def event(data: str, *, name: str | None = None, event_id: str | None = None) -> bytes:
    """One event in wire form. ``data`` is JSON in one line."""
    head = (f"id: {event_id}\n" if event_id is not None else "") + (f"event: {name}\n" if name else "")
    return f"{head}data: {data}\n\n".encode()


class EventStream(Response):
    """Streams ``source``. ``may_go_on`` is asked every second and before each event: a revoked key or a daemon that
    shuts down ends the stream. Times in seconds."""

    media_type = MEDIA_TYPE

    def __init__(
        self,
        source: AsyncGenerator[bytes, None],
        may_go_on: Callable[[], bool],
        *,
        tick_s: float = TICK_S,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._source, self._may_go_on = source, may_go_on
        self._tick_s, self._heartbeat_s = tick_s, heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await self._relay(gone, send)
        finally:
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            await self._source.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _relay(self, gone: asyncio.Future[None], send: Send) -> None:
        loop = asyncio.get_running_loop()
        quiet_since = loop.time()
        following = self._following()
        try:
            while self._may_go_on():
                await asyncio.wait((gone, following), timeout=self._tick_s, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                if following.done():
                    chunk = following.result()
                    if chunk is None or not self._may_go_on():
                        return
                elif loop.time() - quiet_since >= self._heartbeat_s:
                    chunk = b": still here\n\n"
                else:
                    continue
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                quiet_since = loop.time()
                if following.done():
                    following = self._following()
        finally:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following

    def _following(self) -> asyncio.Future[bytes | None]:
        return asyncio.ensure_future(anext(self._source, None))


async def disconnected(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
