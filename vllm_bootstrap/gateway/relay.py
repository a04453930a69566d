"""One engine's answer on its way to one client: framing, back-pressure, and an honest end when the engine fails.

Invariant: the body's bytes arrive unchanged and in order, each as soon as it is here; the client can always tell a
whole answer from a broken one (a broken stream ends with an error event and never with a false ``[DONE]``, any other
broken answer with a cut connection). At most one read of the engine is buffered beyond the client's write buffer.
Must not know: keys, queues, pools.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.gateway import headers
from vllm_bootstrap.gateway.chunks import KNOWN, SIZE_LINES, framed
from vllm_bootstrap.gateway.head import Head, Headers
from vllm_bootstrap.gateway.outbox import HeldTransport
from vllm_bootstrap.gateway.upstream import Skim, UpstreamConnection
from vllm_bootstrap.gateway.usage import EVENT_END, USAGE_MARK, EventTap, OnId, Tap, make_tap

_NO_BODY = (204, 304)
_CHUNKED = b"transfer-encoding: chunked\r\n"


class Client(Protocol):
    """The client's connection, as one exchange sees it."""

    transport: HeldTransport
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
    """Writes one answer. ``begin`` once, then ``deliver`` until the answer is complete, or ``fail``. What
    comes in between may go to ``flow()`` piece by piece. Before all that an event stream may be ``announce``d and get
    ``comment``s; what then ``begin``s must be one (``continues``)."""

    __slots__ = (
        "_bytes_seen", "_client", "_events", "_head", "_last", "_mode", "_write", "announced", "begun", "bytes_out",
        "is_events", "status", "tap",
    )  # fmt: skip

    _write: Callable[[bytes], None]  # the client's, from ``flow`` on
    _events: EventTap  # the tap, from ``skim`` on

    def __init__(self, client: Client, head: Head) -> None:
        self._client = client
        self._head = head
        self._mode, self._last = "", b""
        self.begun = self.is_events = self.announced = False
        self.status = self.bytes_out = self._bytes_seen = 0
        self.tap: Tap | None = None

    def announce(self, request_id: str, own: bytes) -> None:
        """Begin an event stream before any engine has answered. ``own``: header lines of ours."""
        self.begun = self.is_events = self.announced = True
        self.status = 200
        if self._head.minor_version:
            self._mode = "chunked"
            own += _CHUNKED
        else:
            self._mode = "close"
        close = self._client.closes_after_answer() or self._mode == "close"
        self._client.transport.write(headers.stream_head(request_id, own, close=close))

    def comment(self, text: str) -> None:
        """Say something in an announced stream that readers of events skip. No line ends in ``text``."""
        piece = b": %b\n\n" % text.encode("utf-8", "replace")
        self.bytes_out += len(piece)
        self._client.transport.write(framed(piece) if self._mode == "chunked" else piece)

    def continues(self, connection: UpstreamConnection) -> bool:
        """Whether an engine's answer can go on where a stream was announced."""
        return connection.status == 200 and connection.answer.is_events

    def begin(
        self, connection: UpstreamConnection, own: bytes, *, drops_usage: bool = False, on_id: OnId | None = None
    ) -> bytes:
        """The head of the answer, to be written together with its first bytes (none, where it was announced). ``own``:
        header lines of ours. The rest is for ``make_tap``."""
        head, answer, length = self._head, connection.answer, connection.content_length
        if self.announced:
            self.tap = make_tap(head.path, answer.kind, drops_usage=drops_usage, on_id=on_id)
            return b""
        self.begun = True
        self.status = status = connection.status
        self.is_events = is_events = answer.is_events
        if head.method == "HEAD" or status in _NO_BODY:
            mode = "none"
            own += self._framing_of_nothing(connection)
        elif length is not None and not (is_events and drops_usage):
            mode = "length"
            own += b"content-length: %b\r\n" % length
        elif head.minor_version:
            mode = "chunked"
            own += _CHUNKED
        else:
            mode = "close"
        self._mode = mode
        if status == 200 and answer.kind and mode != "none":
            self.tap = make_tap(head.path, answer.kind, drops_usage=drops_usage, on_id=on_id)
        if connection.date is not None and not answer.drops_date:
            own += b"date: %b\r\n" % connection.date
        if is_events:
            own += b"x-accel-buffering: no\r\n"
        close = self._client.closes_after_answer() or mode == "close"
        return headers.to_client(answer, own, close=close)

    def _framing_of_nothing(self, connection: UpstreamConnection) -> bytes:
        """What the answer to a HEAD, or a 304, says about a body that does not follow."""
        if connection.framing == "chunked":
            return _CHUNKED if self._head.minor_version else b""
        if connection.content_length is not None and connection.status != 204:
            return b"content-length: %b\r\n" % connection.content_length
        return b""

    def flow(self) -> Callable[[bytes], None] | None:
        """What passes on single pieces at the least cost, None for an answer that can have none. Whether the client
        keeps up is not looked at for each: it tells the exchange by itself, which pauses the engine."""
        if self._mode == "none":
            return None
        self._write = self._client.transport.write_now
        return self._pass_on_chunk if self._mode == "chunked" else self._pass_on

    def skim(self) -> Skim | None:
        """What passes on the usual chunks before they come to ``flow()``, None for an answer that has none."""
        if self._mode != "chunked" or not isinstance(self.tap, EventTap):
            return None
        self._events = self.tap
        return self._pass_on_event

    def _pass_on_chunk(self, piece: bytes) -> None:
        """A piece of a stream that ``skim`` left."""
        tap = self.tap
        if tap is None:
            self._last = piece[-4:]  # the whole piece would stay in memory until the next one
        else:
            piece = tap.feed(piece)
            if not piece:
                return
        self.bytes_out += len(piece)
        self._write(framed(piece))

    def _pass_on_event(self, data: bytes) -> bool:
        """The usual chunk of an event stream, if ``data`` is one: a whole plain chunk (``chunks.py``) of one whole
        event, of which the tap wants nothing but that it is counted. It leaves as it came. (Written out, because calls
        are most of what this costs.)"""
        length, tap = len(data), self._events
        if (
            length < KNOWN
            and tap.is_idle
            and data.startswith(line := SIZE_LINES[length])
            and data.find(EVENT_END, start := len(line)) == length - 4
            and data.endswith(b"\r\n")
            and data.find(USAGE_MARK) < 0
        ):
            tap.tokens += 1
            self.bytes_out += length - start - 2
            self._write(data)
            return True
        return False

    def _pass_on(self, piece: bytes) -> None:
        """A piece of a body that needs no framing."""
        if self.tap is not None:
            piece = self.tap.feed(piece)
        self.bytes_out += len(piece)
        self._last = piece[-4:]
        self._write(piece)

    def deliver(self, connection: UpstreamConnection, lead: bytes = b"") -> None:
        """Write what has come; pause the engine when the client does not keep up."""
        tap, mode, complete, client = self.tap, self._mode, connection.complete, self._client
        parts = connection.parts
        piece = parts.pop() if len(parts) == 1 else connection.take()
        if tap is not None:
            if complete:
                piece = tap.end(piece)
            elif piece:
                piece = tap.feed(piece)
        if piece and mode != "none":
            self.bytes_out += len(piece)
            self._last = piece[-4:]
            lead += framed(piece) if mode == "chunked" else piece
        if complete and mode == "chunked":
            lead += headers.trailers_to_client(connection.trailers)
        if lead:
            client.transport.write(lead)
        if client.write_paused:
            connection.pause()

    def has_moved(self) -> bool:
        """Whether anything has come since this was last asked."""
        seen, self._bytes_seen = self._bytes_seen, self.bytes_out
        return seen != self.bytes_out

    def fail(self, error: ApiError) -> None:
        """The engine failed after the head was sent: end the stream with an error event, or cut the connection."""
        if not self.is_events or self._mode == "length":
            self._client.cut()
            return
        if self.tap is not None:
            at_boundary = self.tap.between_events
        else:
            at_boundary = not self._last or self._last.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))
        anthropic = self._head.path.endswith("/v1/messages")
        event = headers.error_event(error, at_boundary=at_boundary, anthropic=anthropic)
        if self._mode == "chunked":
            event = framed(event) + b"0\r\n\r\n"
        self._client.transport.write(event)
        self._client.answer_done()
