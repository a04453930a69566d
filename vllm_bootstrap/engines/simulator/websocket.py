"""``/v1/realtime``: a small RFC 6455 server that sends back what it is sent.

After the greeting event each whole message comes back with its own kind and bytes. Three texts make it act, so that
a proxy's handling can be seen: ``close:CODE:REASON`` closes with them, ``ping:DATA`` sends a ping, ``drop`` breaks
the connection without a closing handshake.

Invariant: a broken frame closes the connection with the code the RFC names; at most one closing frame is sent.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Callable

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
NORMAL, GOING_AWAY, PROTOCOL_ERROR, NO_CODE, BAD_DATA, TOO_BIG = 1000, 1001, 1002, 1005, 1007, 1009


def accept_key(key: bytes) -> bytes:
    return base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())


def handshake(key: bytes, subprotocol: bytes | None) -> bytes:
    """The answer that turns the connection into a websocket."""
    chosen = b"" if subprotocol is None else b"sec-websocket-protocol: %b\r\n" % subprotocol
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
        b"sec-websocket-accept: %b\r\n%b\r\n" % (accept_key(key), chosen)
    )


def frame(opcode: int, payload: bytes) -> bytes:
    """A whole, unmasked message."""
    size = len(payload)
    if size < 126:
        head = bytes((0x80 | opcode, size))
    elif size < 1 << 16:
        head = bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big")
    return head + payload


def unmask(payload: bytes, mask: bytes) -> bytes:
    size = len(payload)
    pad = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(pad, "big")).to_bytes(size, "big")


class BrokenFrame(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Frames:
    """Bytes in, messages out: ``(opcode, payload)`` with fragments joined and control frames in between."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._kind: int | None = None
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> tuple[int, bytes] | None:
        """The next whole message, or None while bytes are missing. Raises ``BrokenFrame``."""
        while (got := self._frame()) is not None:
            final, opcode, payload = got
            if opcode >= CLOSE:
                return opcode, payload
            if (opcode == CONTINUATION) == (self._kind is None):
                raise BrokenFrame(PROTOCOL_ERROR)
            self._kind = self._kind if self._kind is not None else opcode
            self._parts.append(payload)
            if sum(map(len, self._parts)) > MAX_MESSAGE_BYTES:
                raise BrokenFrame(TOO_BIG)
            if final:
                kind, parts = self._kind, self._parts
                self._kind, self._parts = None, []
                return kind, b"".join(parts)
        return None

    def _frame(self) -> tuple[bool, int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        final, opcode, size = bool(buffer[0] & 0x80), buffer[0] & 0x0F, buffer[1] & 0x7F
        control = opcode >= CLOSE
        if buffer[0] & 0x70 or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG) or not buffer[1] & 0x80:
            raise BrokenFrame(PROTOCOL_ERROR)
        if control and (size > 125 or not final):
            raise BrokenFrame(PROTOCOL_ERROR)
        wide = {126: 2, 127: 8}.get(size, 0)
        if wide:
            size = int.from_bytes(buffer[2 : 2 + wide], "big")
        if len(buffer) < 2 + wide:
            return None
        if size > MAX_MESSAGE_BYTES:
            raise BrokenFrame(TOO_BIG)
        start = 2 + wide + 4
        if len(buffer) < start + size:
            return None
        payload = unmask(bytes(buffer[start : start + size]), bytes(buffer[start - 4 : start]))
        del buffer[: start + size]
        return final, opcode, payload


class WebSocket(asyncio.Protocol):
    """One connection after its handshake. ``on_closed`` is called once, when it is gone."""

    def __init__(self, transport: asyncio.Transport, on_closed: Callable[[WebSocket], None]) -> None:
        self._transport = transport
        self._frames = Frames()
        self._on_closed = on_closed
        self._closing = False

    def greet(self, session: str) -> None:
        self._send(TEXT, json.dumps({"type": "session.created", "id": session}).encode())

    def data_received(self, data: bytes) -> None:
        self._frames.feed(data)
        try:
            while not self._closing and (message := self._frames.next()) is not None:
                self._handle(*message)
        except BrokenFrame as exc:
            self.close(exc.code)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._on_closed(self)

    def pause_writing(self) -> None:
        # What comes back is what came in: reading no more is all the back-pressure needed.
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    def close(self, code: int, reason: str = "") -> None:
        """Send the closing frame and close. Idempotent."""
        if not self._closing:
            self._closing = True
            payload = b"" if code == NO_CODE else code.to_bytes(2, "big") + reason.encode()[:123]
            self._transport.write(frame(CLOSE, payload))
            self._transport.close()

    def _handle(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            self._send(PONG, payload)
        elif opcode == CLOSE:
            self._answer_close(payload)
        elif opcode == TEXT:
            self._handle_text(payload)
        elif opcode == BINARY:
            self._send(BINARY, payload)

    def _handle_text(self, payload: bytes) -> None:
        try:
            text = payload.decode()
        except UnicodeDecodeError:
            raise BrokenFrame(BAD_DATA) from None
        verb, _, rest = text.partition(":")
        if verb == "close" and rest[:4].isdigit():
            self.close(int(rest[:4]), rest[5:])
        elif verb == "ping" and len(rest) < 126:
            self._send(PING, rest.encode()[:125])
        elif text == "drop":
            self._closing = True
            self._transport.abort()
        else:
            self._send(TEXT, payload)

    def _answer_close(self, payload: bytes) -> None:
        code = int.from_bytes(payload[:2], "big") if payload else NO_CODE
        valid = code in {*range(1000, 1004), *range(1007, 1012), NO_CODE} or 3000 <= code < 5000
        self.close(code if valid and len(payload) != 1 else PROTOCOL_ERROR)

    def _send(self, opcode: int, payload: bytes) -> None:
        self._transport.write(frame(opcode, payload))
