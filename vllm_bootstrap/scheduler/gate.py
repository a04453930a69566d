"""The one port between the data plane and everything that runs engines: ask for a place, get a ``Lease``.

The asyncio shell around ``admission``: it brings the clock, the deadlines and the wake-up calls, and decides nothing.

Invariant: every request that got in ends exactly once, by release, cancel, rejection or expiry; a cancelled task or a
dropped connection leaves no trace. Waiters are told from a fresh loop iteration, never from inside another request's
``release``. Must not know: HTTP, connections, processes. Everything happens on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.scheduler.admission import Admission
from vllm_bootstrap.scheduler.limits import RateState
from vllm_bootstrap.scheduler.tickets import ByLaunch, ByModel, Effect, Grant, Target, Ticket
from vllm_bootstrap.serving import Advert, Instance, LoadReport

__all__ = ["ByLaunch", "ByModel", "Gate", "Lease", "Pending", "Target", "Ticket"]


class Lease:
    """A place on an engine. Whoever holds it must ``release`` it; releasing twice is harmless."""

    __slots__ = ("_gate", "_id", "instance", "queue_ms")

    def __init__(self, gate: Gate, request_id: int, grant: Grant) -> None:
        self.instance: Instance = grant.instance
        self.queue_ms = int(grant.waited_s * 1000)
        self._gate: Gate | None = gate
        self._id = request_id

    def release(self) -> None:
        """Give the place back. Idempotent; never blocks."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.finish(self._id)


class Pending:
    """A request that waits for its turn. ``notify`` is called once with a ``Lease`` or the ``ApiError`` that ended
    it, unless ``cancel`` came first; a lease that was under way when ``cancel`` came is released."""

    __slots__ = ("_gate", "_id", "_over", "notify", "timer")

    def __init__(self, gate: Gate, request_id: int) -> None:
        self._gate = gate
        self._id = request_id
        self._over = False
        self.notify: Callable[[Lease | ApiError], None] = lambda _outcome: None
        self.timer: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        """Leave the queue, or hand back what was just granted. Idempotent."""
        if not self._over:
            self._over = True
            self._gate.abandon(self._id)

    def resolve(self, outcome: Lease | ApiError) -> None:
        """Called by the gate, once."""
        if self._over:
            if isinstance(outcome, Lease):
                outcome.release()
            return
        self._over = True
        self.notify(outcome)


class Gate:
    """Queues and slots of all launches. ``max_queued`` requests may wait for one served model, each for
    ``queue_timeout_s`` seconds unless it brings its own deadline. ``ended(id)``: see ``Admission``."""

    def __init__(
        self,
        *,
        max_queued: int = 100,
        queue_timeout_s: float = 300.0,
        ended: Callable[[str], bool] = lambda _id: False,
    ) -> None:
        self._admission = Admission(max_queued=max_queued, ended=ended)
        self._queue_timeout_s = queue_timeout_s
        self._pending: dict[int, Pending] = {}
        self._last_id = 0
        self._listeners: list[Callable[[str], None]] = []

    # What launches say

    def update(self, advert: Advert) -> None:
        """A launch announced itself or changed. Waiting requests are granted or rejected accordingly."""
        self._dispatch(self._admission.update(advert, self._now()))
        if advert.instance is None:
            self._withdrawn(advert.launch_id)

    def forget(self, launch_id: str) -> None:
        """A launch was deleted. Idempotent."""
        self._dispatch(self._admission.forget(launch_id))
        self._withdrawn(launch_id)

    def on_withdrawn(self, listener: Callable[[str], None]) -> None:
        """``listener(launch_id)`` is called whenever a launch stops taking requests (idle connections can go)."""
        self._listeners.append(listener)

    def drain(self) -> None:
        """Refuse new requests and reject waiting ones with ``Draining``; running ones go on."""
        self._dispatch(self._admission.drain())

    # What requests ask

    def request(self, target: Target, ticket: Ticket, deadline: float | None = None) -> Lease | Pending:
        """Ask without a task: a lease at once, or a ``Pending`` whose ``notify`` the caller sets before it returns to
        the loop. ``deadline`` is in loop time. Raises the refusal (see ``admission``)."""
        now = self._now()
        self._last_id += 1
        request_id = self._last_id
        grant = self._admission.request(request_id, target, ticket, now)
        if grant is not None:
            return Lease(self, request_id, grant)
        pending = self._pending[request_id] = Pending(self, request_id)
        due = now + self._queue_timeout_s if deadline is None else deadline
        pending.timer = asyncio.get_running_loop().call_at(due, self._expire, request_id)
        return pending

    async def acquire(self, target: Target, ticket: Ticket, deadline: float | None = None) -> Lease:
        """Wait for a place. ``deadline`` is in loop time, by default ``queue_timeout_s`` from now. Raises ``ApiError``.
        Cancelling the awaiting task leaves the queue clean."""
        got = self.request(target, ticket, deadline)
        if isinstance(got, Lease):
            return got
        outcome: asyncio.Future[Lease | ApiError] = asyncio.get_running_loop().create_future()

        def settle(result: Lease | ApiError) -> None:
            if not outcome.done():
                outcome.set_result(result)
            elif isinstance(result, Lease):  # the task was cancelled in this same iteration
                result.release()

        got.notify = settle
        try:
            result = await outcome
        except asyncio.CancelledError:
            got.cancel()
            if outcome.done() and not outcome.cancelled() and isinstance(late := outcome.result(), Lease):
                late.release()
            raise
        if isinstance(result, ApiError):
            raise result
        return result

    def instance(self, target: Target, principal: Principal | None = None) -> Instance:
        """Where a request that needs no slot (health, metrics, …) may go now. Raises as ``request`` does."""
        ticket = Ticket(principal.name if principal else "", principal=principal)
        return self._admission.instance(target, ticket)

    # What others want to know

    def load(self, launch_id: str) -> LoadReport:
        return self._admission.load(launch_id)

    def queues(self) -> dict[str, LoadReport]:
        """In flight and queued by served model."""
        return self._admission.queues()

    def adverts(self) -> list[Advert]:
        return self._admission.adverts()

    def rate(self, principal: Principal) -> RateState | None:
        return self._admission.rate(principal, self._now())

    # From leases, waiters and timers

    def finish(self, request_id: int) -> None:
        """A lease was released (``Lease.release`` is the way to call this)."""
        self._dispatch(self._admission.done(request_id, self._now()))

    def abandon(self, request_id: int) -> None:
        """A waiter went away (``Pending.cancel`` is the way to call this)."""
        if request_id in self._pending:
            self._take(request_id)
            self._dispatch(self._admission.cancel(request_id, self._now()))

    def _expire(self, request_id: int) -> None:
        self._dispatch(self._admission.expire(request_id, self._now()))

    def _dispatch(self, effects: list[Effect]) -> None:
        if not effects:
            return
        loop = asyncio.get_running_loop()
        for effect in effects:
            pending = self._take(effect.request)
            outcome = Lease(self, effect.request, effect) if isinstance(effect, Grant) else effect.error
            loop.call_soon(pending.resolve, outcome)

    def _take(self, request_id: int) -> Pending:
        pending = self._pending.pop(request_id)
        if pending.timer is not None:
            pending.timer.cancel()
        return pending

    def _withdrawn(self, launch_id: str) -> None:
        for listener in self._listeners:
            listener(launch_id)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
