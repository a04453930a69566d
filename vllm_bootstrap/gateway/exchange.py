"""One request's journey through the data plane: admitted, read, queued, sent, relayed, over.

Invariant: whatever happens at any stage (client gone, engine gone, deadline, refusal, cancelled from outside, place
taken back, the daemon closing), ``_end`` runs exactly once: the place in the scheduler is given back, the engine's
connection is released or closed at once, what was held in memory or files is freed, one record is left. How often and
by whom an engine gets it is ``Passage``'s to keep.

Stages go forward only, but for a place that is lost: reading, queued, connecting, waiting, relaying or tunnel, over.
Must not know: parsing of heads, framing towards the client, how slots are given out.
"""

from __future__ import annotations

import functools
import math
import time

from vllm_bootstrap.errors import ApiError, Cancelled, UpstreamError, UpstreamTimeout
from vllm_bootstrap.gateway import headers, sticky, targets, websocket
from vllm_bootstrap.gateway.entry import Entry, admit, known_key, rewrite_unnamed, target_of, ticket_of
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.gateway.head import Head, Headers
from vllm_bootstrap.gateway.intake import make_intake
from vllm_bootstrap.gateway.loading import MOST_WORDS, STREAMS, Loading, Refusal
from vllm_bootstrap.gateway.mishaps import guarded
from vllm_bootstrap.gateway.passage import CLIENT_GONE, Passage, ending_by
from vllm_bootstrap.gateway.reading import Reading
from vllm_bootstrap.gateway.relay import Client, Relay
from vllm_bootstrap.gateway.stages import OVER, QUEUED, RELAYING, TUNNEL, WAITING
from vllm_bootstrap.gateway.upstream import UpstreamConnection
from vllm_bootstrap.scheduler import refusals
from vllm_bootstrap.scheduler.tickets import ByModel, Ending, Target, Ticket
from vllm_bootstrap.serving import Instance


class Exchange(Passage):
    """Made for one request by the client's connection, which calls ``start``, ``on_body``…, ``on_body_end``, or all of
    these at once with ``start_whole``, and then whatever happens to it. All are safe to call once it is over."""

    _tunnel: websocket.Tunnel | None = None
    _loading: Loading | None = None
    _words = b""

    def __init__(
        self, gateway: Gateway, client: Client, head: Head, target: targets.ToModel | targets.ToLaunch
    ) -> None:
        wished = head.first(b"x-request-id")
        request_id = (wished and headers.valid_request_id(wished)) or gateway.new_request_id()
        Passage.__init__(self, gateway, head, request_id)
        self._client, self._target = client, target
        self._relay = Relay(client, head)
        self._reading: Reading | None = None
        self._active = self._began = self._keeps_response = False
        self._holds_body = True

    # Reading

    @guarded
    def start(self) -> None:
        """The head is here."""
        try:
            self._admit()
        except ApiError as error:
            self.fail(error)
            return
        if self._head.expects_continue and self._head.has_body:
            self._client.transport.write(headers.CONTINUE)

    @guarded
    def start_whole(self, body: bytes) -> None:
        """The head is here, and with it all of its body."""
        try:
            self._admit().take(body)
            self._dispatch()
        except ApiError as error:
            self.fail(error)

    def _admit(self) -> Reading:
        gateway = self._gateway
        if gateway.draining:
            raise refusals.draining()
        self._entry = entry = admit(gateway, self._head, self._target)
        self._journey.owner = entry.principal.name
        self._journey.id = gateway.inflight.add(self.request_id, self)
        self._intake = intake = make_intake(self._head, entry.route, gateway.limits, gateway.spool)
        self._reading = reading = Reading(gateway, self._client, intake, self._read)
        return reading

    @guarded
    def on_body(self, piece: bytes) -> None:
        if self._reading is not None:
            self._reading.feed(piece)

    @guarded
    def on_body_end(self) -> None:
        """The body is whole (also for a request without one)."""
        if self._reading is not None:
            self._reading.end()

    # Queueing

    def _read(self, problem: ApiError | None) -> None:
        """The body is whole, or cannot be taken."""
        try:
            if problem is not None:
                raise problem
            self._dispatch()
        except ApiError as error:
            self.fail(error)

    def _dispatch(self) -> None:
        entry, reading, journey = self._entry, self._reading, self._journey
        assert entry is not None  # noqa: S101 - set before the body is read
        assert reading is not None  # noqa: S101
        gateway, intake = self._gateway, reading.intake
        intake.finish()
        journey.bytes_in = size = reading.bytes_in
        model = targets.model_in_query(self._head) if entry.route.websocket else intake.model
        if model is None and entry.launch is None:
            model = gateway.default_model()
        journey.model = model
        if not entry.route.inference:
            target = target_of(gateway, entry, model, self._head, intake)
            self._go(gateway.gate.instance(target, entry.principal))
            return
        rewrite = rewrite_unnamed(gateway, entry) if model is None else gateway.rewrite_of(model)
        if rewrite is not None:
            size += intake.rewrite(rewrite)
        target = target_of(gateway, entry, model, self._head, intake)
        journey.stream = intake.fields.get("stream") is True
        journey.ticket = ticket = ticket_of(entry, intake, size)
        self._keeps_response = entry.keeps_responses and sticky.is_kept(entry.path, intake.fields)
        self._wait()
        if journey.stream and (entry.shows_progress or (model is not None and gateway.wants_progress(model))):
            instance = self._ask_aloud(target, ticket, entry)
        else:
            instance = self._place.ask(target, ticket, None, entry.hold_s)
        if instance is not None:
            self._go(instance)

    def _ask_aloud(self, target: Target, ticket: Ticket, entry: Entry) -> Instance | None:
        """Ask for a place, and let the client hear how the load goes that it may have to wait for."""
        gateway, journey = self._gateway, self._journey
        if not isinstance(target, ByModel) or entry.path not in STREAMS:
            return self._place.ask(target, ticket, None, entry.hold_s)
        # Once it has been told something it cannot be sent away to come again: it had better wait for the end.
        instance = self._place.ask(target, ticket, None, math.inf if entry.hold_s is None else entry.hold_s)
        if instance is None:
            line = functools.partial(gateway.progress_of, target.name)
            self._loading = Loading(self._relay, self.request_id, line, self._rate_lines, journey.queued_at)
        return instance

    # Receiving

    def on_received(self, connection: UpstreamConnection) -> None:
        self._active = True
        lead = b""
        if self._stage is WAITING:
            if connection.status == 101:
                self._open_tunnel(connection)
                return
            if self._relay.announced and not self._relay.continues(connection):
                self._take_refusal(connection)
                return
            if not (connection.parts or connection.complete) and self._may_be_revoked(connection):
                return
            lead = self._begin(connection)
        if not self._began and connection.parts:
            self._first_byte()
        self._relay.deliver(connection, lead)
        if connection.complete:
            self._complete(connection)
        elif self._began:  # what follows need not come by here
            connection.flow, connection.skim = self._relay.flow(), self._relay.skim()

    def _take_refusal(self, connection: UpstreamConnection) -> None:
        """The client was promised events, and the engine has something else to say: that ends them."""
        self._place.stay()
        self._words += connection.take()
        if connection.complete or len(self._words) > MOST_WORDS:
            self._place.leave(None, "finished" if connection.status < 400 else "unworked")
            self.fail(Refusal(connection.status, self._words))

    def _may_be_revoked(self, connection: UpstreamConnection) -> bool:
        """Engines send a stream's head at once and its first token when they get to it. Until then the place can be
        taken back without the client seeing anything, if the head waits here."""
        ticket = self._journey.ticket
        return ticket is not None and ticket.replayable and connection.status == 200

    def _begin(self, connection: UpstreamConnection) -> bytes:
        """The answer begins: from here on nothing is sent again, and nothing need be kept for it."""
        self._stage = RELAYING
        self._deadline = self._loop.time() + self._gateway.limits.upstream_idle_timeout_s
        errand, reading = self._errand, self._reading
        outgoing, errand.outgoing = errand.outgoing, None
        drops_usage = outgoing is not None and outgoing.adds_usage
        if errand.sent_all and reading is not None:
            self._holds_body = False
            reading.drop()
        on_id = self._remember if self._keeps_response else None
        relay, journey = self._relay, self._journey
        lead = relay.begin(connection, self._own_headers(), drops_usage=drops_usage, on_id=on_id)
        journey.tap, journey.stream = relay.tap, relay.is_events
        if not connection.parts:  # else its first byte says so
            self._place.stay()
        return lead

    def _first_byte(self) -> None:
        self._began = True
        self._journey.first_byte_at = time.monotonic()
        self._place.first_byte(streamed=self._relay.is_events)

    def _own_headers(self) -> bytes:
        journey, entry = self._journey, self._entry
        launch_id = journey.instance.launch_id if journey.instance is not None else ""
        own = headers.own_headers(self.request_id, launch_id, journey.queue_ms)
        return own if entry is None else own + self._gateway.gate.rate_lines(entry.principal)

    def _rate_lines(self) -> bytes:
        return b"" if self._entry is None else self._gateway.gate.rate_lines(self._entry.principal)

    def _rate_headers(self) -> Headers:
        principal = self._entry.principal if self._entry is not None else known_key(self._gateway, self._head)
        rate = self._gateway.gate.rate(principal) if principal is not None else None
        return list(rate.headers()) if rate is not None else []

    def _complete(self, connection: UpstreamConnection) -> None:
        self._connection = None
        if self._errand.sent_all:
            connection.release(self._loop.time())
        else:
            connection.abort()  # it answered before it had the whole request: what follows would be misread
        self._end(self._relay.status, None)
        self._client.answer_done()

    # Websockets

    def _open_tunnel(self, connection: UpstreamConnection) -> None:
        if not websocket.accepted(self._head, connection.headers):
            self.fail(UpstreamError("The engine did not accept the websocket handshake"))
            return
        self._stage = TUNNEL
        self._first_byte()
        self._errand.outgoing = None
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

    @guarded
    def tick(self, now: float) -> None:
        """Look at deadlines."""
        if self._stage is WAITING and now >= self._deadline:
            self.fail(UpstreamTimeout("The engine did not answer in time"))
        elif self._stage is RELAYING:
            if self._relay.has_moved() or self._active or self._client.write_paused:
                self._active = False
                self._deadline = now + self._gateway.limits.upstream_idle_timeout_s
            elif now >= self._deadline:
                self.fail(UpstreamTimeout("The engine sent nothing for too long"))
        elif self._stage is QUEUED and self._entry is not None:
            if self._entry.principal.expires_at is not None:
                self.rights_changed()
            if self._loading is not None and self._stage is QUEUED and not self._client.write_paused:
                self._loading.look(now)

    @guarded
    def cancel(self) -> None:
        """Ended from outside."""
        self._finish(Cancelled("The request was cancelled"))

    def _finish(self, error: ApiError) -> None:
        if self._tunnel is not None and self._stage is TUNNEL:
            self._tunnel.close()
        else:
            self.fail(error)

    # The end

    def fail(self, error: ApiError) -> None:
        """It cannot be completed: answer with ``error``, or end the answer that has begun."""
        if self._stage is OVER:
            return
        if self._connection is not None:
            self._connection.abort()
        begun = self._relay.begun
        self._end(self._relay.status if begun else error.status, error.code, ending_by(error))
        if begun:
            self._relay.fail(error)
        else:
            self._client.answer_error(error, self.request_id, self._rate_headers())

    def give_up(self) -> None:
        self._client.cut()

    def _end(self, status: int, code: str | None, ending: Ending = "finished") -> None:
        journey, reading, relay, tunnel = self._journey, self._reading, self._relay, self._tunnel
        worked = self._stage >= WAITING and not (relay.begun and relay.status >= 400)
        spent = self._leave(ending if worked else "unworked")
        bytes_out = relay.bytes_out
        if reading is not None:
            journey.bytes_in = reading.bytes_in
            if self._holds_body:
                reading.stop()
                reading.drop()
        if tunnel is not None:
            journey.bytes_in += tunnel.bytes_in
            bytes_out += tunnel.bytes_out
        self._gateway.record(journey.record(status, code, spent, bytes_out))
