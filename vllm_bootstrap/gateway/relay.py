"""One engine's answer on its way to one client: framing, back-pressure, and an honest end when the engine fails.

Invariant: the body's bytes arrive unchanged and in order, each as soon as it is here; the client can always tell a
whole answer from a broken one (a broken stream ends with an error event and never with a false ``[DONE]``, any other
broken answer with a cut connection). At most one read of the engine is buffered beyond the client's write buffer.
Must not know: keys, queues, pools.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.gateway import headers
from vllm_bootstrap.gateway.head import Head, Headers
from vllm_bootstrap.gateway.upstream import UpstreamConnection
from vllm_bootstrap.gateway.usage import OnId, Tap, make_tap

_NO_BODY = (204, 304)


class Client(Protocol):
    """The client's connection, as one exchange sees it."""

    transport: asyncio.Transport
    write_paused: bool

    def closes_after_answer(self) -> bool:
        """Whether this answer must announce that the connection closes after it."""

    def answer_error(self, error: ApiError, request_id: str, own: Headers) -> None:
        """Answer with our own error; then as ``answer_done``."""

    def answer_done(self) -> None:
        """The answer is written; the connection goes on to the next request or closes, as announced."""

    def cut(self) -> None:
        """Close at once, without a proper end."""

    def pause_reading(self) -> None:
        """Read no more from the client. Idempotent."""

    def resume_reading(self) -> None:
        """Idempotent."""

    def become_tunnel(self, tunnel: ByteSink) -> bytes:
        """Hand raw bytes to ``tunnel`` from now on. Returns what the client has sent already."""


class ByteSink(Protocol):
    def from_client(self, data: bytes) -> None:
        """Raw bytes from the client."""

    def client_gone(self) -> None:
        """The client closed."""

    def on_client_full(self) -> None:
        """The client reads slower than it is written to."""

    def on_client_writable(self) -> None:
        """It has caught up."""


class Relay:
    """Writes one answer. ``begin`` once, then ``deliver`` until the answer is complete, or ``fail``."""

    __slots__ = ("_anthropic", "_client", "_head", "_last", "_mode", "begun", "bytes_out", "is_events", "status", "tap")

    def __init__(self, client: Client, head: Head) -> None:
        self._client = client
        self._head = head
        self._mode = ""
        self.is_events = False
        self.tap: Tap | None = None
        self._last = b""
        self._anthropic = head.path.endswith("/v1/messages")
        self.begun = False
        self.status = 0
        self.bytes_out = 0

    def begin(
        self, connection: UpstreamConnection, own: Headers, *, drops_usage: bool = False, on_id: OnId | None = None
    ) -> bytes:
        """The head of the answer, to be written together with its first bytes. The rest is for ``make_tap``."""
        self.begun = True
        self.status = connection.status
        self._look_at(connection, drops_usage=drops_usage, on_id=on_id)
        close = self._client.closes_after_answer() or self._mode == "close"
        if self.is_events:
            own = [*own, (b"x-accel-buffering", b"no")]
        return headers.to_client(connection.status, connection.headers, self._framing(connection), own, close=close)

    def _look_at(self, connection: UpstreamConnection, *, drops_usage: bool, on_id: OnId | None) -> None:
        plain, kind = True, b""
        for name, value in connection.headers:
            lower = name.lower()
            if lower == b"content-type":
                kind = value.lower()
            elif lower == b"content-encoding":
                plain = value.lower() == b"identity"
        # Nothing readable can be added to a compressed stream, or read from it.
        self.is_events = plain and kind.startswith(b"text/event-stream")
        if self._head.method == "HEAD" or connection.status in _NO_BODY:
            self._mode = "none"
        elif connection.content_length is not None and not (self.is_events and drops_usage):
            self._mode = "length"
        else:
            self._mode = "chunked" if self._head.minor_version else "close"
        if plain and connection.status == 200 and self._mode != "none":
            self.tap = make_tap(self._head.path, kind, drops_usage=drops_usage, on_id=on_id)

    def _framing(self, connection: UpstreamConnection) -> bytes:
        length = connection.content_length
        if self._mode == "chunked" or (self._mode == "none" and connection.framing == "chunked"):
            return b"transfer-encoding: chunked\r\n" if self._head.minor_version else b""
        if length is not None and connection.status != 204 and self._mode in ("length", "none"):
            return b"content-length: %b\r\n" % length
        return b""

    def deliver(self, connection: UpstreamConnection, lead: bytes = b"") -> None:
        """Write what has come; pause the engine when the client does not keep up."""
        parts, tap = connection.parts, self.tap
        if parts:
            connection.parts = []
            if tap is not None:
                parts = tap.feed(parts)
        if tap is not None and connection.complete:
            held = tap.end()
            if held:
                parts = [*parts, held]
        if self._mode == "chunked":
            self._deliver_chunked(connection, lead, parts)
        elif lead or parts:
            self.bytes_out += sum(map(len, parts)) if self._mode != "none" else 0
            self._client.transport.write(b"".join([lead, *parts]) if self._mode != "none" else lead)
        if parts:
            self._last = parts[-1]
        if self._client.write_paused:
            connection.pause()
            self._last = self._last[-4:]  # its end is all that ``fail`` looks at; a slow reader must not cost it twice

    def _deliver_chunked(self, connection: UpstreamConnection, lead: bytes, parts: list[bytes]) -> None:
        write = self._client.transport.write
        if len(parts) == 1 and not lead and not connection.complete:  # the usual piece of a stream
            part = parts[0]
            self.bytes_out += len(part)
            write(b"%x\r\n%b\r\n" % (len(part), part))
            return
        size = sum(map(len, parts))
        self.bytes_out += size
        chunk = [b"%x\r\n" % size, *parts, b"\r\n"] if size else []
        end = headers.trailers_to_client(connection.trailers) if connection.complete else b""
        if lead or size or end:
            write(b"".join([lead, *chunk, end]))

    def fail(self, error: ApiError) -> None:
        """The engine failed after the head was sent: end the stream with an error event, or cut the connection."""
        if not self.is_events or self._mode == "length":
            self._client.cut()
            return
        at_boundary = not self._last or self._last.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))
        event = headers.error_event(error, at_boundary=at_boundary, anthropic=self._anthropic)
        if self._mode == "chunked":
            event = b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)
        self._client.transport.write(event)
        self._client.answer_done()
