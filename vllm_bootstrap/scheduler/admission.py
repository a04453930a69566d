"""Who may run next: the decision tree over queues, limits and launches. PURE: events in, effects out.

Invariants (a hypothesis machine checks them):

* a request ends exactly once: refused at the door, rejected from the queue, cancelled, or granted and then done. A
  granted one may come back (``again``) as the same request: same place, same age, charged once;
* the sequences on a launch never exceed its slots, nor those of batch its budget; nothing waits that could run;
* realtime goes before batch; within a class keys take turns (``queues``), within a key priority and then arrival
  decide. Whose turn it is on a launch is waited for when it needs more slots than are free: nobody passes, so big
  requests cannot starve. The one exception is the batch floor: see (c);
* nothing waits for a launch that cannot be routed to: such requests are rejected when that becomes known. For a model
  that may be loaded on demand requests do wait without any launch, until one serves it or ``refuse`` ends them.

The launch is chosen when a place is granted, least outstanding sequences first. A request for one launch (or group) is
pinned to it and still counts in its model's queue.

Every arriving request meets exactly one of these:

1. the daemon drains                                      -> Draining
2. nothing known by that name or id (or not for this key) -> ModelNotFound / NotFound / LaunchNotReady (ended)
3. known, but nothing can be routed to now, nor will on   -> ModelLoading, Draining, Unavailable / LaunchNotReady;
   demand; or its load has just failed                       what ``Prospects`` say
4. the key's own limits                                   -> ConcurrencyLimit, TooManyRequests; BadRequest if never
5. nothing serves it yet (it is asked for now) and the    -> ModelLoading
   request must not wait for that
6. a place is free and nobody waits for it before         -> Grant
7. its turn comes before all that wait                    -> Grant
8. the model's queue is full                              -> QueueFull, for the youngest batch ones if it is realtime
                                                             (but a key's only batch one may always wait)
9. otherwise it waits

A launch with room asks, whenever something changes:

a. the turn of realtime has come and it fits              -> Grant
b. no realtime waits, batch fits slots and budget         -> Grant
c. batch has had less than its floor, a slot is free      -> Grant, promoted; before (a)
d. the budget shrank, or realtime waits for slots         -> Revoke batch that may be and has no first byte, youngest

Nothing here knows clocks, sockets, tasks or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.scheduler import refusals
from vllm_bootstrap.scheduler.budget import Budget, BudgetPolicy
from vllm_bootstrap.scheduler.capacity import Launch
from vllm_bootstrap.scheduler.directory import Directory
from vllm_bootstrap.scheduler.dispatcher import Dispatcher
from vllm_bootstrap.scheduler.limits import KeyLimits
from vllm_bootstrap.scheduler.ports import (
    BatchBudget,
    EngineSignals,
    NoProspects,
    Prospects,
)
from vllm_bootstrap.scheduler.questions import Questions
from vllm_bootstrap.scheduler.queues import Request
from vllm_bootstrap.scheduler.shelf import QueueBounds
from vllm_bootstrap.scheduler.tickets import Effect, Ending, Grant, Reject, Target, Ticket, Usage
from vllm_bootstrap.serving import Advert, Instance

MAX_QUEUED_BYTES = 256 * 1024 * 1024


def default_budget(slots: int) -> BatchBudget:
    """A batch budget as it is without settings."""
    return Budget(BudgetPolicy(), slots)


class Admission(Questions):
    """The decisions. Not thread-safe: one owner calls it, in the order things happen, and after each call carries out
    ``take_effects()``, also when the call raised.

    ``max_queued`` requests may wait for one served model, their bodies having ``max_queued_bytes`` together.
    ``ended(id)`` tells whether an id that is no longer (or not yet again) announced belongs to a launch that has ended,
    so that it is not called unknown. ``budget(slots)`` makes the batch budget of a launch. ``prospects`` tell what is
    loaded when it is asked for.
    """

    def __init__(
        self,
        *,
        max_queued: int,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        ended: Callable[[str], bool] = lambda _id: False,
        budget: Callable[[int], BatchBudget] = default_budget,
        prospects: Prospects | None = None,
    ) -> None:
        self.limits = KeyLimits()
        self._prospects = prospects or NoProspects()
        self._bounds = QueueBounds(max_queued, max_queued_bytes)
        self._budget = budget
        self._directory = Directory(ended, self._prospects)
        self._dispatcher = Dispatcher()
        self.outcome = self._dispatcher.outcome
        self._requests: dict[int, Request] = {}
        self._draining = False

    @property
    def batch_waiting(self) -> int:
        """Batch requests that wait anywhere: as long as there are any, ``next_change`` matters."""
        return self.outcome.batch_waiting

    def take_effects(self) -> list[Effect]:
        """What must be told to whom, once. A grant that a call returned is not among them."""
        effects, self.outcome.effects = self.outcome.effects, []
        return effects

    # What launches say

    def update(self, advert: Advert, now: float) -> None:
        """A launch announced itself or changed."""
        launch = self._directory.launches.get(advert.launch_id)
        if launch is None:
            launch = Launch(advert, self._budget, self._dispatcher.lines.next_of)
            self._directory.launches[advert.launch_id] = launch
            self._regroup(now)
        elif launch.say(advert):
            self._regroup(now)

    def forget(self, launch_id: str, now: float) -> None:
        """A launch was deleted. What still runs there may finish; idempotent."""
        launch = self._directory.launches.pop(launch_id, None)
        if launch is not None:
            launch.nobody_waits()
            self._regroup(now)

    def eject(self, launch_id: str, now: float) -> Instance | None:
        """It cannot be connected to: nothing new goes there. Its instance if that is news."""
        launch = self._directory.launches.get(launch_id)
        if launch is None or launch.instance is None:
            return None
        instance = launch.instance
        launch.ejected = True
        self._regroup(now)
        return instance

    def readmit(self, launch_id: str, now: float) -> None:
        """It can be connected to. Idempotent."""
        launch = self._directory.launches.get(launch_id)
        if launch is not None and launch.ejected:
            launch.ejected = False
            self._regroup(now)

    def retire(self, launch_id: str, now: float) -> None:
        """It is to be put away: nothing new goes there, what runs may finish. Idempotent; ends with ``restore`` or when
        its engine goes."""
        self._set_retired(launch_id, now, retired=True)

    def restore(self, launch_id: str, now: float) -> None:
        """It is needed after all. Idempotent."""
        self._set_retired(launch_id, now, retired=False)

    def _set_retired(self, launch_id: str, now: float, *, retired: bool) -> None:
        launch = self._directory.launches.get(launch_id)
        if launch is not None and launch.retired is not retired:
            launch.retired = retired
            self._regroup(now)

    def refuse(self, name: str, error: ApiError, now: float) -> None:
        """What waits for a model that nothing serves will not get it: its load has failed."""
        for request in self._directory.cold(name):
            self._reject(request, error, now)

    def prospects_changed(self, now: float) -> None:
        """Other models than before may be loaded on demand."""
        self._regroup(now)

    def signals(self, launch_id: str, signals: EngineSignals, now: float) -> None:
        """What a launch's engine says of itself."""
        launch = self._directory.launches.get(launch_id)
        if launch is not None:
            launch.budget.signals(signals, now)
            self._dispatcher.take_back(launch, now)
            self._dispatcher.pump((launch,), now)

    def drain(self, now: float) -> None:
        """Refuse everything from now on and reject what waits. What runs may finish."""
        self._draining = True
        for request in list(self._directory.waiting()):
            self._reject(request, refusals.draining(), now)

    def tick(self, now: float) -> None:
        """Time has passed: budgets may have grown, shrunk or fallen due."""
        launches = self._directory.launches.values()
        for launch in launches:
            self._dispatcher.take_back(launch, now)
        self._dispatcher.pump(launches, now)

    def next_change(self, now: float) -> float | None:
        """When ``tick`` is due although nothing happens; None: not before something happens."""
        launches = self._directory.launches.values()
        times = [launch.budget.next_change(now) for launch in launches if launch.waiting["batch"]]
        return min((time for time in times if time is not None), default=None)

    # What requests ask

    def request(
        self, request_id: int, target: Target, ticket: Ticket, now: float, *, may_be_held: bool = True
    ) -> Grant | None:
        """A new request; ids are unique and increasing. Grant, or None: it waits. ``may_be_held``: also for a model
        that must be loaded first. Raises the refusal (1-5, 8)."""
        if self._draining:  # 1
            raise refusals.draining()
        principal = ticket.principal
        lane = self._directory.lane(target, principal)  # 2, 3
        try:
            if principal is not None:  # 4
                self.limits.check(principal, ticket, now)
            if not lane.launches:  # 5
                self._ask_for(lane.shelf.name, ticket, may_be_held=may_be_held)
        except ApiError:
            self._directory.let_go(lane)
            raise
        request = Request(request_id, target, ticket, lane, now)
        if ticket.cls == "realtime":
            for one in lane.launches:
                one.budget.realtime_arrived(now)
        launch = self._dispatcher.free_launch(request, now)
        grant: Grant | None
        if launch is not None:  # 6
            grant = self._dispatcher.start(request, launch, now)
        else:
            grant = self._dispatcher.queue(request, now)  # 7
            if grant is None:
                self._keep_bounds(request, now)  # 8
                self._make_room(request)  # 9
        if principal is not None:
            request.charge = self.limits.enter(principal, ticket, now)
        self._requests[request_id] = request
        return grant

    def _ask_for(self, name: str, ticket: Ticket, *, may_be_held: bool) -> None:
        self._prospects.asked(name, ticket.cls, comes_back=not may_be_held)
        if not may_be_held:
            raise refusals.loading(name, self._prospects)

    def began(self, request_id: int, now: float, *, streamed: bool) -> None:
        """The answer of a granted request has begun. Idempotent."""
        request = self._requests.get(request_id)
        if request is None or request.launch is None or request.began:
            return
        launch, stays = request.launch, request.returning
        launch.began(request, now, streamed=streamed)
        if stays:
            self._dispatcher.make_room((launch,))
        if launch.revocable:
            self._dispatcher.take_back(launch, now)
        if launch.waiting["batch"]:
            self._dispatcher.pump((launch,), now)

    def settle(self, request_id: int, usage: Usage, now: float) -> None:
        """What the engine says a request used."""
        request = self._requests.get(request_id)
        if request is not None and request.charge is not None:
            self.limits.settle(request.charge, usage.prompt_tokens + usage.completion_tokens, now)

    def done(self, request_id: int, now: float, ending: Ending = "finished") -> None:
        """A granted request has ended, however. Idempotent."""
        request = self._requests.get(request_id)
        if request is None or request.launch is None:
            return
        worked = ending != "unworked"
        launch = self._dispatcher.stop(request, now, worked=worked)
        if ending == "finished":  # what a dying engine cuts off ends all at once
            request.lane.shelf.pace.finished(now)
        self._end(request, now, worked=worked)
        waiting = launch.waiting
        if waiting["realtime"] or waiting["batch"]:
            self._dispatcher.pump((launch,), now)

    def again(self, request_id: int, now: float) -> Grant | None:
        """A granted request gives its place back and asks for another: it was revoked, or its engine cannot be reached.
        Grant, or None: it waits where it would, had it never had one. Raises the refusal (1-3); it has ended then."""
        request = self._requests[request_id]
        before = self._dispatcher.stop(request, now, worked=False)
        before.turns[request.ticket.cls].refund(request)
        try:
            if self._draining:
                raise refusals.draining()
            request.lane = self._directory.lane(request.target, request.ticket.principal)
        except ApiError:
            self._end(request, now, worked=False)
            self._dispatcher.pump((before,), now)
            raise
        request.since = now
        grant = self._dispatcher.queue(request, now)
        self._dispatcher.pump((before,), now)
        if grant is None:
            self._make_room(request)
        return grant

    def kept(self, request_id: int) -> None:
        """A revocation came too late, or its holder cannot follow it: the request keeps its place."""
        request = self._requests.get(request_id)
        if request is not None and request.launch is not None:
            request.launch.keep(request)
            self._dispatcher.make_room((request.launch,))

    def cancel(self, request_id: int, now: float) -> None:
        """The caller went away, queued or running. Idempotent."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.launch is not None:
            self.done(request_id, now)
            return
        self._leave(request, now)
        self._dispatcher.pump(request.lane.launches, now)

    def expire(self, request_id: int, now: float) -> None:
        """The deadline of a request has come: rejected if it still waits. Idempotent."""
        request = self._requests.get(request_id)
        if request is None or request.launch is not None:
            return
        waited, shelf = request.waited + now - request.since, request.lane.shelf
        if request.lane.launches:
            error = refusals.expired(shelf, request.ticket.cls, waited, now)
        else:
            self._prospects.asked(shelf.name, request.ticket.cls, comes_back=True)
            error = refusals.loading(shelf.name, self._prospects, waited)
        self._reject(request, error, now)
        self._dispatcher.pump(request.lane.launches, now)

    # Ends

    def _regroup(self, now: float) -> None:
        for request in self._directory.regroup():
            self._reject(request, self._directory.refusal(request.target, request.ticket.principal), now)
        for launch in self._directory.launches.values():
            launch.tell_waits(now)
        self._dispatcher.pump(self._directory.launches.values(), now)
        for lane in self._directory.lanes():  # what was coming may have been lost with its launch
            if lane.waiting["realtime"]:
                self._dispatcher.make_room(lane.launches)

    def _keep_bounds(self, request: Request, now: float) -> None:
        """Case 8 for a request that has begun to wait: somebody goes when that is one too many."""
        shelf, bounds = request.lane.shelf, self._bounds
        if not shelf.over(bounds):
            return
        if request.ticket.cls == "batch" or shelf.over_without_batch(bounds):
            self._dispatcher.leave(request, now)
            self._directory.let_go(request.lane)
            raise refusals.queue_full(shelf, request.ticket, bounds, now)
        while shelf.over(bounds):
            youngest = shelf.youngest_batch()
            self._reject(youngest, refusals.displaced(shelf, now), now)
            self._dispatcher.pump(youngest.lane.launches, now)

    def _make_room(self, request: Request) -> None:
        """Case 9 for realtime: rule (d), unless it has got a place meanwhile."""
        if request.ticket.cls == "realtime" and request.queued:
            self._dispatcher.make_room(request.lane.launches)

    def _reject(self, request: Request, error: ApiError, now: float) -> None:
        self._leave(request, now)
        self.outcome.effects.append(Reject(request.id, error))

    def _leave(self, request: Request, now: float) -> None:
        """It waits no longer and has had no place."""
        self._dispatcher.leave(request, now)
        self._directory.let_go(request.lane)
        self._end(request, now, worked=False)

    def _end(self, request: Request, now: float, *, worked: bool) -> None:
        del self._requests[request.id]
        principal = request.ticket.principal
        if principal is not None:
            self.limits.leave(principal.name, request.charge, now, worked=worked)
