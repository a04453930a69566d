"""A client's connection, strict about every request before anything else sees it.

Invariant: a request is looked at only when the one before it has been read and answered; nothing reaches uvicorn's
own code, the app or an engine whose head did not pass ``head.parse_head`` and whose body llhttp does not frame the
same way; every refusal has our error shape; every state has a deadline. Must not know: keys, queues, engines.

A connection is always in one of these: between requests, reading a head, reading a body and/or answering, lingering
(refused early: what still comes is dropped until the client has read why), closed.

Requests sent ahead of an answer (pipelining) are served in order; sent in excess, or behind a chunked body, they cost
the connection after the current answer, which HTTP allows.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any, ClassVar

import httptools
from uvicorn.config import Config
from uvicorn.server import ServerState

from vllm_bootstrap.errors import ApiError, BadRequest, Draining, RequestTimeout, Unavailable
from vllm_bootstrap.gateway import headers
from vllm_bootstrap.gateway.claims import Claims
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.gateway.head import Head, Headers
from vllm_bootstrap.gateway.inbox import Inbox
from vllm_bootstrap.gateway.late import LateProtocol
from vllm_bootstrap.gateway.limits import LINGER_S, MIN_BODY_RATE
from vllm_bootstrap.gateway.outbox import HeldTransport

_NEVER = math.inf


class _Disagreement(Exception):
    """llhttp sees a request begin or end where it does not by our own reading."""


class _BodySink:
    """What llhttp calls for a claimed request: no header callbacks, because the head was read already."""

    def __init__(self, protocol: StrictProtocol) -> None:
        self.on_message_begin = protocol.message_begins
        self.on_body = protocol.on_claimed_body
        self.on_message_complete = protocol.message_ends


class StrictProtocol(Claims, LateProtocol):
    """uvicorn's protocol made strict. A subclass may claim requests; the others go to the ASGI app.
    What it must be able to do for that: ``Claims``.
    """

    gateway: ClassVar[Gateway]
    transport: HeldTransport  # type: ignore[assignment] # a transport, but not by name

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.write_paused = False
        self._paused_since = 0.0
        self._deadline = _NEVER
        self._inbox = Inbox(self.gateway.head_limits)
        self._in_head = self._advancing = self._closing = self._stopping = False
        self._body_parser: httptools.HttpRequestParser | None = None
        self._answer_open = self._body_open = self._claimed = self._message_due = False
        self._keep = True
        self._head: Head | None = None
        self._body_started_at = 0.0
        self._body_bytes = 0

    # Life of the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(self.gateway.outbox.wrap(transport))
        if not self.gateway.join(self):
            self.refuse(Unavailable("Too many connections", retry_after=1))
            return
        self._deadline = self.loop.time() + self.gateway.limits.header_timeout_s
        self.gateway.idle[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._closing = True
        self._deadline = _NEVER
        self.gateway.leave(self)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._body_open:
            self._advancing = True  # an answer given from within the parser must not feed it the next request
            try:
                self._read_body(data)
            finally:
                self._advancing = False
            self._advance()
        elif self._answer_open:
            self.early(data)
        else:
            self._inbox.add(data)
            self._advance()

    def early(self, data: bytes) -> None:
        """Bytes of a later request while an answer is owed."""
        self._inbox.add_early(data)

    # Heads

    def _advance(self) -> None:
        """Serve what has been received, one request after the other, until more bytes or an answer are awaited."""
        if self._advancing:
            return
        self._advancing = True
        busy = self._answer_open or self._body_open or self._closing
        try:
            while not busy and self._inbox.ahead and self._take_head():
                busy = self._answer_open or self._body_open or self._closing
        finally:
            self._advancing = False
        if not (busy or self._closing):  # a head that was refused closes
            self._await_head()

    def _await_head(self) -> None:
        """Set the deadline for what comes next: the rest of a head, or the next request."""
        limits = self.gateway.limits
        if not self._inbox.ahead:
            self._in_head = False
            self._deadline = self.loop.time() + limits.keep_alive_s
            self.gateway.idle[self] = None
        elif not self._in_head:  # its first bytes: the deadline does not move with those that follow
            self._in_head = True
            self._deadline = self.loop.time() + limits.header_timeout_s
            self.gateway.idle.pop(self, None)

    def _take_head(self) -> bool:
        """Start the next request. False: its head is not whole yet, or was refused."""
        try:
            raw = self._inbox.take_head()
            if raw is None:
                return False
            head = self._head
            if head is None or head.memory is None or head.raw != raw:  # else it is the last one, once more
                head = self.gateway.heads.read(raw)
            self._claimed = head.memory is not None or self.claim(head)
        except ApiError as error:
            self._head = None
            self.refuse(error)
            return False
        self._begin(head)
        return True

    def _begin(self, head: Head) -> None:
        gateway, inbox = self.gateway, self._inbox
        gateway.idle.pop(self, None)
        self._head = head
        self._keep = head.keep_alive and not (gateway.draining or self._stopping)
        self._in_head = False
        self._deadline = _NEVER
        self._answer_open = True
        memory = head.memory
        if memory is not None and memory.framed:
            # llhttp has framed this very head before, by the length that is counted here.
            body = inbox.take_body(head.content_length or 0)
            if body is not None:
                self.claimed_whole(head, body)
                return
        inbox.expect(head)
        self._body_open = self._message_due = True
        if head.chunked or head.content_length:
            self._await_body()
        if self._claimed:
            self._begin_claimed(head)
        else:
            self.prepare_app()
            self.app_begins(head)
        if self._body_open and inbox.ahead:
            self._read_body(inbox.take_ahead())

    def _begin_claimed(self, head: Head) -> None:
        if self._body_parser is None:
            self._body_parser = httptools.HttpRequestParser(_BodySink(self))
        self.claimed_begins(head)
        if self._closing:
            return
        ahead = self._inbox.take_ahead()  # usually the whole body: the parser is called once for both
        self.feed(self._body_parser, head.raw + self._inbox.body_part(ahead) if ahead else head.raw)

    # Bodies

    def _await_body(self) -> None:
        self._body_bytes = 0
        self._body_started_at = self.loop.time()
        self._deadline = self._body_started_at + self.gateway.limits.body_timeout_s

    def _read_body(self, data: bytes) -> None:
        self.feed(self._body_parser if self._claimed else self.parser, self._inbox.body_part(data))

    def feed(self, parser: httptools.HttpRequestParser | None, data: bytes) -> None:
        """Let llhttp frame ``data``; what it does not understand ends the request."""
        if parser is None or not data:
            return
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._renew_parser()
            if self._body_open:
                self.body_is_bad(BadRequest(f"The request is not valid HTTP/1.1: {exc}"))
            else:
                self._keep = False  # more than one request behind a chunked body

    def _renew_parser(self) -> None:
        if self._claimed:
            self._body_parser = None
        else:
            self.parser = httptools.HttpRequestParser(self)

    def body_is_bad(self, error: ApiError) -> None:
        """Nothing after this can be understood: answer if that is still possible, and close."""
        self._keep = False
        if not self._answer_open:
            self._close_softly()
        elif self._claimed:
            self.claimed_is_bad(error)
        else:
            self.fail_app(error)

    def message_begins(self) -> None:
        """llhttp begins a message: the one whose head was passed on, or one too many."""
        if not self._message_due:
            raise _Disagreement
        self._message_due = False

    def on_claimed_body(self, body: bytes) -> None:
        """llhttp has a piece of a claimed request's body."""
        self._body_bytes += len(body)
        if self._answer_open:
            self.claimed_body(body)

    def message_ends(self) -> None:
        """llhttp has seen the end of the request."""
        if self._inbox.misses_some:
            raise _Disagreement
        self._body_open = False
        self._deadline = _NEVER
        if self._claimed and self._answer_open:
            if self._head is not None and self._head.memory is not None:
                self._head.memory.framed = True
            self.claimed_ends()

    # Answers

    def closes_after_answer(self) -> bool:
        """Whether the connection cannot go on after this answer. Once said, it stays so."""
        if self._inbox.overflowed or (self._body_open and not self._inbox.rest_is_small):
            self._keep = False
        return not self._keep

    def answer_error(self, error: ApiError, request_id: str | None, own: Headers) -> None:
        """Answer with an error of ours; then as ``answer_done``."""
        close = self.closes_after_answer()
        self._write_error(error, request_id or self.gateway.new_request_id(), own, close=close)
        self.answer_done()

    def answer_done(self) -> None:
        """The answer was written: go on to the next request or close."""
        self._answer_open = False
        if self.closes_after_answer():
            self._close_softly()
        elif not (self._body_open or self._advancing or self._closing):
            if self._inbox.ahead:
                self._advance()
            else:
                self._await_head()

    def cut(self) -> None:
        """Close at once: the answer cannot be ended properly."""
        self._answer_open = False
        self._closing = True
        self.gateway.outbox.flush()  # what was written before counts as sent: it may be a whole answer
        self.transport.abort()

    def refuse(self, error: ApiError) -> None:
        """Answer a request that is not one, or one too many, and close."""
        self._write_error(error, self.gateway.new_request_id(), [], close=True)
        self._close_softly(linger=True)

    def _write_error(self, error: ApiError, request_id: str, own: Headers, *, close: bool) -> None:
        body = self._head is None or self._head.method != "HEAD"
        own = [*self.server_state.default_headers, *own]
        self.transport.write(headers.error_answer(error, request_id=request_id, close=close, own=own, body=body))

    # Back-pressure

    def pause_reading(self) -> None:
        """Read no more from the client; its deadline stands still. Idempotent."""
        self.flow.pause_reading()
        self._deadline = _NEVER

    def resume_reading(self) -> None:
        """Idempotent."""
        self.flow.resume_reading()
        if self._body_open and not self._closing:
            self._await_body()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.write_paused = True
        self._paused_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.write_paused = False

    # Deadlines and the end

    def tick(self, now: float) -> None:
        """Look at deadlines."""
        if self.write_paused and now - self._paused_since >= self.gateway.limits.write_stall_timeout_s:
            self.transport.abort()  # connection_lost tells whoever is concerned
            return
        if self._body_open and self.flow.read_paused:
            # It is we who do not read: of that time the client loses nothing.
            self._body_started_at = max(self._body_started_at, now - self._body_bytes / MIN_BODY_RATE)
        if now >= self._deadline:
            self._on_deadline(now)
        elif self._claimed and self._answer_open:
            self.claimed_tick(now)

    def _on_deadline(self, now: float) -> None:
        if self._closing:
            self.transport.abort()
        elif self._body_open:
            self._on_slow_body(now)
        elif self._inbox.ahead:
            self._head = None
            self.refuse(RequestTimeout("The request's head did not arrive in time"))
        else:
            self.close_idle()

    def _on_slow_body(self, now: float) -> None:
        limits = self.gateway.limits
        due = self._body_started_at + limits.body_timeout_s + self._body_bytes / MIN_BODY_RATE
        if now < due:
            self._deadline = due
        else:
            self.body_is_bad(RequestTimeout("The request's body did not arrive in time"))

    def close_idle(self) -> None:
        """Close without a word; nothing is owed."""
        self._closing = True
        self.gateway.idle.pop(self, None)
        self._deadline = self.loop.time() + LINGER_S
        self.transport.close()

    def shutdown(self) -> None:
        """The server stops: close when nothing is owed, else after the current answer."""
        self._stopping = True
        self._keep = False
        if not (self._answer_open or self._body_open):
            self.close_idle()
        elif self.cycle is not None:
            self.cycle.keep_alive = False

    def stop(self) -> None:
        """End what is under way with an honest error, then close."""
        self.shutdown()
        if self._answer_open:
            self.body_is_bad(Draining("The daemon is stopping", retry_after=5))

    def _close_softly(self, *, linger: bool = False) -> None:
        """Close so that the client can read what was written. ``linger``: it may still be sending, and a plain close
        would make its system throw the answer away, so what comes is read and dropped for a while."""
        self._closing = True
        self._answer_open = False
        self._inbox.take_ahead()
        self.gateway.idle.pop(self, None)
        self.flow.resume_reading()
        if linger or self._body_open:
            self._deadline = _NEVER
            self.loop.call_later(LINGER_S, self.transport.abort)
            if self.transport.can_write_eof():
                self.transport.write_eof()
        else:
            self._deadline = self.loop.time() + self.gateway.limits.write_stall_timeout_s
            self.transport.close()
