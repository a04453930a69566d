"""One request's journey through the data plane: admitted, read, queued, sent, relayed, over.

Invariant: whatever happens at any stage (client gone, engine gone, deadline, refusal, the daemon closing), ``_end``
runs exactly once: the place in the scheduler is given back, the engine's connection is released or closed at once,
what was held in memory or files is freed, one record is left. An engine gets a request once; a second time only when
a reused connection turns out to have been closed before any byte of an answer.

Stages go forward only: reading, queued, connecting, waiting, relaying or tunnel, over. Must not know: parsing of
heads, framing towards the client, how slots are given out.
"""

from __future__ import annotations

import asyncio
import math
import time
from enum import IntEnum

from vllm_bootstrap.errors import (
    ApiError,
    Draining,
    Unavailable,
    UpstreamError,
    UpstreamTimeout,
)
from vllm_bootstrap.gateway import headers, targets, transfer, websocket
from vllm_bootstrap.gateway.entry import Entry, Outgoing, admit, render, target_of, ticket_of
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.gateway.head import Head, Headers
from vllm_bootstrap.gateway.intake import Intake, make_intake
from vllm_bootstrap.gateway.limits import RequestRecord
from vllm_bootstrap.gateway.pool import Dial, Pool
from vllm_bootstrap.gateway.relay import Client, Relay
from vllm_bootstrap.gateway.upstream import STALE_WITHIN_S, UpstreamConnection
from vllm_bootstrap.scheduler.gate import Lease, Pending
from vllm_bootstrap.serving import Instance, RequestClass

CLIENT_GONE = 499
_JOINED_BYTES = 16 * 1024  # up to this size a copy is cheaper than a second write


class Stage(IntEnum):
    READING = 0
    QUEUED = 1
    CONNECTING = 2
    WAITING = 3
    RELAYING = 4
    TUNNEL = 5
    OVER = 6


# As plain names: looking a member up on its class costs more than a chunk's bookkeeping.
READING, QUEUED, CONNECTING, WAITING, RELAYING, TUNNEL, OVER = Stage


class Exchange:
    """Made for one request by the client's connection, which calls ``start``, ``on_body``…, ``on_body_end`` and then
    whatever happens to it. All methods are safe to call once it is over."""

    _stage = READING
    _active = _body_ended = _retried = False
    _sent_all = True
    _bytes_in = _reserved = _queue_ms = 0
    _deadline = math.inf
    _granted_at = 0.0
    _first_byte_at: float | None = None
    _entry: Entry | None = None
    _intake: Intake | None = None
    _instance: Instance | None = None
    _cls: RequestClass | None = None
    _pending: Pending | None = None
    _lease: Lease | None = None
    _connection: UpstreamConnection | None = None
    _tunnel: websocket.Tunnel | None = None
    _dial: Dial | None = None
    _spooling: transfer.Transfer | None = None
    _sending: transfer.Sending | None = None
    _outgoing: Outgoing | None = None
    _upstream_id: str | None = None

    def __init__(
        self, gateway: Gateway, client: Client, head: Head, target: targets.ToModel | targets.ToLaunch
    ) -> None:
        self._gateway, self._client, self._head, self._target = gateway, client, head, target
        self._loop = asyncio.get_running_loop()
        self._started_at = time.monotonic()  # the loop's time stands still within an iteration
        self._relay = Relay(client, head)
        self.request_id = headers.valid_request_id(head.first(b"x-request-id")) or gateway.new_request_id()

    # Reading

    def start(self) -> None:
        """The head is here."""
        try:
            if self._gateway.draining:
                raise Draining("The daemon is stopping", retry_after=5)
            self._entry = entry = admit(self._gateway, self._head, self._target)
            self._intake = make_intake(self._head, entry.route, self._gateway.limits, self._gateway.spool_dir)
        except ApiError as error:
            self.fail(error)
            return
        if self._head.expects_continue and self._head.has_body:
            self._client.transport.write(headers.CONTINUE)

    def on_body(self, piece: bytes) -> None:
        intake = self._intake
        if self._stage is not READING or intake is None:
            return
        self._bytes_in += len(piece)
        try:
            intake.feed(piece)
            self._reserve(intake.in_memory - self._reserved)
        except ApiError as error:
            self.fail(error)
            return
        if intake.upload is not None and intake.upload.is_full and self._spooling is None:
            self._client.pause_reading()
            self._spooling = transfer.to_disk(intake.upload, self._spooled)

    def _spooled(self, problem: ApiError | None) -> None:
        self._spooling = None
        if problem is not None:
            self.fail(problem)
            return
        self._client.resume_reading()
        if self._body_ended:
            self._dispatch()

    def _reserve(self, size: int) -> None:
        self._reserved += size
        self._gateway.body_bytes += size
        if self._gateway.body_bytes > self._gateway.limits.body_budget_bytes:
            raise Unavailable("Too many large requests are under way", retry_after=1)

    def on_body_end(self) -> None:
        """The body is whole (also for a request without one)."""
        self._body_ended = True
        if self._stage is READING and self._spooling is None and self._intake is not None:
            self._dispatch()

    # Queueing

    def _dispatch(self) -> None:
        entry, intake = self._entry, self._intake
        assert entry is not None  # noqa: S101 - set before the body is read
        assert intake is not None  # noqa: S101
        try:
            intake.finish()
            target = target_of(entry, self._head, intake)
            if not entry.route.inference:
                self._granted(self._gateway.gate.instance(target, entry.principal))
                return
            ticket = ticket_of(entry, self._head, intake, self._bytes_in)
            self._cls = ticket.cls
            got = self._gateway.gate.request(target, ticket)
        except ApiError as error:
            self.fail(error)
            return
        if isinstance(got, Lease):
            self._on_outcome(got)
            return
        self._stage, self._pending = QUEUED, got
        got.notify = self._on_outcome

    def _on_outcome(self, outcome: Lease | ApiError) -> None:
        self._pending = None
        if isinstance(outcome, ApiError):
            self.fail(outcome)
            return
        self._lease = outcome
        self._queue_ms = outcome.queue_ms
        try:
            self._granted(outcome.instance)
        except ApiError as error:
            self.fail(error)

    # Sending

    def _granted(self, instance: Instance) -> None:
        """There is a place. Raises ``ApiError`` when this engine cannot take this request after all."""
        entry, intake = self._entry, self._intake
        assert entry is not None  # noqa: S101
        assert intake is not None  # noqa: S101
        self._instance = instance
        self._granted_at = time.monotonic()
        self._upstream_id = self._gateway.claim_upstream_id(self.request_id)
        self._outgoing = render(self._head, entry, intake, instance, self._cls, self._upstream_id)
        pool = self._gateway.pool(instance)
        connection = pool.take(self._loop.time())
        if connection is None:
            self._connect(pool)
        else:
            self._send(connection)

    def _connect(self, pool: Pool) -> None:
        self._stage = CONNECTING
        self._dial = pool.dial(self._connected)

    def _connected(self, outcome: UpstreamConnection | ApiError) -> None:
        self._dial = None
        if isinstance(outcome, ApiError):
            self.fail(outcome)
        else:
            self._send(outcome)

    def _send(self, connection: UpstreamConnection) -> None:
        outgoing, head = self._outgoing, self._head
        assert outgoing is not None  # noqa: S101 - kept until an answer begins
        now = self._loop.time()
        self._stage, self._connection = WAITING, connection
        self._deadline = now + self._gateway.limits.upstream_first_byte_timeout_s
        is_handshake = self._entry is not None and self._entry.route.websocket
        body = outgoing.body or b""
        first = outgoing.head + body if len(body) <= _JOINED_BYTES else outgoing.head
        connection.start(self, first, now=now, head_only=head.method == "HEAD", upgrade=is_handshake)
        if len(body) > _JOINED_BYTES:
            connection.write(body)
        if outgoing.upload is not None:
            self._sent_all = False
            self._sending = transfer.Sending(outgoing.upload, connection, self._sent)

    def _sent(self, problem: ApiError | None) -> None:
        self._sending = None
        self._sent_all = problem is None
        if problem is not None:
            self.fail(problem)

    def on_upstream_writable(self) -> None:
        if self._sending is not None:
            self._sending.on_writable()

    # Receiving

    def on_received(self, connection: UpstreamConnection) -> None:
        self._active = True
        lead = b""
        if self._stage is WAITING:
            if connection.status == 101:
                self._open_tunnel(connection)
                return
            lead = self._begin(connection)
        self._relay.deliver(connection, lead)
        if connection.complete:
            self._complete(connection)

    def _begin(self, connection: UpstreamConnection) -> bytes:
        """The answer begins: from here on nothing is sent again, and nothing need be kept for it."""
        self._stage = RELAYING
        self._first_byte_at = time.monotonic()
        self._deadline = self._loop.time() + self._gateway.limits.upstream_idle_timeout_s
        self._outgoing = None
        if self._sent_all:
            self._drop_body()
        return self._relay.begin(connection, self._own_headers())

    def _own_headers(self) -> Headers:
        launch_id = self._instance.launch_id if self._instance is not None else ""
        return headers.own_headers(self.request_id, launch_id, self._queue_ms) + self._rate_headers()

    def _rate_headers(self) -> Headers:
        rate = self._gateway.gate.rate(self._entry.principal) if self._entry is not None else None
        return list(rate.headers()) if rate is not None else []

    def _complete(self, connection: UpstreamConnection) -> None:
        self._connection = None
        if self._sent_all:
            connection.release(self._loop.time())
        else:
            connection.abort()  # it answered before it had the whole request: what follows would be misread
        self._end(self._relay.status, None)
        self._client.answer_done()

    def on_broken(self, connection: UpstreamConnection, reason: str) -> None:
        now = self._loop.time()
        stale = connection.used_before and connection.silent and now - connection.started_at < STALE_WITHIN_S
        if self._stage is WAITING and stale and not self._retried and self._instance is not None:
            self._retried = True
            self._connection = None
            self._cancel_work()
            self._connect(self._gateway.pool(self._instance))
            return
        self.fail(UpstreamError(f"The engine {reason} before its answer was complete"))

    # Websockets

    def _open_tunnel(self, connection: UpstreamConnection) -> None:
        if not websocket.accepted(self._head, connection.headers):
            self.fail(UpstreamError("The engine did not accept the websocket handshake"))
            return
        self._stage = TUNNEL
        self._first_byte_at = time.monotonic()
        self._outgoing = None
        lead = headers.handshake_to_client(connection.headers, self._own_headers())
        self._tunnel = websocket.Tunnel(self._client, connection, self._tunnel_over)
        self._tunnel.open(lead)

    def _tunnel_over(self) -> None:
        self._connection = None
        self._end(101, None)

    # What else happens

    def client_gone(self) -> None:
        """The client's connection is gone: so is everything done for it."""
        if self._stage is OVER or self._stage is TUNNEL:
            return  # a tunnel hears of it itself
        if self._connection is not None:
            self._connection.abort()
        self._end(CLIENT_GONE, "client_cancelled")

    def on_client_full(self) -> None:
        if self._connection is not None:
            self._connection.pause()

    def on_client_writable(self) -> None:
        self._active = True
        if self._connection is not None:
            self._connection.resume()

    def tick(self, now: float) -> None:
        """Look at deadlines."""
        if self._stage is WAITING and now >= self._deadline:
            self.fail(UpstreamTimeout("The engine did not answer in time"))
        elif self._stage is RELAYING:
            if self._active or self._client.write_paused:
                self._active = False
                self._deadline = now + self._gateway.limits.upstream_idle_timeout_s
            elif now >= self._deadline:
                self.fail(UpstreamTimeout("The engine sent nothing for too long"))

    def stop(self) -> None:
        """The daemon closes."""
        if self._tunnel is not None and self._stage is TUNNEL:
            self._tunnel.close()
        else:
            self.fail(Draining("The daemon is stopping", retry_after=5))

    # The end

    def fail(self, error: ApiError) -> None:
        """It cannot be completed: answer with ``error``, or end the answer that has begun."""
        if self._stage is OVER:
            return
        if self._connection is not None:
            self._connection.abort()
        own = self._rate_headers()
        begun = self._relay.begun
        self._end(self._relay.status if begun else error.status, error.code)
        if begun:
            self._relay.fail(error)
        else:
            self._client.answer_error(error, self.request_id, own)

    def _end(self, status: int, code: str | None) -> None:
        self._stage = OVER
        self._connection = None
        self._cancel_work()
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        if self._lease is not None:
            self._lease.release()
        if self._upstream_id is not None:
            self._gateway.free_upstream_id(self._upstream_id)
        self._drop_body()
        self._gateway.record(self._record(status, code))

    def _cancel_work(self) -> None:
        for work in (self._dial, self._spooling, self._sending):
            if work is not None:
                work.cancel()
        self._dial = self._spooling = self._sending = None

    def _drop_body(self) -> None:
        self._gateway.body_bytes -= self._reserved
        self._reserved = 0
        self._outgoing = None
        if self._intake is not None:
            self._intake.close()

    def _record(self, status: int, code: str | None) -> RequestRecord:
        entry, instance, tunnel = self._entry, self._instance, self._tunnel
        duration = time.monotonic() - self._started_at
        return RequestRecord(
            self.request_id,
            self._head.method,
            self._head.path,
            status,
            code,
            entry.principal.name if entry is not None else None,
            instance.served_names[0] if instance is not None and instance.served_names else None,
            instance.launch_id if instance is not None else None,
            self._cls,
            self._queue_ms,
            time.time() - duration,
            duration,
            None if self._first_byte_at is None else self._first_byte_at - self._granted_at,
            self._bytes_in + (tunnel.bytes_in if tunnel is not None else 0),
            self._relay.bytes_out + (tunnel.bytes_out if tunnel is not None else 0),
        )
