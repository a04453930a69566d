"""A request's way from its place in the scheduler to an engine, wherever the request came from.

Invariant: an engine gets a request once; a second time only when a reused connection turns out to have been closed
before any byte of an answer. Another engine gets it only when this one could not be connected to, or when the scheduler
took the place back before the answer had begun. After ``_leave`` the place is given back, nothing is being sent, and
nobody finds the request among those under way.

Must not know: where the request came from, what its answer is for.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Literal

from vllm_bootstrap.errors import ApiError, Forbidden, Unauthorized, UpstreamError, UpstreamTimeout
from vllm_bootstrap.gateway.entry import Entry, render
from vllm_bootstrap.gateway.errand import Errand
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.gateway.head import Head
from vllm_bootstrap.gateway.inflight import RequestInfo
from vllm_bootstrap.gateway.intake import Intake
from vllm_bootstrap.gateway.journey import Journey
from vllm_bootstrap.gateway.mishaps import Mishaps, guarded
from vllm_bootstrap.gateway.place import Place
from vllm_bootstrap.gateway.stages import CONNECTING, OVER, QUEUED, READING, STATES, WAITING
from vllm_bootstrap.gateway.upstream import STALE_WITHIN_S, UpstreamConnection
from vllm_bootstrap.scheduler import refusals
from vllm_bootstrap.scheduler.tickets import Ending, Usage
from vllm_bootstrap.serving import Instance

CLIENT_GONE = 499
"""The status in the records of requests whose answer nobody waited for any more."""


class Passage(Mishaps):
    """Who inherits takes the request in, asks ``self._place``, and has the answer: ``on_received``, ``fail``, ``tick``.

    ``_entry`` and ``_intake`` are there before a place is asked for. ``_deadline`` is in loop time, for the stage."""

    _retried = False

    def __init__(self, gateway: Gateway, head: Head, request_id: str) -> None:
        self._gateway, self._head, self.request_id = gateway, head, request_id
        self._loop = asyncio.get_running_loop()
        self._journey = Journey(request_id, head)
        self._place = Place(gateway.gate, self)
        self._errand = Errand(gateway, self, head)
        # All here: Python keeps what instances hold compactly only where the first of them have the same attributes.
        self._stage, self._deadline = READING, math.inf
        self._entry: Entry | None = None
        self._intake: Intake | None = None
        self._connection: UpstreamConnection | None = None

    # From the place

    def _wait(self) -> None:
        self._stage = QUEUED
        self._journey.queued_at = time.monotonic()

    @guarded
    def on_place(self, instance: Instance) -> None:
        """It is this request's turn."""
        try:
            self._go(instance)
        except ApiError as error:
            self.fail(error)

    @guarded
    def on_no_place(self, error: ApiError) -> None:
        """It will not be its turn."""
        self._journey.waited = True
        self.fail(error)

    @guarded
    def on_revoked(self) -> None:
        """The place is needed for others; the answer has not begun."""
        if self._connection is not None:
            self._connection.abort()
        self._move("revoked")

    def _move(self, why: Literal["revoked", "unreachable"], problem: ApiError | None = None) -> None:
        """Leave this engine and wait for another place. ``problem``: what to say where there is none."""
        self._connection = None
        self._errand.cancel()
        self._deadline = math.inf
        self._wait()
        try:
            instance = self._place.again(why)
            if instance is not None:
                self._go(instance)
        except ApiError as error:
            self.fail(error if problem is None or self._gateway.draining else problem)

    # To the engine

    def _go(self, instance: Instance) -> None:
        """There is a place. Raises ``ApiError`` when this engine cannot take this request after all."""
        entry, intake, journey = self._entry, self._intake, self._journey
        assert entry is not None  # noqa: S101 - set before a place is asked for
        assert intake is not None  # noqa: S101
        now, ticket = time.monotonic(), journey.ticket
        journey.instance, journey.granted_at, journey.queue_ms = instance, now, self._place.queue_ms
        cls = ticket.cls if ticket is not None else None
        outgoing = render(self._head, entry, intake, instance, cls, journey.id)
        self._stage = CONNECTING
        self._errand.go(instance, outgoing, now, upgrade=entry.route.websocket)

    def on_sending(self, connection: UpstreamConnection, now: float) -> None:
        """It is on its way to the engine."""
        self._stage, self._connection = WAITING, connection
        self._deadline = now + self._gateway.limits.upstream_first_byte_timeout_s

    @guarded
    def on_unreachable(self, error: ApiError) -> None:
        """The engine could not be connected to. Nothing was sent, unless this was to repeat what a connection that
        broke may have brought there: then it may be what killed this engine, and no other one gets it."""
        if self._place.may_fail_over and not self._retried:
            self._move("unreachable", error)
        else:
            self.fail(error)

    @guarded
    def on_upstream_writable(self) -> None:
        self._errand.on_writable()

    def on_received(self, connection: UpstreamConnection) -> None:
        """Something of the answer is there."""
        raise NotImplementedError

    @guarded
    def on_broken(self, connection: UpstreamConnection, reason: str) -> None:
        now = self._loop.time()
        stale = connection.used_before and connection.silent and now - connection.started_at < STALE_WITHIN_S
        instance = self._journey.instance
        if self._stage is WAITING and stale and not self._retried and instance is not None:
            self._retried = True
            self._connection = None
            self._stage = CONNECTING
            self._errand.again(instance)
            return
        problem = UpstreamError(f"The engine {reason} before its answer was complete")
        self.fail(refusals.draining() if self._gateway.draining else problem)  # a daemon that stops ends its engines

    def _remember(self, response_id: str) -> None:
        """The engine may keep this answer: later requests that name it go there."""
        journey = self._journey
        if journey.instance is not None and journey.owner is not None:
            self._gateway.responses.remember(response_id, journey.instance.launch_id, journey.owner)

    # What else happens

    @guarded
    def stop(self) -> None:
        """The daemon closes."""
        self._finish(refusals.draining())

    def info(self) -> RequestInfo:
        """What is known of it now."""
        return self._journey.info(STATES[self._stage])

    @guarded
    def rights_changed(self) -> None:
        """Its key may have been revoked: what has not begun ends, what runs only if the operator wants that."""
        guard, entry = self._gateway.guard, self._entry
        if entry is None or guard.still_allows(entry.principal):
            return
        if self._stage <= QUEUED or self._gateway.limits.revoked_keys_cut_streams:
            gone = not guard.knows(entry.principal)
            self._finish(Unauthorized() if gone else Forbidden("The rights of this key were changed meanwhile"))

    def _finish(self, error: ApiError) -> None:
        """End it from outside."""
        self.fail(error)

    def _leave(self, ending: Ending) -> Usage | None:
        """It is over, however. Returns what it has used, as far as that is known."""
        journey = self._journey
        self._stage = OVER
        self._connection = None
        self._errand.end()
        spent = journey.spent()
        self._place.leave(spent, ending)
        if journey.id:
            self._gateway.inflight.remove(journey.id)
        return spent


def ending_by(error: ApiError) -> Ending:
    """How a request ends that its engine has got and that cannot be completed because of ``error``."""
    return "cut" if isinstance(error, UpstreamError | UpstreamTimeout) else "finished"
