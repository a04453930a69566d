"""A websocket after its handshake: two byte streams tied together, each as fast as its slower end.

Invariant: bytes pass both ways unchanged (frames, close codes and pings belong to the two ends); whatever one end has
sent before it closed still reaches the other, if that takes it in time. The place is given back when the engine's
connection is closed, not before, and that is at most about a second after the client has left. Must not know: HTTP,
keys, queues.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable

from vllm_bootstrap.gateway import headers
from vllm_bootstrap.gateway.head import Head, Headers
from vllm_bootstrap.gateway.relay import Client
from vllm_bootstrap.gateway.upstream import UpstreamConnection

FLUSH_S = 5.0
"""How long the last bytes may take to leave towards a client that is still there."""
ENGINE_FLUSH_S = 0.4
"""The same towards an engine, whose place others may wait for. It may be spent twice: on what we have not read yet, and
on what we have not got rid of."""
LOOK_S = 0.2
"""How often to look whether a client is still there that is not being read from."""

_SAID_ALL = getattr(select, "POLLRDHUP", 0)


def accepted(head: Head, answer: Headers) -> bool:
    """Whether a 101 really accepts this client's websocket handshake: only then may bytes pass unparsed."""
    fields = {name.lower(): value.strip() for name, value in answer}
    key = head.first(b"sec-websocket-key")
    return (
        key is not None
        and fields.get(b"upgrade", b"").lower() == b"websocket"
        and fields.get(b"sec-websocket-accept") == headers.websocket_accept(key)
    )


class Tunnel:
    """``over`` is called once, when the engine's connection is closed."""

    def __init__(self, client: Client, connection: UpstreamConnection, over: Callable[[], None]) -> None:
        self._client = client
        self._engine = connection
        self._over: Callable[[], None] | None = over
        self._client_left = False
        self._looking: asyncio.TimerHandle | None = None
        self._patience_ends: float | None = None  # in loop time, once the client has said all it has to say
        self.bytes_in = self.bytes_out = 0

    def open(self, lead: bytes) -> None:
        """Start passing bytes; ``lead`` (the 101) goes to the client first."""
        early = self._engine.splice(self)
        self._client.transport.write(lead + early)
        ahead = self._client.become_tunnel(self)
        if self._client.write_paused:  # by an answer before this one: that was said to nobody who could have told us
            self._engine.pause()
        if ahead:
            self.from_client(ahead)

    def close(self) -> None:
        """End both sides, for a daemon that stops or a request that is cancelled."""
        self._engine.abort()
        self._finish()
        self._client.transport.close()

    # From the client

    def from_client(self, data: bytes) -> None:
        self.bytes_in += len(data)
        self._engine.write(data)

    def client_gone(self) -> None:
        if not (self._client_left or self._over is None):
            self._client_left = True
            self._look_no_more()
            self._engine.close_gently(ENGINE_FLUSH_S)

    def on_client_full(self) -> None:
        self._engine.pause()

    def on_client_writable(self) -> None:
        self._engine.resume()

    # From the engine

    def from_engine(self, data: bytes) -> None:
        self.bytes_out += len(data)
        self._client.transport.write(data)

    def engine_gone(self) -> None:
        if self._finish() and not self._client_left:
            transport = self._client.transport
            transport.close()
            asyncio.get_running_loop().call_later(FLUSH_S, transport.abort)

    def on_upstream_full(self) -> None:
        if not self._client_left:
            self._client.pause_reading()
            if self._looking is None:
                self._look_later(LOOK_S)

    def on_upstream_writable(self) -> None:
        if not self._client_left:
            self._client.resume_reading()
            if self._patience_ends is None:
                self._look_no_more()

    # A client that is not being read from: nobody would tell us that it has left

    def _look_later(self, after_s: float) -> None:
        self._looking = asyncio.get_running_loop().call_later(after_s, self._look)

    def _look_no_more(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

    def _look(self) -> None:
        self._looking = None
        now = asyncio.get_running_loop().time()
        seen = _seen_of(self._client)
        if seen & (select.POLLERR | select.POLLHUP) or (self._patience_ends or now + 1) <= now:
            self._client_left = True  # and what it has left behind is read by nobody
            self._engine.abort()
            self._finish()
            self._client.transport.abort()
        elif seen & _SAID_ALL and self._patience_ends is None:
            self._patience_ends = now + ENGINE_FLUSH_S
            self._look_later(ENGINE_FLUSH_S)
        else:
            self._look_later(LOOK_S)

    def _finish(self) -> bool:
        over, self._over = self._over, None
        self._look_no_more()
        if over is not None:
            over()
        return over is not None


def _seen_of(client: Client) -> int:
    """What the kernel knows of a connection that nobody reads from: poll's bits."""
    poll = select.poll()
    poll.register(client.transport.get_extra_info("socket").fileno(), _SAID_ALL)
    return next((seen for _, seen in poll.poll(0)), 0)
