"""The one port between the data plane and everything that runs engines: ask for a place, get a ``Lease``.

The asyncio shell around ``admission``: it brings the clock, the deadlines and the wake-up calls, and decides nothing.

Invariant: every request that got in ends exactly once, by release, cancel, rejection or expiry; a cancelled task or a
dropped connection leaves no trace. Waiters and holders are told from a fresh loop iteration, never from inside another
request's ``release``. Must not know: HTTP, connections, processes. Everything happens on one event loop, whose clock is
``monotonic``.
"""

from __future__ import annotations

import asyncio
import math
from asyncio import get_running_loop
from collections.abc import Callable, Mapping
from time import monotonic

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.scheduler import tickets
from vllm_bootstrap.scheduler.admission import MAX_QUEUED_BYTES, Admission, default_budget
from vllm_bootstrap.scheduler.leases import Lease, Pending
from vllm_bootstrap.scheduler.limits import RateState
from vllm_bootstrap.scheduler.ports import BatchBudget, BudgetReport, Demand, EngineSignals, Prospects
from vllm_bootstrap.scheduler.tickets import ByLaunch, ByModel, Grant, Reject, Revoke, Target, Ticket, Usage, Watcher
from vllm_bootstrap.serving import Advert, Instance, LoadReport, RequestClass

__all__ = ["ByLaunch", "ByModel", "Gate", "Lease", "Pending", "Target", "Ticket"]

_SOONEST_TICK_S = 0.002  # so that a budget which is due all the time does not keep the loop busy


class Gate:
    """Queues and slots of all launches. ``max_queued`` requests may wait for one served model, their bodies having
    ``max_queued_bytes``, each for ``queue_timeout_s`` seconds unless it brings its own deadline; ``hold_s`` seconds
    while nothing serves the model. ``ended(id)``, ``budget(slots)`` and ``prospects``: see ``Admission``. ``watcher``
    hears what happens to each request."""

    def __init__(
        self,
        *,
        max_queued: int = 100,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        queue_timeout_s: float = 300.0,
        ended: Callable[[str], bool] = lambda _id: False,
        budget: Callable[[int], BatchBudget] = default_budget,
        watcher: Watcher | None = None,
        prospects: Prospects | None = None,
        hold_s: float = 30.0,
    ) -> None:
        self._admission = Admission(
            max_queued=max_queued, max_queued_bytes=max_queued_bytes, ended=ended, budget=budget, prospects=prospects
        )
        self._hold_s = hold_s
        self._queue_timeout_s = queue_timeout_s
        self._watcher = watcher
        self._outcome, self._limits = self._admission.outcome, self._admission.limits
        self._pending: dict[int, Pending] = {}
        self._revocable: dict[int, Lease] = {}
        self._last_id = 0
        self._listeners: list[Callable[[str], None]] = []
        self._ejection_listeners: list[Callable[[Instance], None]] = []
        self._tick_timer: asyncio.TimerHandle | None = None
        self._tick_at = 0.0

    # What launches say

    def update(self, advert: Advert) -> None:
        """A launch announced itself or changed. Waiting requests are granted or rejected accordingly."""
        now = monotonic()
        self._admission.update(advert, now)
        self._carry_out(now)
        if advert.instance is None:
            self._withdrawn(advert.launch_id)

    def forget(self, launch_id: str) -> None:
        """A launch was deleted. Idempotent."""
        now = monotonic()
        self._admission.forget(launch_id, now)
        self._carry_out(now)
        self._withdrawn(launch_id)

    def on_withdrawn(self, listener: Callable[[str], None]) -> None:
        """``listener(launch_id)`` is called whenever a launch stops taking requests (idle connections can go)."""
        self._listeners.append(listener)

    def on_ejected(self, listener: Callable[[Instance], None]) -> None:
        """``listener(instance)`` is called whenever a launch is ejected: somebody should probe it until it answers."""
        self._ejection_listeners.append(listener)

    def unreachable(self, launch_id: str) -> None:
        """A connection to the engine was refused: it is not chosen any more until ``reachable`` or the announcement of
        another engine. Requests that only it could serve are rejected. Idempotent."""
        now = monotonic()
        instance = self._admission.eject(launch_id, now)
        self._carry_out(now)
        if instance is not None:
            for listener in self._ejection_listeners:
                listener(instance)

    def reachable(self, launch_id: str) -> None:
        """An ejected engine answers again. Idempotent."""
        now = monotonic()
        self._admission.readmit(launch_id, now)
        self._carry_out(now)

    def retire(self, launch_id: str) -> None:
        """Grant nothing new there; it is to be put away once nothing runs there. Idempotent."""
        now = monotonic()
        self._admission.retire(launch_id, now)
        self._carry_out(now)

    def restore(self, launch_id: str) -> None:
        """A retired launch is needed after all. Idempotent."""
        now = monotonic()
        self._admission.restore(launch_id, now)
        self._carry_out(now)

    def is_retired(self, launch_id: str) -> bool:
        return self._admission.is_retired(launch_id)

    def refuse(self, name: str, error: ApiError) -> None:
        """End what waits for a model that nothing serves."""
        now = monotonic()
        self._admission.refuse(name, error, now)
        self._carry_out(now)

    def prospects_changed(self) -> None:
        """Other models than before may be loaded on demand: what waits for one that may not is rejected."""
        now = monotonic()
        self._admission.prospects_changed(now)
        self._carry_out(now)

    def signals(self, launch_id: str, signals: EngineSignals) -> None:
        """What the engine's metrics say now."""
        now = monotonic()
        self._admission.signals(launch_id, signals, now)
        self._carry_out(now)

    def drain(self) -> None:
        """Refuse new requests and reject waiting ones with ``Draining``; running ones go on."""
        now = monotonic()
        self._admission.drain(now)
        self._carry_out(now)

    # What requests ask

    def request(
        self, target: Target, ticket: Ticket, deadline: float | None = None, hold_s: float | None = None
    ) -> Lease | Pending:
        """Ask without a task: a lease at once, or a ``Pending`` whose ``notify`` the caller sets before it returns to
        the loop. ``deadline`` is in loop time; with infinity it may wait for ever. ``hold_s``: so long it may wait
        while nothing serves its model, instead of the gate's own; 0: not at all. Raises the refusal (see
        ``admission``)."""
        self._last_id = request_id = self._last_id + 1
        now = monotonic()
        try:
            grant = self._admission.request(request_id, target, ticket, now, may_be_held=hold_s != 0)
        except ApiError as error:
            known = isinstance(target, ByModel) and self._admission.serves(target.name)
            self._rejected(ticket, target[0] if known else "", error)
            self._carry_out(now)
            raise
        if grant is None:
            return self._wait(request_id, ticket, deadline, self._queue_timeout_s, now, hold_s)
        lease = self._lease(grant, ticket, deadline, self._queue_timeout_s, hold_s)
        outcome = self._outcome
        if outcome.effects or outcome.batch_waiting:
            self._carry_out(now)
        return lease

    async def acquire(
        self, target: Target, ticket: Ticket, deadline: float | None = None, hold_s: float | None = None
    ) -> Lease:
        """Wait for a place. ``deadline`` is in loop time, by default ``queue_timeout_s`` from now. Raises ``ApiError``.
        Cancelling the awaiting task leaves the queue clean."""
        got = self.request(target, ticket, deadline, hold_s)
        if isinstance(got, Lease):
            return got
        outcome: asyncio.Future[Lease | ApiError] = get_running_loop().create_future()

        def settle(result: Lease | ApiError) -> None:
            if not outcome.done():
                outcome.set_result(result)
            elif isinstance(result, Lease):  # the task was cancelled in this same iteration
                result.release("unworked")

        got.notify = settle
        try:
            result = await outcome
        except asyncio.CancelledError:
            got.cancel()
            if outcome.done() and not outcome.cancelled() and isinstance(late := outcome.result(), Lease):
                late.release("unworked")
            raise
        if isinstance(result, ApiError):
            raise result
        return result

    def instance(self, target: Target, principal: Principal | None = None) -> Instance:
        """Where a request that needs no slot (health, metrics, …) may go now. Raises as ``request`` does."""
        return self._admission.instance(target, principal)

    # What others want to know

    def load(self, launch_id: str) -> LoadReport:
        return self._admission.load(launch_id)

    def queues(self) -> dict[str, LoadReport]:
        """In flight and queued by served model."""
        return self._admission.queues()

    def demand(self) -> dict[str, Demand]:
        """Who waits by model name, of those who wait for a model and not for one launch. Times are the loop's."""
        return self._admission.demand()

    def last_ends(self, launch_id: str) -> Mapping[RequestClass, float]:
        """When a request ended there last (loop time), by class; classes of which none did are left out."""
        return self._admission.last_ends(launch_id)

    def budgets(self) -> dict[str, BudgetReport]:
        """The batch budgets of all routable launches by launch id."""
        return self._admission.budgets(monotonic())

    def adverts(self) -> list[Advert]:
        return self._admission.adverts()

    def rate(self, principal: Principal) -> RateState | None:
        return self._limits.rate(principal, monotonic())

    def rate_lines(self, principal: Principal) -> bytes:
        """The same as lines of an answer's head, empty for a key without such limits."""
        return self._limits.lines(principal, monotonic())

    # From leases, waiters and timers

    def began(self, request_id: int, *, streamed: bool) -> None:
        """``Lease.first_byte`` is the way to call this."""
        self._revocable.pop(request_id, None)
        now = monotonic()
        self._admission.began(request_id, now, streamed=streamed)
        if self._outcome.effects or self._outcome.batch_waiting:
            self._carry_out(now)

    def settled(self, request_id: int, usage: Usage) -> None:
        """``Lease.settle`` is the way to call this."""
        self._admission.settle(request_id, usage, monotonic())

    def finish(self, request_id: int, ending: tickets.Ending) -> None:
        """A lease was released (``Lease.release`` is the way to call this)."""
        self._revocable.pop(request_id, None)
        now = monotonic()
        self._admission.done(request_id, now, ending)
        outcome = self._outcome
        if outcome.effects or outcome.batch_waiting:
            self._carry_out(now)

    def again(self, request_id: int, lease: Lease) -> Lease | Pending:
        """``Lease.again`` is the way to call this."""
        self._revocable.pop(request_id, None)
        model = self._admission.model_of(request_id)
        now = monotonic()
        try:
            grant = self._admission.again(request_id, now)
        except ApiError as error:
            self._rejected(lease.ticket, model, error)
            self._carry_out(now)
            raise
        if grant is None:
            return self._wait(request_id, lease.ticket, lease.deadline, lease.patience_s, now, lease.hold_s)
        following = self._lease(grant, lease.ticket, lease.deadline, lease.patience_s, lease.hold_s)
        self._carry_out(now)
        return following

    def abandon(self, request_id: int) -> None:
        """A waiter went away (``Pending.cancel`` is the way to call this)."""
        if request_id in self._pending:
            self._take(request_id)
            now = monotonic()
            self._admission.cancel(request_id, now)
            self._carry_out(now)

    def _expire(self, request_id: int) -> None:
        now = monotonic()
        pending = self._pending[request_id]
        held, pending.held = pending.held, False
        if held and self._admission.is_served(request_id):  # only its hold is over
            pending.timer = _timer(pending.due, self._expire, request_id)
            return
        self._admission.expire(request_id, now)
        self._carry_out(now)

    def _tick(self) -> None:
        self._tick_timer = None
        now = monotonic()
        self._admission.tick(now)
        self._carry_out(now)

    # Carrying out

    def _lease(
        self, grant: Grant, ticket: Ticket, deadline: float | None, patience_s: float, hold_s: float | None
    ) -> Lease:
        lease = Lease(self, grant, ticket, deadline, patience_s, hold_s)
        if ticket.replayable and ticket.cls == "batch":
            self._revocable[grant.request] = lease
        watcher = self._watcher
        if watcher is not None:
            if grant.promoted:
                watcher.promoted(ticket, grant)
            watcher.admitted(ticket, grant)
        return lease

    def _rejected(self, ticket: Ticket, model: str, error: ApiError) -> None:
        if self._watcher is not None:
            self._watcher.rejected(ticket, model, error)

    def _wait(
        self,
        request_id: int,
        ticket: Ticket,
        deadline: float | None,
        patience_s: float,
        now: float,
        hold_s: float | None,
    ) -> Pending:
        due = now + patience_s if deadline is None else deadline
        pending = Pending(self, request_id, ticket, deadline, due, self._admission.model_of(request_id), hold_s)
        self._pending[request_id] = pending
        hold_until = now + (self._hold_s if hold_s is None else hold_s)
        pending.held = hold_until < due and not self._admission.is_served(request_id)
        pending.timer = _timer(hold_until if pending.held else due, self._expire, request_id)
        self._carry_out(now)
        return pending

    def _carry_out(self, now: float) -> None:
        """Tell those concerned what admission has decided, each from a fresh iteration; and be there when it wants to
        decide again. ``now`` is when it decided: what has become possible since then is still to come for it, and
        asked of any later moment it would not speak of that any more."""
        effects = self._admission.take_effects()
        if effects:
            loop = get_running_loop()
            for effect in effects:
                if isinstance(effect, Grant):
                    pending = self._take(effect.request)
                    left = pending.due - now
                    lease = self._lease(effect, pending.ticket, pending.deadline, left, pending.hold_s)
                    loop.call_soon(pending.resolve, lease)
                elif isinstance(effect, Reject):
                    pending = self._take(effect.request)
                    self._rejected(pending.ticket, pending.model, effect.error)
                    loop.call_soon(pending.resolve, effect.error)
                else:
                    loop.call_soon(self._revoke, effect)
        if self._admission.batch_waiting:
            self._arm(now)

    def _revoke(self, effect: Revoke) -> None:
        lease = self._revocable.pop(effect.request, None)
        if lease is None or not lease.may_be_revoked:
            self._admission.kept(effect.request)
            self._carry_out(monotonic())
            return
        if self._watcher is not None:
            model = self._admission.model_of(effect.request)
            self._watcher.revoked(lease.ticket, model, lease.instance.launch_id)
        lease.revoke()

    def _arm(self, now: float) -> None:
        """See that ``_tick`` comes when batch budgets change with time alone after ``now``."""
        due = self._admission.next_change(now)
        if due is None:
            return
        due = max(due, now + _SOONEST_TICK_S)
        if self._tick_timer is not None:
            if self._tick_at <= due:
                return
            self._tick_timer.cancel()
        self._tick_at = due
        self._tick_timer = get_running_loop().call_at(due, self._tick)

    def _take(self, request_id: int) -> Pending:
        pending = self._pending.pop(request_id)
        if pending.timer is not None:
            pending.timer.cancel()
        return pending

    def _withdrawn(self, launch_id: str) -> None:
        for listener in self._listeners:
            listener(launch_id)


def _timer(due: float, callback: Callable[[int], None], request_id: int) -> asyncio.TimerHandle | None:
    return None if due == math.inf else get_running_loop().call_at(due, callback, request_id)
