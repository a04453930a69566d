"""HTTP/1.1 on one connection: parsing with llhttp, exchanges in order, chunked streams, keep-alive.

Invariant: exchanges of a connection are answered one at a time and in order; a connection that is lost cancels the
exchange that runs on it at once; no timer of a closed connection stays.
It must not know any route.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from time import time
from typing import Any, Protocol, cast

import httptools

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
MAX_PIPELINED = 64
MAX_BODY_BYTES = 512 * 1024 * 1024
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class Body(Protocol):
    """Takes a request body as it arrives."""

    def feed(self, data: bytes) -> None: ...
    def close(self) -> None: ...


class Service(Protocol):
    """What a connection needs from the server."""

    keep_alive_timeout: float
    connections: set[HttpProtocol]

    def dispatch(self, exchange: Exchange) -> None: ...
    def open_body(self, exchange: Exchange) -> Body | None: ...
    def upgrade(self, exchange: Exchange, transport: asyncio.Transport, rest: bytes) -> bool: ...


class Exchange:
    """A request and its answer. ``path`` is without the query; header names are lower case."""

    __slots__ = (
        "_chunked", "_parts", "_protocol", "body", "closed", "headers", "keep_alive", "method", "on_cancel",
        "on_resume", "path", "size", "target", "upload", "version",
    )  # fmt: skip

    def __init__(self, protocol: HttpProtocol) -> None:
        self._protocol = protocol
        self._parts: list[bytes] = []
        self._chunked = True
        self.method = ""
        self.target = b""
        self.path = ""
        self.version = "1.1"
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.size = 0
        self.upload: Any = None
        self.keep_alive = True
        self.closed = False
        self.on_cancel: Callable[[], None] | None = None
        self.on_resume: Callable[[], None] | None = None

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def writable(self) -> bool:
        """False while the client reads too slowly; ``on_resume`` is called when that ends."""
        return self._protocol.writable

    def feed(self, data: bytes) -> None:
        self.size += len(data)
        if self.upload is not None:
            self.upload.feed(data)
        elif self.size <= MAX_BODY_BYTES:
            self._parts.append(data)

    def complete(self, *, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.body = b"".join(self._parts)
        self._parts = []
        if self.upload is not None:
            self.upload.close()

    def respond(self, status: int, body: bytes, content_type: bytes = JSON, extra: bytes = b"") -> None:
        """Send a whole answer. ``extra``: header lines, each ending in CRLF."""
        if self.closed:
            return
        length = b"content-length: %d\r\n" % len(body)
        head = self._head(status, content_type, length + extra)
        self._protocol.write(head if self.method == "HEAD" else head + body)
        self._done()

    def start_stream(self, content_type: bytes = EVENT_STREAM) -> None:
        self._chunked = self.version != "1.0"
        self.keep_alive = self.keep_alive and self._chunked
        self._protocol.write(self._head(200, content_type, b"transfer-encoding: chunked\r\n" if self._chunked else b""))

    def write(self, data: bytes) -> None:
        """Send a piece of a stream."""
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._protocol.write(data)

    def end_stream(self) -> None:
        if not self.closed:
            if self._chunked:
                self._protocol.write(b"0\r\n\r\n")
            self._done()

    def cancel(self) -> None:
        """The client is gone."""
        self.closed = True
        if self.on_cancel is not None:
            self.on_cancel()

    def _head(self, status: int, content_type: bytes, extra: bytes) -> bytes:
        connection = b"" if self.keep_alive else b"connection: close\r\n"
        return b"HTTP/1.1 %d %b\r\ndate: %b\r\nserver: simulator\r\ncontent-type: %b\r\n%b%b\r\n" % (
            status, _REASONS.get(status, b""), _date(), content_type, extra, connection,
        )  # fmt: skip

    def _done(self) -> None:
        self.closed = True
        self.on_cancel = self.on_resume = None
        self._protocol.exchange_done(self.keep_alive)


_date_at, _date_text = 0, b""


def _date() -> bytes:
    global _date_at, _date_text
    now = int(time())
    if now != _date_at:
        _date_at, _date_text = now, formatdate(now, usegmt=True).encode()
    return _date_text


class HttpProtocol(asyncio.Protocol):
    """One connection."""

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop) -> None:
        self._service = service
        self._loop = loop
        self._parser = httptools.HttpRequestParser(self)
        self._incoming = Exchange(self)
        self._active: Exchange | None = None
        self._pipelined: deque[Exchange] = deque()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._reading = True
        self._transport: asyncio.Transport
        self.write: Callable[[bytes], None]
        self.writable = True

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.write = self._transport.write
        self._service.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._service.connections.discard(self)
        self._stop_idling()
        self._pipelined.clear()
        active, self._active = self._active, None
        if active is not None:
            active.cancel()

    def data_received(self, data: bytes) -> None:
        self._stop_idling()
        while data:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as exc:
                data = data[exc.args[0] :]
                if self._is_websocket(self._incoming):
                    self._upgrade(data)
                    return
                # An upgrade nobody offers: the request was answered as if it had not asked, the next one follows.
            except httptools.HttpParserError:
                self._refuse()
                return

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        if self._active is not None and self._active.on_resume is not None:
            self._active.on_resume()

    # llhttp's side

    def on_message_begin(self) -> None:
        self._incoming = Exchange(self)

    def on_url(self, url: bytes) -> None:
        self._incoming.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._incoming.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        exchange = self._incoming
        exchange.method = self._parser.get_method().decode()
        exchange.version = self._parser.get_http_version()
        exchange.path = exchange.target.partition(b"?")[0].decode("latin-1")
        exchange.upload = self._service.open_body(exchange)
        if exchange.header(b"expect") == b"100-continue" and self._active is None:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self._incoming.feed(data)

    def on_message_complete(self) -> None:
        exchange = self._incoming
        exchange.complete(keep_alive=self._parser.should_keep_alive())
        if self._is_websocket(exchange):
            return  # the parser raises HttpParserUpgrade next
        if self._active is None:
            self._start(exchange)
        else:
            self._pipelined.append(exchange)
            if self._reading and len(self._pipelined) > MAX_PIPELINED:
                self._reading = False
                self._transport.pause_reading()

    # the exchanges' side

    def exchange_done(self, keep_alive: bool) -> None:
        self._active = None
        if not keep_alive or self._transport.is_closing():
            self._transport.close()
        elif self._pipelined:
            if not self._reading:
                self._reading = True
                self._transport.resume_reading()
            self._start(self._pipelined.popleft())
        else:
            self._idle_timer = self._loop.call_later(self._service.keep_alive_timeout, self._transport.close)

    def close(self) -> None:
        """Close after what is written; a running exchange is cancelled."""
        self._transport.close()

    @property
    def busy(self) -> bool:
        return self._active is not None

    def _start(self, exchange: Exchange) -> None:
        self._stop_idling()
        self._active = exchange
        self._service.dispatch(exchange)

    def _is_websocket(self, exchange: Exchange) -> bool:
        asked = exchange.header(b"upgrade")
        return asked is not None and asked.lower() == b"websocket" and bool(self._parser.should_upgrade())

    def _upgrade(self, rest: bytes) -> None:
        self._active = self._incoming
        if self._service.upgrade(self._incoming, self._transport, rest):
            self._service.connections.discard(self)
            self._active = None

    def _refuse(self) -> None:
        if self._active is None:
            self._active = self._incoming
            self._active.keep_alive = False
            self._active.respond(400, b"Invalid HTTP request received.", b"text/plain; charset=utf-8")
        else:
            self._transport.close()

    def _stop_idling(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
