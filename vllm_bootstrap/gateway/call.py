"""A request of the daemon's own (a line of a batch), carried through the data plane without a client's connection.

It is treated as a client's request of the same key would be: judged by the same rules, counted and limited like it,
listed and cancelled like it, and one record is left of it unless it was refused for want of room. Its class is always
batch, it waits as long as it must, and its answer is kept until it is whole.

Invariant: ``on_end`` is called exactly once with what became of it, unless ``cancel`` came first; then never. Either
way the place is given back, the engine's connection is released or closed at once, what was held in memory is freed.
No task, no future and no timer belongs to a call that waits or runs.

Must not know: batches, files, who reads the answer.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

from vllm_bootstrap.auth.guard import missing_scope
from vllm_bootstrap.auth.scopes import allows
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import (
    ApiError,
    BadRequest,
    Cancelled,
    Forbidden,
    InternalError,
    NotFound,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    UpstreamError,
    UpstreamTimeout,
)
from vllm_bootstrap.gateway import sticky, targets
from vllm_bootstrap.gateway.entry import Entry, rewrite_unnamed, target_of, ticket_of
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.gateway.head import Head
from vllm_bootstrap.gateway.inflight import RequestInfo
from vllm_bootstrap.gateway.intake import JsonIntake
from vllm_bootstrap.gateway.mishaps import guarded
from vllm_bootstrap.gateway.passage import CLIENT_GONE, Passage, ending_by
from vllm_bootstrap.gateway.stages import CONNECTING, OVER, QUEUED, RELAYING, WAITING
from vllm_bootstrap.gateway.upstream import UpstreamConnection
from vllm_bootstrap.gateway.usage import BodyTap
from vllm_bootstrap.scheduler import refusals
from vllm_bootstrap.scheduler.tickets import ByLaunch, ByModel, Ending, Target, Ticket, Usage
from vllm_bootstrap.serving import Instance

MOST_ANSWER_BYTES = 64 * 1024 * 1024
"""Longest answer that is kept; a longer one ends the call with ``upstream_error``."""

_OK = 200


class Reply(NamedTuple):
    """An engine's whole answer, errors of its own included. ``body`` is as it came: whether it is what its route
    promises is for the reader to see. ``usage``: the engine's count, None where it told none."""

    status: int
    body: bytes
    launch_id: str
    request_id: str
    usage: Usage | None
    queue_ms: int


class Failure(NamedTuple):
    """There is no answer. ``launch_id``: the engine whose it was at that moment, None when it had no place. ``sent``:
    that engine may have got it, at least in part."""

    error: ApiError
    launch_id: str | None
    sent: bool


class _Listed:
    """A call among those under way: whoever ends it there is not its owner, who must hear of that."""

    __slots__ = ("_call",)

    def __init__(self, call: Call) -> None:
        self._call = call

    def info(self) -> RequestInfo:
        return self._call.info()

    def cancel(self) -> None:
        self._call.cancel_from_outside()

    def rights_changed(self) -> None:
        self._call.rights_changed()


class Call(Passage):
    """``path`` is one that ``/v1`` routes by model, ``body`` a JSON object in UTF-8 that does not ask for a stream.
    ``target``: ``ByModel`` of the model that the body names, or ``ByLaunch`` (a launch, or a group of replicas).
    ``priority``: -100 to 100, higher first, within the key's batch requests. ``on_end`` gets a ``Reply`` or a
    ``Failure``, always from a later iteration of the loop than ``start``; it may start other calls. ``on_move`` gets
    the launch where it has a place now, and None when it waits (again)."""

    def __init__(
        self,
        gateway: Gateway,
        principal: Principal,
        target: Target,
        path: str,
        body: bytes,
        *,
        on_end: Callable[[Reply | Failure], None],
        on_move: Callable[[str | None], None] | None = None,
        priority: int = 0,
        request_id: str | None = None,
    ) -> None:
        super().__init__(gateway, _head_of(path), request_id or gateway.new_request_id())
        self._principal, self._target, self._priority = principal, target, priority
        self._body: bytes | None = body
        self._on_end: Callable[[Reply | Failure], None] | None = on_end
        self._on_move = on_move
        self._parts: list[bytes] = []
        self._started = self._starting = self._active = self._was_sent = self._keeps_response = False
        self._held = self._size = self._status = 0

    @guarded
    def start(self) -> None:
        """Go. Whatever is wrong with it comes by ``on_end``. Without effect after ``cancel``."""
        if self._stage is OVER or self._started:
            return
        self._started = self._starting = True
        self.take_in()
        self._starting = False

    @guarded
    def cancel(self) -> None:
        """Its answer is not wanted any more. Idempotent; ``on_end`` is not called after this."""
        self._on_end = None
        if self._stage is OVER:
            return
        if self._connection is not None:
            self._connection.abort()
        if self._started:
            self._end(CLIENT_GONE, "client_cancelled")
        self._stage = OVER

    @property
    def running_on(self) -> str | None:
        """The launch it has a place on now."""
        instance = self._journey.instance
        return instance.launch_id if instance is not None and CONNECTING <= self._stage < OVER else None

    # Queueing

    @guarded
    def take_in(self) -> None:
        try:
            target, ticket = self._admit()
            self._wait()
            instance = self._place.ask(target, ticket, math.inf, math.inf)
            if instance is not None:
                self._go(instance)
        except ApiError as error:
            self.fail(error)

    def _admit(self) -> tuple[Target, Ticket]:
        """Judge it as the door of the data plane does. Raises ``ApiError``."""
        gateway, principal, journey = self._gateway, self._principal, self._journey
        path, body, self._body = self._head.path, self._body or b"", None
        journey.owner, journey.bytes_in = principal.name, len(body)
        if gateway.draining:
            raise refusals.draining()
        self._entry = entry = _entry(gateway, principal, path, self._target)
        journey.id = gateway.inflight.add(self.request_id, _Listed(self))
        gateway.enter(self)
        self._hold(len(body))
        self._intake = intake = JsonIntake(gateway.limits.max_body_bytes)
        intake.feed(body)
        intake.finish()
        journey.model = model = intake.model
        rewrite = rewrite_unnamed(gateway, entry) if model is None else gateway.rewrite_of(model)
        size = len(body) + (0 if rewrite is None else intake.rewrite(rewrite))
        _check_whole(intake)
        self._keeps_response = entry.keeps_responses and sticky.is_kept(path, intake.fields)
        if isinstance(self._target, ByModel) and model not in (None, self._target.name):
            raise BadRequest(f"The body names another model than {self._target.name!r}", param="model")
        target = target_of(gateway, entry, model, self._head, intake)
        journey.ticket = ticket = ticket_of(entry, intake, size)._replace(priority=self._priority)
        return target, ticket

    def _hold(self, size: int) -> None:
        """Its body counts like those of clients."""
        gateway = self._gateway
        self._held = size
        gateway.body_bytes += size
        if gateway.body_bytes > gateway.limits.body_budget_bytes:
            raise Unavailable("Too many large requests are under way", retry_after=1)

    def _drop_body(self) -> None:
        """It is not sent again. Idempotent."""
        self._gateway.body_bytes -= self._held
        self._held = 0
        self._body, self._intake = None, None

    # From the place

    def _wait(self) -> None:
        if self._on_move is not None:
            self._on_move(None)
        super()._wait()

    def _go(self, instance: Instance) -> None:
        if self._on_move is not None:
            self._on_move(instance.launch_id)
        super()._go(instance)

    @guarded
    def on_revoked(self) -> None:
        self._was_sent = False
        super().on_revoked()

    # To the engine

    def on_sending(self, connection: UpstreamConnection, now: float) -> None:
        self._was_sent = True
        super().on_sending(connection, now)

    @guarded
    def on_unreachable(self, error: ApiError) -> None:
        """If the engine had got it on a connection that then broke, it may have died of it: no other one gets it."""
        if self._was_sent:
            self.fail(error)
        else:
            super().on_unreachable(error)

    # Receiving

    def on_received(self, connection: UpstreamConnection) -> None:
        self._active = True
        parts = connection.parts
        if not connection.complete:
            if parts:
                self._gather(connection)
            return
        self._connection = None
        if not parts:
            body = b"".join(self._parts)
        elif not self._parts:
            body = connection.take()
        else:
            body = b"".join((*self._parts, *parts))
            parts.clear()
        if self._journey.first_byte_at is None:
            self._journey.first_byte_at = time.monotonic()
        connection.release(self._loop.time())
        self._size = len(body)
        if self._size > MOST_ANSWER_BYTES:
            self.fail(_too_long())
        else:
            self._complete(connection, body)

    def _gather(self, connection: UpstreamConnection) -> None:
        """A part of an answer. It has begun: from here on nothing is sent again, and nothing need be kept for it."""
        if self._stage is WAITING:
            self._stage = RELAYING
            self._deadline = self._loop.time() + self._gateway.limits.upstream_idle_timeout_s
            self._journey.first_byte_at = time.monotonic()
            self._errand.outgoing = None
            self._drop_body()
            self._place.first_byte(streamed=False)
        piece = connection.take()
        self._parts.append(piece)
        self._size += len(piece)
        if max(self._size, int(connection.content_length or 0)) > MOST_ANSWER_BYTES:
            self.fail(_too_long())

    def _complete(self, connection: UpstreamConnection, body: bytes) -> None:
        journey = self._journey
        instance = journey.instance
        assert instance is not None  # noqa: S101 - it has answered
        self._status = status = connection.status
        usage = None
        if status == _OK and connection.answer.kind == b"application/json":
            journey.tap = tap = BodyTap(self._remember if self._keeps_response else None)
            tap.end(body)
            usage = tap.usage
        reply = Reply(status, body, instance.launch_id, self.request_id, usage, self._place.queue_ms)
        self._end(status, None)
        self._tell(reply)

    # What else happens

    @guarded
    def tick(self, now: float) -> None:
        """Look at deadlines."""
        if self._stage is WAITING and now >= self._deadline:
            self.fail(UpstreamTimeout("The engine did not answer in time"))
        elif self._stage is RELAYING:
            if self._active:
                self._active = False
                self._deadline = now + self._gateway.limits.upstream_idle_timeout_s
            elif now >= self._deadline:
                self.fail(UpstreamTimeout("The engine sent nothing for too long"))
        elif self._stage is QUEUED and self._principal.expires_at is not None:
            self.rights_changed()

    @guarded
    def cancel_from_outside(self) -> None:
        """Ended by somebody who is not its owner."""
        self.fail(Cancelled("The request was cancelled"))

    # The end

    def fail(self, error: ApiError) -> None:
        """It cannot be completed."""
        if self._stage is OVER:
            return
        if self._connection is not None:
            self._connection.abort()
        failure = Failure(error, self.running_on, self._was_sent)
        # For want of room it is asked again, as often as it takes: that would crowd all else out of the history.
        self._end(error.status, error.code, ending_by(error), noted=not isinstance(error, TooManyRequests))
        self._tell(failure)

    def give_up(self) -> None:
        self._free()
        self._tell(Failure(InternalError("The daemon failed to carry this request"), self.running_on, self._was_sent))

    def _end(self, status: int, code: str | None, ending: Ending = "finished", *, noted: bool = True) -> None:
        worked = self._stage >= WAITING and self._status < 400
        spent = self._leave(ending if worked else "unworked")
        self._free()
        if noted:
            self._gateway.record(self._journey.record(status, code, spent, self._size))

    def _free(self) -> None:
        self._gateway.exit(self)
        self._drop_body()
        self._parts = []

    def _tell(self, outcome: Reply | Failure) -> None:
        if self._starting:
            self._loop.call_soon(self._tell, outcome)
            return
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(outcome)


class _Memory:
    """What ``headers`` keeps of a head: how each launch gets it."""

    __slots__ = ("rendered",)

    def __init__(self) -> None:
        self.rendered: dict[tuple[str, str], tuple[object, bytes, bytes, bytes]] = {}


@functools.lru_cache(64)
def _head_of(path: str) -> Head:
    """The head of every call for ``path``."""
    headers = [(b"content-type", b"application/json"), (b"accept", b"application/json")]
    return Head("POST", path, b"", 1, headers, memory=_Memory())


def _entry(gateway: Gateway, principal: Principal, path: str, target: Target) -> Entry:
    """What the door of the data plane decides before it knows a request's body. Raises ``ApiError``."""
    route = targets.BY_MODEL.get(path)
    if route is None or route.multipart or route.websocket:
        raise NotFound(f"Batches cannot ask for {path}")
    guard = gateway.guard
    if not guard.still_allows(principal):
        raise Forbidden("The rights of this key were changed meanwhile") if guard.knows(principal) else Unauthorized()
    if not allows(principal.scopes, route.scopes):
        raise missing_scope(principal, route.scopes)
    launch = target if isinstance(target, ByLaunch) else None
    return Entry(principal, route, path, launch, "batch", path.endswith(sticky.MAKES))


def _check_whole(intake: JsonIntake) -> None:
    for name in ("stream", "background"):
        if intake.fields.get(name) not in (None, False):
            raise BadRequest(f"Batches take whole answers: {name!r} may not be set", param=name)


def _too_long() -> ApiError:
    return UpstreamError(f"The engine's answer is larger than {MOST_ANSWER_BYTES} bytes")
