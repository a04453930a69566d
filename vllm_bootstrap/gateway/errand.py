"""Taking one request to one engine: a kept connection or a new one, the head, the body, an upload's bytes.

Invariant: at most one connection attempt and one transfer are under way, and none after ``cancel``; what was written
is the whole request or ``sent_all`` says that it is not. Must not know: queues, answers, clients.
"""

from __future__ import annotations

import time
from typing import Protocol

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.gateway import transfer
from vllm_bootstrap.gateway.entry import Outgoing
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.gateway.head import Head
from vllm_bootstrap.gateway.pool import Dial, Pool
from vllm_bootstrap.gateway.upstream import Receiver, UpstreamConnection
from vllm_bootstrap.serving import Instance

_JOINED_BYTES = 16 * 1024  # up to this size a copy is cheaper than a second write


class Sender(Receiver, Protocol):
    """Whose request it is; the answer comes to it too."""

    def on_sending(self, connection: UpstreamConnection, now: float) -> None:
        """The request is being written to this connection."""

    def on_unreachable(self, error: ApiError) -> None:
        """No connection could be made: nothing was sent."""

    def fail(self, error: ApiError) -> None:
        """The request's body could not be sent."""


class Errand:
    """``outgoing`` is kept until its owner takes it, to be sent again. ``sent_all``: all of it is written."""

    __slots__ = ("_dial", "_gateway", "_head", "_sender", "_sending", "outgoing", "sent_all", "upgrade")

    def __init__(self, gateway: Gateway, sender: Sender, head: Head) -> None:
        self._gateway, self._head = gateway, head
        self._sender: Sender | None = sender
        self._dial: Dial | None = None
        self._sending: transfer.Sending | None = None
        self.outgoing: Outgoing | None = None
        self.upgrade, self.sent_all = False, True

    def go(self, instance: Instance, outgoing: Outgoing, now: float, *, upgrade: bool) -> None:
        """Send ``outgoing``. ``upgrade``: it is a handshake. ``now`` is not the loop's, which lags behind what passed
        in this iteration."""
        self.outgoing, self.upgrade = outgoing, upgrade
        pool = self._gateway.pool(instance)
        connection = pool.take(now)
        if connection is None:
            self._connect(pool)
        else:
            self._send(connection, now)

    def again(self, instance: Instance) -> None:
        """Send it once more, on a new connection."""
        self.cancel()
        self._connect(self._gateway.pool(instance))

    def _connect(self, pool: Pool) -> None:
        self._dial = pool.dial(self._connected)

    def _connected(self, outcome: UpstreamConnection | ApiError) -> None:
        self._dial = None
        if isinstance(outcome, ApiError):
            assert self._sender is not None  # noqa: S101 - a dial is cancelled at the end
            self._sender.on_unreachable(outcome)
        else:
            self._resume(outcome)

    def _resume(self, connection: UpstreamConnection) -> None:
        """Send, called by the loop and not from a step of the request."""
        sender = self._sender
        assert sender is not None  # noqa: S101 - likewise
        try:
            self._send(connection, time.monotonic())
        except Exception:  # noqa: BLE001 - a mistake must not leave a client waiting
            sender.on_crash()

    def _send(self, connection: UpstreamConnection, now: float) -> None:
        outgoing, sender, head = self.outgoing, self._sender, self._head
        assert outgoing is not None  # noqa: S101 - kept until an answer begins
        assert sender is not None  # noqa: S101 - until the end
        sender.on_sending(connection, now)
        first, body, upload, _ = outgoing
        if body is not None and len(body) <= _JOINED_BYTES:
            first += body
            body = None
        connection.start(sender, first, now=now, head_only=head.method == "HEAD", upgrade=self.upgrade)
        if body is not None:
            connection.write(body)
        if upload is not None:
            self.sent_all = False
            self._sending = transfer.Sending(upload, connection, self._sent)

    def _sent(self, problem: ApiError | None) -> None:
        self._sending = None
        self.sent_all = problem is None
        if problem is not None and self._sender is not None:
            self._sender.fail(problem)

    def on_writable(self) -> None:
        """The engine has taken most of what was written."""
        if self._sending is not None:
            self._sending.on_writable()

    def cancel(self) -> None:
        """Stop connecting and sending. Idempotent."""
        if self._dial is not None:
            self._dial.cancel()
            self._dial = None
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def end(self) -> None:
        """Nothing more is sent. Idempotent."""
        self.outgoing = self._sender = None  # a circle with the sender would last until the garbage collector comes by
        if self._dial is not None or self._sending is not None:
            self.cancel()
