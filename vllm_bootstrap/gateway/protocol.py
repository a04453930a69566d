"""The protocol class given to uvicorn: strict connections, whose data-plane requests become exchanges.

Invariant: a request is either an exchange or the app's, decided once by its path; an exchange hears of everything that
happens to its client, and of nothing after it has answered. Must not know: how requests are read, judged or relayed.
"""

from __future__ import annotations

from vllm_bootstrap.errors import ApiError, BadRequest, PayloadTooLarge
from vllm_bootstrap.gateway import targets
from vllm_bootstrap.gateway.exchange import Exchange
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.gateway.head import Head
from vllm_bootstrap.gateway.hearing import Hearing
from vllm_bootstrap.gateway.relay import ByteSink
from vllm_bootstrap.gateway.strict import StrictProtocol


class GatewayProtocol(StrictProtocol):
    """One client's connection. Also what an exchange knows as its ``Client`` and the gateway as its ``Connection``."""

    _target: targets.ToModel | targets.ToLaunch | None = None
    _exchange: Exchange | None = None
    _tunnel: ByteSink | None = None
    _hearing: Hearing | None = None
    _most_bytes = 0  # of the body of the app's request

    # Claimed requests

    def claim(self, head: Head) -> bool:
        self._target = targets.find(head.method, head.path)
        return self._target is not None

    def claimed_begins(self, head: Head) -> None:
        target = self._target if head.memory is None else head.memory.target
        assert target is not None  # noqa: S101 - that is why it was claimed
        self._exchange = Exchange(self.gateway, self, head, target)
        self._exchange.start()

    def claimed_whole(self, head: Head, body: bytes) -> None:
        self._exchange = exchange = Exchange(self.gateway, self, head, head.memory.target)
        exchange.start_whole(body)

    def claimed_body(self, piece: bytes) -> None:
        if self._exchange is not None:
            self._exchange.on_body(piece)

    def claimed_ends(self) -> None:
        if self._exchange is not None:
            self._exchange.on_body_end()

    def claimed_is_bad(self, error: ApiError) -> None:
        if self._exchange is not None:
            self._exchange.fail(error)

    def claimed_tick(self, now: float) -> None:
        if self._exchange is not None:
            self._exchange.tick(now)

    # What an exchange asks for

    def answer_done(self) -> None:
        self._exchange = None
        StrictProtocol.answer_done(self)

    def become_tunnel(self, tunnel: ByteSink) -> bytes:
        self._tunnel = tunnel
        return self._inbox.take_ahead()

    # What an exchange is told

    def early(self, data: bytes) -> None:
        if self._tunnel is not None:
            self._tunnel.from_client(data)
        else:
            super().early(data)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        exchange, self._exchange = self._exchange, None
        tunnel, self._tunnel = self._tunnel, None
        if exchange is not None:
            exchange.client_gone()
        if tunnel is not None:
            tunnel.client_gone()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._tunnel is not None:
            self._tunnel.on_client_full()
        elif self._exchange is not None:
            self._exchange.on_client_full()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._tunnel is not None:
            self._tunnel.on_client_writable()
        elif self._exchange is not None:
            self._exchange.on_client_writable()

    def tick(self, now: float) -> None:
        super().tick(now)
        dead_after_s = self.gateway.limits.client_dead_after_s
        if self._answer_open and dead_after_s and not self.transport.is_closing():
            if self._hearing is None:
                self._hearing = Hearing(dead_after_s)
            if self._hearing.is_lost(self.transport, now):
                self.transport.abort()  # connection_lost tells whoever is concerned

    def stop(self) -> None:
        if self._exchange is not None:
            self.shutdown()
            self._exchange.stop()
        else:
            super().stop()

    # The app's requests: uvicorn's own callbacks

    def app_begins(self, head: Head) -> None:
        brought = targets.file_brought(head.method, head.path)
        most = self._most_bytes = self.gateway.limits.of_body(brought)
        if head.content_length is not None and head.content_length > most:
            self.answer_error(PayloadTooLarge(f"The body is larger than {most} bytes"), None, [])
            return
        self.feed(self.parser, head.raw)
        if not self._keep and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_message_begin(self) -> None:
        self.message_begins()
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        if self._closing:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self._most_bytes:
            self.body_is_bad(PayloadTooLarge(f"The body is larger than {self._most_bytes} bytes"))
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._closing:
            super().on_message_complete()
        self.message_ends()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            self._answer_open = False
            self._closing = True
        else:
            super().answer_done()

    def fail_app(self, error: ApiError) -> None:
        cycle = self.cycle if self.cycle is not None and not self.cycle.response_complete else None
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        if cycle is not None and cycle.response_started:
            self.cut()
        else:
            self.refuse(error)

    def send_400_response(self, msg: str) -> None:
        self.refuse(BadRequest(msg))

    def _should_upgrade(self) -> bool:
        return False  # the app has no websockets; those of engines never get here


def make_protocol(gateway: Gateway) -> type[GatewayProtocol]:
    """The class to give to uvicorn as ``http``: all its connections share ``gateway``."""
    return type("BoundGatewayProtocol", (GatewayProtocol,), {"gateway": gateway})
