"""The connections to one engine: made when needed, kept for reuse while they are surely still open.

Invariant: an idle connection is used again only within ``keep_alive_s`` (below the engine's own limit), the one used
last first; what belongs to one endpoint is never used for another. Must not know: clients, keys, requests.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

from vllm_bootstrap.errors import ApiError, UpstreamError, UpstreamTimeout
from vllm_bootstrap.gateway.outbox import Outbox
from vllm_bootstrap.gateway.upstream import UpstreamConnection
from vllm_bootstrap.serving import Endpoint

BACKLOG_PAUSE_S = 0.02
USED_OF_KEPT = 0.75
"""Of the time for which an engine keeps an idle connection, the part in which it is used again. The rest is for engines
that stand still for a while: one closes what has become too old before it reads what came in time."""

_log = logging.getLogger(__name__)


class Pool:
    """Connections to one endpoint. ``keep_alive_s``: how long an idle one may be used again, unless the endpoint says
    how long the engine keeps it."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        connect_timeout_s: float,
        keep_alive_s: float,
        tls: ssl.SSLContext | None = None,
        outbox: Outbox | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.outbox = outbox or Outbox()
        self._connect_timeout_s = connect_timeout_s
        known = endpoint.keep_alive_s
        self._keep_alive_s = keep_alive_s if known is None else known * USED_OF_KEPT
        self._tls = tls
        self._idle: list[UpstreamConnection] = []
        self._closed = False

    def take(self, now: float) -> UpstreamConnection | None:
        """The connection that was used last, when one is fresh enough. It is the caller's until released."""
        while self._idle:
            connection = self._idle.pop()
            transport = connection.transport
            if transport is None or transport.inner.is_closing() or now - connection.idle_since >= self._keep_alive_s:
                connection.abort()
                continue
            connection.used_before = True
            return connection
        return None

    def dial(self, on_done: Callable[[UpstreamConnection | ApiError], None]) -> Dial:
        """Open a new connection; ``on_done`` gets it or the reason why not, unless the dial is cancelled before."""
        return Dial(self._connect(), on_done, self._connect_timeout_s)

    async def _connect(self) -> UpstreamConnection:
        loop, endpoint = asyncio.get_running_loop(), self.endpoint
        make: Callable[[], Any] = functools.partial(UpstreamConnection, self)  # a protocol, but not by name
        if endpoint.uds is not None:
            return await _connect_unix(loop, make, endpoint.uds)
        assert endpoint.host is not None  # noqa: S101 - an endpoint is one or the other
        tls = (self._tls or default_tls()) if endpoint.tls else None
        connection: UpstreamConnection
        _, connection = await loop.create_connection(make, endpoint.host, endpoint.port or 0, ssl=tls)
        return connection

    def keep(self, connection: UpstreamConnection, now: float) -> None:
        """Take an idle connection back (``UpstreamConnection.release`` is the way to call this)."""
        if self._closed:
            connection.abort()
            return
        connection.idle_since = now
        self._idle.append(connection)

    def discard(self, connection: UpstreamConnection) -> None:
        """An idle connection ended or spoke unasked."""
        if connection in self._idle:
            self._idle.remove(connection)
        connection.abort()

    def sweep(self, now: float) -> None:
        """Close connections that have been idle for too long."""
        expired = [one for one in self._idle if now - one.idle_since >= self._keep_alive_s]
        for connection in expired:
            self.discard(connection)

    def close(self) -> None:
        """Close idle connections, now and in future. Idempotent; those in use go on."""
        self._closed = True
        for connection in self._idle:
            connection.abort()
        self._idle = []

    @property
    def idle(self) -> int:
        return len(self._idle)


class Dial:
    """A connection being made."""

    def __init__(
        self,
        connecting: Coroutine[Any, Any, UpstreamConnection],
        on_done: Callable[[UpstreamConnection | ApiError], None],
        timeout_s: float,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._on_done: Callable[[UpstreamConnection | ApiError], None] | None = on_done
        self._task = loop.create_task(connecting)
        self._task.add_done_callback(self._finished)
        self._too_late = loop.call_later(timeout_s, self._give_up)

    def cancel(self) -> None:
        """Forget it; a connection that comes anyway is closed. Idempotent."""
        self._on_done = None
        self._task.cancel()

    def _give_up(self) -> None:
        on_done = self._on_done
        self.cancel()
        if on_done is not None:
            on_done(UpstreamTimeout("The engine did not accept a connection in time"))

    def _finished(self, task: asyncio.Task[UpstreamConnection]) -> None:
        self._too_late.cancel()
        on_done, self._on_done = self._on_done, None
        if task.cancelled():
            return
        problem = task.exception()
        if on_done is not None and problem is None and task.result().transport is None:  # nobody would ever be told
            problem = ConnectionResetError(errno.ECONNRESET, "it closed the connection at once")
        if on_done is not None:
            on_done(task.result() if problem is None else _explain(problem))
        elif problem is None:
            task.result().abort()


async def _connect_unix(loop: asyncio.AbstractEventLoop, make: Callable[[], Any], path: str) -> UpstreamConnection:
    """Connect, waiting while the engine's queue of connections is full: a Unix socket says so at once, where a port
    makes the caller wait. The caller bounds the time."""
    while True:
        try:
            connection: UpstreamConnection
            _, connection = await loop.create_unix_connection(make, path)
            return connection
        except BlockingIOError:
            await asyncio.sleep(BACKLOG_PAUSE_S)


def _explain(problem: BaseException) -> ApiError:
    if isinstance(problem, TimeoutError):
        return UpstreamTimeout("The engine did not accept a connection in time")
    if isinstance(problem, OSError):
        return UpstreamError(f"The engine cannot be reached ({problem.strerror or type(problem).__name__})")
    _log.error("connecting to an engine failed", exc_info=problem)
    return UpstreamError("The engine cannot be reached")


@functools.cache
def default_tls() -> ssl.SSLContext:
    """Certificates are checked against the system's authorities."""
    return ssl.create_default_context()
