"""A connection to an engine: one request at a time, its answer parsed by llhttp.

Invariant: bytes whose framing was not understood are never handed on, and a connection is offered for reuse only
after an answer that ended exactly where its framing said, on a connection both sides may keep. Must not know: clients,
keys, routes, how connections are made and kept.

llhttp understands the framing, but for one case that is most of what there is: where llhttp stands between two chunks
and what comes is one whole plain chunk (``chunks.py``), that may pass it by: ``skim`` answers for what it takes, and
llhttp stands then where it stood. It saves a tenth of what a streamed chunk costs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import httptools

from vllm_bootstrap.gateway import headers as heads
from vllm_bootstrap.gateway.head import Headers
from vllm_bootstrap.gateway.outbox import HeldTransport, Outbox

MAX_RESPONSE_HEAD = 256 * 1024
"""Bytes of an answer's head, and of what stands between two pieces of its body: sizes of chunks, trailers."""
# A kept-alive connection that breaks within this time of being reused had been closed by the engine before.
STALE_WITHIN_S = 1.0

_NO_BODY = (101, 204, 304)
_EMPTY = (None, b"0")  # lengths of no body

Skim = Callable[[bytes], bool]
"""Is shown what comes after a whole chunk, as it came. Takes it, if it is one whole plain chunk and nothing else (not
the last one), or leaves it. Returns whether it took it."""


class Receiver(Protocol):
    """Who gets an answer. Methods are called from the event loop, never after ``release`` or ``abort``."""

    def on_received(self, connection: UpstreamConnection) -> None:
        """Something of the answer is there: look at ``head_ready``, take ``parts``, look at ``complete``."""

    def on_broken(self, connection: UpstreamConnection, reason: str) -> None:
        """The connection ended or spoke nonsense before the answer was complete."""

    def on_upstream_writable(self) -> None:
        """What was written to the engine has left for the most part."""

    def on_crash(self) -> None:
        """Passing on what came has raised what it should not (called where that is being handled)."""


class Splice(Protocol):
    """Who gets raw bytes once a connection has stopped speaking HTTP."""

    def from_engine(self, data: bytes) -> None:
        """Bytes from the engine."""

    def engine_gone(self) -> None:
        """The engine closed the connection."""

    def on_upstream_writable(self) -> None:
        """What was written to the engine has left for the most part."""

    def on_upstream_full(self) -> None:
        """The engine reads slower than it is written to."""


class _Unintelligible(Exception):
    """Stops the parser: what comes now is no part of an answer we understand."""


class Keeper(Protocol):
    """Where a connection goes back to."""

    outbox: Outbox

    def keep(self, connection: UpstreamConnection, now: float) -> None:
        """It is idle and may be used again."""

    def discard(self, connection: UpstreamConnection) -> None:
        """It ended or spoke unasked while idle."""


class UpstreamConnection:
    """One connection. Between ``start`` and the answer's end it belongs to one receiver.

    ``status``, ``headers`` and ``trailers`` are the answer's, ``content_length`` and ``date`` apart from the others;
    ``framing`` is "length", "chunked", "close" or "none"; ``answer`` what the head comes to. ``parts`` are those of the
    body that nobody has taken yet. ``flow``, once the receiver has set it, is what pieces of the body go to until the
    answer is complete, without a detour over the receiver; what ``skim`` takes does not even get there.
    """

    __slots__ = (
        "_barren", "_expects_upgrade", "_head_bytes", "_head_only", "_interim", "_keeper", "_parser", "_paused",
        "_receiver", "_reusable", "_splice", "answer", "complete", "content_length", "date", "flow", "framing",
        "head_ready", "headers", "idle_since", "on_body", "parts", "skim", "started_at", "status", "trailers",
        "transport", "upgraded", "used_before", "write_paused",
    )  # fmt: skip

    answer: heads.AnswerHead  # there when ``head_ready``

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self.transport: HeldTransport | None = None
        self.used_before = False
        self.started_at = self.idle_since = 0.0
        self._receiver: Receiver | None = None
        self._splice: Splice | None = None
        self._paused = self.write_paused = False
        self._head_only = self._expects_upgrade = self._interim = self._reusable = False
        self._head_bytes = self.status = 0
        self.headers: Headers = []
        self.trailers: Headers = []
        self.content_length: bytes | None = None
        self.date: bytes | None = None
        self.framing = "close"
        self.head_ready = self.complete = False
        self.upgraded: bytes | None = None
        self.parts: list[bytes] = []  # always this one list: the parser adds to it by itself
        self.on_body = self.parts.append
        self.flow: Callable[[bytes], None] | None = None
        self.skim: Skim | None = None
        # 0: what the parser had last ended with a chunk's last byte. Else 1 and what was read since the last size line
        # without bringing anything of a body.
        self._barren = 1
        self._parser = httptools.HttpResponseParser(self)

    # For the owner

    def start(
        self, receiver: Receiver, data: bytes, *, now: float, head_only: bool = False, upgrade: bool = False
    ) -> None:
        """Send a request's first bytes; the answer goes to ``receiver``. ``head_only``: the answer has no body
        whatever its headers say. ``upgrade``: a 101 is welcome."""
        self._receiver = receiver
        self._head_only, self._expects_upgrade = head_only, upgrade
        self._head_bytes = self.status = 0
        self.headers, self.trailers = [], []
        self.content_length = self.date = self.upgraded = None
        self.framing = "close"
        self.head_ready = self.complete = self._interim = self._reusable = False
        self.parts.clear()
        self.started_at = now
        if self.transport is not None:
            self.transport.write(data)

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def take(self) -> bytes:
        """What has come of the body, as one piece."""
        parts = self.parts
        if len(parts) == 1:
            return parts.pop()
        piece = b"".join(parts)
        parts.clear()
        return piece

    @property
    def silent(self) -> bool:
        """Whether not one byte of an answer has come."""
        return not self.head_ready and self._head_bytes == 0

    def pause(self) -> None:
        """Read no more from the engine for now. Idempotent."""
        if not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._paused and self.transport is not None:
            self._paused = False
            self.transport.resume_reading()

    def splice(self, splice: Splice) -> bytes:
        """Stop speaking HTTP: from now on bytes go to ``splice``. Returns what came after the 101 already."""
        self._receiver, self._splice = None, splice
        rest, self.upgraded = self.upgraded or b"", None
        return rest

    def release(self, now: float) -> None:
        """The answer is over: keep the connection if it may be used again, else close it."""
        self._receiver = self.flow = self.skim = None
        transport = self.transport
        whole = self.complete and self._reusable
        if whole and transport is not None and transport.is_clear():
            if self._paused:
                self.resume()
            self._keeper.keep(self, now)
        else:
            self.abort()

    def abort(self) -> None:
        """Close at once; the engine notices and gives up the request. Idempotent, nobody is called any more."""
        self._receiver = self._splice = self.flow = self.skim = None
        transport, self.transport = self.transport, None
        if transport is not None:
            transport.abort()

    def close_gently(self, within_s: float) -> None:
        """Close once what was written has left, at the latest after ``within_s``. Only a splice is told then."""
        self._receiver = None
        transport = self.transport
        if transport is not None:
            transport.close()
            asyncio.get_running_loop().call_later(within_s, transport.abort)

    # From the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = self._keeper.outbox.wrap(transport)

    def data_received(self, data: bytes) -> None:
        receiver = self._receiver
        if receiver is None:
            self._take_unasked(data)
            return
        problem: str | None = None
        try:
            if not self._barren and self.skim is not None and self.skim(data):
                return
            problem = self._parse(data)
            if self.head_ready:  # what was understood goes on even if what follows it was not
                flow = self.flow
                if flow is None or self.complete:
                    receiver.on_received(self)
                elif self.parts:
                    flow(self.parts.pop() if len(self.parts) == 1 else self.take())
        except Exception:  # noqa: BLE001 - a mistake must not leave a client waiting
            receiver.on_crash()
        if problem is not None and not self.complete:
            self._break(problem)

    def _parse(self, data: bytes) -> str | None:
        """Returns what is wrong with it."""
        problem: str | None = None
        if not self.head_ready:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            problem = self._stopped(exc, data)
        if not (self._barren or data.endswith(b"\r\n")):  # the next size's first digits are there already
            self._barren = 1
        if not self.parts:
            if not self.head_ready:
                if self._head_bytes > MAX_RESPONSE_HEAD:
                    return f"sent headers larger than {MAX_RESPONSE_HEAD} bytes"
            elif self.framing == "chunked" and self._barren and not self.complete:
                self._barren += len(data)
                if self._barren > MAX_RESPONSE_HEAD:
                    return f"sent trailers larger than {MAX_RESPONSE_HEAD} bytes"
        return problem

    def _stopped(self, why: Exception, data: bytes) -> str | None:
        """The parser went no further. Returns what is wrong with that."""
        if isinstance(why, httptools.HttpParserUpgrade):
            self.upgraded = bytes(data[why.args[0] :])
            return None
        self._reusable = False
        return f"sent no valid HTTP ({why.__context__ or why})"

    def _take_unasked(self, data: bytes) -> None:
        if self._splice is not None:
            self._splice.from_engine(data)
        else:  # nothing was asked: this connection is of no use any more
            self._keeper.discard(self)

    def pause_writing(self) -> None:
        self.write_paused = True
        if self._splice is not None:
            self._splice.on_upstream_full()

    def resume_writing(self) -> None:
        self.write_paused = False
        listener = self._splice or self._receiver
        if listener is not None:
            listener.on_upstream_writable()

    def eof_received(self) -> None:
        """The engine sends no more: the connection closes."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self._splice is not None:
            self._splice.engine_gone()
            return
        receiver = self._receiver
        if receiver is None:
            self._keeper.discard(self)
        elif self.head_ready and self.framing == "close" and exc is None and not self.complete:
            self.complete = True  # such a body ends with the connection
            try:
                receiver.on_received(self)
            except Exception:  # noqa: BLE001
                receiver.on_crash()
        elif not self.complete:
            self._break("closed the connection" if exc is None else f"broke the connection ({exc})")

    def _break(self, reason: str) -> None:
        receiver, self._receiver = self._receiver, None
        self.abort()
        if receiver is not None:
            receiver.on_broken(self, reason)

    # From the parser

    def on_message_begin(self) -> None:
        if self.complete:
            self._reusable = False
            raise _Unintelligible("a second answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head_ready:
            self.trailers.append((name, value))
            return
        lower = name.lower()
        if lower == b"content-length":
            self.content_length = value
        elif lower == b"date":
            self.date = value
        else:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.status = status = self._parser.get_status_code()
        if status < 200:
            if status != 101:
                coded = any(name.lower() == b"transfer-encoding" for name, _ in self.headers)
                if coded or self.content_length not in _EMPTY:
                    raise _Unintelligible("a body in an interim answer")
                self._interim = True
                return
            if not self._expects_upgrade:
                raise _Unintelligible("a protocol switch")
        self.answer = answer = heads.answer_head(status, self.headers)
        codings = answer.codings
        if status in _NO_BODY:
            # One that announces a body may send it yet, and that must never be read as the next answer.
            self.framing = "close" if codings or self.content_length not in _EMPTY else "none"
        elif codings:
            if codings != [b"chunked"]:
                raise _Unintelligible("a transfer coding other than chunked")
            self.framing = "chunked"
        elif self.content_length is not None:
            self.framing = "length"
        self.head_ready = True
        if self._head_only:  # llhttp does not know that this answers a HEAD: it must not read on
            self.complete = True
            self._reusable = False

    def on_chunk_header(self) -> None:
        self._barren = 1

    def on_chunk_complete(self) -> None:
        self._barren = 0

    def on_message_complete(self) -> None:
        self._barren = 1
        if self._interim:
            self._interim = False
            self.headers = []
            self.content_length = self.date = None
            return
        self.complete = True
        if not self._head_only:
            self._reusable = self.framing != "close" and bool(self._parser.should_keep_alive())
