"""A websocket after its handshake: two byte streams tied together, each as fast as its slower end.

Invariant: bytes pass both ways unchanged (frames, close codes and pings belong to the two ends); whatever one end has
sent before it closed still reaches the other. Must not know: HTTP, keys, queues.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vllm_bootstrap.gateway import headers
from vllm_bootstrap.gateway.head import Head, Headers
from vllm_bootstrap.gateway.relay import Client
from vllm_bootstrap.gateway.upstream import UpstreamConnection

FLUSH_S = 5.0
"""How long the last bytes may take to leave towards an end that is still open."""


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
    """``over`` is called once, when either end has closed."""

    def __init__(self, client: Client, connection: UpstreamConnection, over: Callable[[], None]) -> None:
        self._client = client
        self._engine = connection
        self._over: Callable[[], None] | None = over
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
        """End both sides, for a daemon that stops."""
        self.client_gone()
        self._client.transport.close()

    # From the client

    def from_client(self, data: bytes) -> None:
        self.bytes_in += len(data)
        self._engine.write(data)

    def client_gone(self) -> None:
        if self._finish():
            self._engine.close_gently(FLUSH_S)

    def on_client_full(self) -> None:
        self._engine.pause()

    def on_client_writable(self) -> None:
        self._engine.resume()

    # From the engine

    def from_engine(self, data: bytes) -> None:
        self.bytes_out += len(data)
        self._client.transport.write(data)

    def engine_gone(self) -> None:
        if self._finish():
            transport = self._client.transport
            transport.close()
            asyncio.get_running_loop().call_later(FLUSH_S, transport.abort)

    def on_upstream_full(self) -> None:
        self._client.pause_reading()

    def on_upstream_writable(self) -> None:
        self._client.resume_reading()

    def _finish(self) -> bool:
        over, self._over = self._over, None
        if over is not None:
            over()
        return over is not None
