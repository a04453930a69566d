"""Who may run next: queues for each served model, slots for each launch. PURE: events in, ``Grant`` or ``Reject`` out.

Invariants (a hypothesis machine checks them):

* a request ends exactly once: refused at the door, rejected from the queue, cancelled, or granted and then done;
* the sequences granted on a launch never exceed its slots, and nothing waits that the rules below would let run;
* realtime goes before batch, within a class first come first served. A request at the head that needs more slots than
  are free is waited for; whoever comes later does not pass it on that launch, so big requests cannot starve;
* nothing waits for a launch that cannot be routed to: such requests are rejected when that becomes known.

A queue belongs to a served model. The launch is chosen when a slot is granted, least outstanding sequences first; a
request for one launch (or group) is pinned to it and still counts in its model's queue.

Every arriving request meets exactly one of these:

1. the daemon drains                                      -> Draining
2. nothing known by that name or id (or not for this key) -> ModelNotFound / NotFound / LaunchNotReady (ended)
3. known, but nothing can be routed to now                -> ModelLoading, Draining, Unavailable / LaunchNotReady
4. the key's own limits                                   -> ConcurrencyLimit, TooManyRequests
5. slots are free and nobody is before it                 -> Grant
6. the model's queue is full                              -> QueueFull
7. otherwise it waits

Nothing here knows clocks, sockets, tasks or HTTP.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import ApiError, Draining, QueueFull, Unavailable
from vllm_bootstrap.scheduler.limits import KeyLimits, RateState
from vllm_bootstrap.scheduler.refusals import DEFAULT_RETRY_S, launch_refusal, model_refusal
from vllm_bootstrap.scheduler.tickets import ByLaunch, ByModel, Effect, Grant, Reject, Target, Ticket
from vllm_bootstrap.serving import Advert, Instance, LoadReport, RequestClass

CLASSES: tuple[RequestClass, RequestClass] = ("realtime", "batch")
_PACE_SAMPLES, _PACE_WINDOW_S = 32, 60.0


@dataclass(slots=True)
class _Launch:
    """A launch as last announced, with what runs there. ``instance`` None: nothing new may be sent."""

    advert: Advert
    routes: frozenset[tuple[str, str]] = frozenset()
    sequences: int = 0
    last_grant: int = 0
    in_flight: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))

    @property
    def instance(self) -> Instance | None:
        return self.advert.instance

    def offers(self, route: tuple[str, str]) -> bool:
        instance = self.advert.instance
        return instance is not None and (route in self.routes or instance.offers(*route))

    def say(self, advert: Advert) -> None:
        instance = advert.instance
        self.advert = advert
        self.routes = frozenset((route.method, route.path) for route in instance.routes) if instance else frozenset()

    def answers_to(self, target: Target) -> bool:
        if isinstance(target, ByModel):
            return target.name in self.advert.served_names
        return target.id in (self.advert.launch_id, self.advert.group_id)


@dataclass(slots=True)
class _Request:
    """``queue`` is the served model it counts under. ``launch`` is set once granted, ``cost`` is what it holds."""

    id: int
    target: Target
    ticket: Ticket
    queue: str
    since: float
    launch: _Launch | None = None
    cost: int = 0


_Lane = tuple[str, str, RequestClass]


class Admission:
    """The decisions. Not thread-safe: one owner calls it, in the order things happen.

    ``max_queued`` is the longest queue of one served model. ``ended(id)`` tells whether an id that is no longer (or
    not yet again) announced belongs to a launch that has ended, so that it is not called unknown.
    """

    def __init__(self, *, max_queued: int, ended: Callable[[str], bool] = lambda _id: False) -> None:
        self.limits = KeyLimits()
        self._max_queued = max_queued
        self._ended = ended
        self._launches: dict[str, _Launch] = {}
        self._requests: dict[int, _Request] = {}
        self._lanes: dict[_Lane, dict[int, _Request]] = {}
        self._depth: dict[str, int] = {}
        self._finished: dict[str, deque[float]] = {}
        self._grants = 0
        self._draining = False

    # Events

    def update(self, advert: Advert, now: float) -> list[Effect]:
        """A launch announced itself or changed."""
        launch = self._launches.get(advert.launch_id)
        if launch is None:
            launch = self._launches[advert.launch_id] = _Launch(advert)
        launch.say(advert)
        return self._reject_stranded() + self._pump(now)

    def forget(self, launch_id: str) -> list[Effect]:
        """A launch was deleted. What still runs there may finish; idempotent."""
        launch = self._launches.pop(launch_id, None)
        if launch is None:
            return []
        for name in launch.advert.served_names:
            if not any(name in other.advert.served_names for other in self._launches.values()):
                self._finished.pop(name, None)
        return self._reject_stranded()

    def drain(self) -> list[Effect]:
        """Refuse everything from now on and reject what waits. What runs may finish."""
        self._draining = True
        return [self._reject(request, Draining("The daemon is stopping", retry_after=DEFAULT_RETRY_S))
                for request in list(self._waiting())]  # fmt: skip

    def request(self, request_id: int, target: Target, ticket: Ticket, now: float) -> Grant | None:
        """A new request; ids are unique and increasing. Grant, or None: it waits. Raises the refusal (cases 1-4, 6)."""
        if self._draining:  # 1
            raise Draining("The daemon is stopping", retry_after=DEFAULT_RETRY_S)
        pool = self._pool(target, ticket)  # 2, 3
        if ticket.principal is not None:  # 4
            self.limits.check(ticket.principal, now)
        request = _Request(request_id, target, ticket, self._queue_name(target, pool[0]), now)
        # 5: usually nobody waits anywhere, and whose turn it is needs no search.
        grant = self._grant_in_turn(request, now) if self._depth else self._grant_idle(request, pool, now)
        if grant is None and self._depth.get(request.queue, 0) >= self._max_queued:  # 6
            raise QueueFull(
                f"{self._max_queued} requests for {request.queue!r} are already waiting",
                retry_after=self._queue_clears_in(request.queue, now),
            )
        if ticket.principal is not None:
            self.limits.enter(ticket.principal, now)
        self._requests[request_id] = request
        if grant is None:  # 7
            self._enqueue(request)
        return grant

    def cancel(self, request_id: int, now: float) -> list[Effect]:
        """The caller went away, queued or running. Idempotent."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        if request.launch is not None:
            return self.done(request_id, now)
        self._dequeue(request)
        self._end(request)
        return self._pump(now)

    def expire(self, request_id: int, now: float) -> list[Effect]:
        """The deadline of a request has come: rejected if it still waits. Idempotent."""
        request = self._requests.get(request_id)
        if request is None or request.launch is not None:
            return []
        error = Unavailable(
            f"No free slot for {request.queue!r} within {now - request.since:.0f} s",
            retry_after=self._queue_clears_in(request.queue, now),
        )
        return [self._reject(request, error), *self._pump(now)]

    def done(self, request_id: int, now: float) -> list[Effect]:
        """A granted request has ended, however. Idempotent."""
        request = self._requests.get(request_id)
        if request is None or request.launch is None:
            return []
        launch = request.launch
        launch.sequences -= request.cost
        launch.in_flight[request.ticket.cls] -= 1
        times = self._finished.get(request.queue)
        if times is None:
            times = self._finished[request.queue] = deque(maxlen=_PACE_SAMPLES)
        times.append(now)
        self._end(request)
        return self._pump(now) if self._depth else []

    # Questions

    def instance(self, target: Target, ticket: Ticket) -> Instance:
        """The launch a request that needs no slot goes to. Raises as ``request`` does in cases 2 and 3."""
        launch = min(self._pool(target, ticket), key=lambda one: one.sequences)
        assert launch.instance is not None  # noqa: S101 - what _pool means
        return launch.instance

    def adverts(self) -> list[Advert]:
        return [launch.advert for launch in self._launches.values()]

    def load(self, launch_id: str) -> LoadReport:
        """In flight on one launch; queued for it by id or under any model name it serves."""
        launch = self._launches.get(launch_id)
        queued: dict[str, int] = dict.fromkeys(CLASSES, 0)
        if launch is None:
            return LoadReport(dict.fromkeys(CLASSES, 0), queued)
        for request in self._waiting():
            if launch.answers_to(request.target):
                queued[request.ticket.cls] += 1
        return LoadReport(dict(launch.in_flight), queued)

    def queues(self) -> dict[str, LoadReport]:
        """Running and waiting by served model, for all models that are announced or have anyone waiting."""
        names = {name for launch in self._launches.values() for name in launch.advert.served_names} | set(self._depth)
        found = {name: LoadReport(dict.fromkeys(CLASSES, 0), dict.fromkeys(CLASSES, 0)) for name in sorted(names)}
        for request in self._requests.values():
            if request.queue in found:
                report = found[request.queue]
                side = report.queued if request.launch is None else report.in_flight
                side[request.ticket.cls] += 1
        return found

    def rate(self, principal: Principal, now: float) -> RateState | None:
        return self.limits.rate(principal, now)

    # Case 2 and 3: who could serve this

    def _pool(self, target: Target, ticket: Ticket) -> list[_Launch]:
        known = [launch for launch in self._launches.values() if launch.answers_to(target)]
        pool = [launch for launch in known if _may_run(target, ticket, launch)]
        if not pool:
            raise self._refusal(target, ticket, known)
        return pool

    def _refusal(self, target: Target, ticket: Ticket, known: list[_Launch]) -> ApiError:
        visible = [launch.advert for launch in known if _may_see(target, ticket, launch.advert)]
        if isinstance(target, ByLaunch):
            return launch_refusal(target, visible, ended=not known and self._ended(target.id))
        return model_refusal(target, visible)

    def _reject_stranded(self) -> list[Effect]:
        effects: list[Effect] = []
        for request in list(self._waiting()):
            known = [launch for launch in self._launches.values() if launch.answers_to(request.target)]
            if not any(_may_run(request.target, request.ticket, launch) for launch in known):
                effects.append(self._reject(request, self._refusal(request.target, request.ticket, known)))
        return effects

    # Case 5: granting

    def _grant_idle(self, request: _Request, pool: list[_Launch], now: float) -> Grant | None:
        for launch in sorted(pool, key=_busyness) if len(pool) > 1 else pool:
            if _fits(request, launch):
                return self._grant(request, launch, now)
        return None

    def _grant_in_turn(self, request: _Request, now: float) -> Grant | None:
        for launch in self._by_busyness():
            if _may_run(request.target, request.ticket, launch) and launch.answers_to(request.target):
                ahead = self._next_for(launch)
                first = ahead is None or CLASSES.index(ahead.ticket.cls) > CLASSES.index(request.ticket.cls)
                if first and _fits(request, launch):
                    return self._grant(request, launch, now)
        return None

    def _pump(self, now: float) -> list[Effect]:
        """Grant to waiting requests as long as any launch's next one fits there."""
        effects: list[Effect] = []
        granted = True
        while granted and self._depth:
            granted = False
            for launch in self._by_busyness():
                request = self._next_for(launch)
                if request is not None and _fits(request, launch):
                    self._dequeue(request)
                    effects.append(self._grant(request, launch, now))
                    granted = True
                    break
        return effects

    def _grant(self, request: _Request, launch: _Launch, now: float) -> Grant:
        instance = launch.instance
        assert instance is not None  # noqa: S101 - only routable launches get here
        self._grants += 1
        launch.last_grant = self._grants
        request.launch = launch
        request.cost = _cost(request, instance)
        launch.sequences += request.cost
        launch.in_flight[request.ticket.cls] += 1
        return Grant(request.id, instance, now - request.since)

    def _by_busyness(self) -> list[_Launch]:
        routable = [launch for launch in self._launches.values() if launch.instance is not None]
        return sorted(routable, key=_busyness) if len(routable) > 1 else routable

    def _next_for(self, launch: _Launch) -> _Request | None:
        """The request whose turn it is on ``launch``: best class, then first come."""
        advert = launch.advert
        sources = [("model", name) for name in advert.served_names]
        sources += [("launch", advert.launch_id)]
        if advert.group_id != advert.launch_id:
            sources += [("launch", advert.group_id)]
        for cls in CLASSES:
            heads = [
                head
                for kind, name in sources
                for head in [next(self._eligible((kind, name, cls), launch), None)]
                if head is not None
            ]
            if heads:
                return min(heads, key=lambda one: one.id)
        return None

    def _eligible(self, lane: _Lane, launch: _Launch) -> Iterator[_Request]:
        for request in self._lanes.get(lane, {}).values():
            if _may_run(request.target, request.ticket, launch):
                yield request

    # Queues

    def _waiting(self) -> Iterator[_Request]:
        for lane in self._lanes.values():
            yield from lane.values()

    def _queue_name(self, target: Target, launch: _Launch) -> str:
        if isinstance(target, ByModel):
            return target.name
        return next(iter(launch.advert.served_names), target.id)

    def _enqueue(self, request: _Request) -> None:
        self._lanes.setdefault(_lane(request), {})[request.id] = request
        self._depth[request.queue] = self._depth.get(request.queue, 0) + 1

    def _dequeue(self, request: _Request) -> None:
        lane = self._lanes[_lane(request)]
        del lane[request.id]
        if not lane:
            del self._lanes[_lane(request)]
        self._depth[request.queue] -= 1
        if not self._depth[request.queue]:
            del self._depth[request.queue]

    def _reject(self, request: _Request, error: ApiError) -> Reject:
        self._dequeue(request)
        self._end(request)
        return Reject(request.id, error)

    def _end(self, request: _Request) -> None:
        del self._requests[request.id]
        if request.ticket.principal is not None:
            self.limits.leave(request.ticket.principal.name)

    def _queue_clears_in(self, queue: str, now: float) -> float:
        """Seconds until today's queue has drained at the pace requests of this model have finished lately."""
        lately = [time for time in self._finished.get(queue, ()) if time > now - _PACE_WINDOW_S]
        if len(lately) < 2 or now <= lately[0]:
            return DEFAULT_RETRY_S
        return self._depth.get(queue, 0) * (now - lately[0]) / len(lately)


def _busyness(launch: _Launch) -> tuple[int, int]:
    return launch.sequences, launch.last_grant


def _lane(request: _Request) -> _Lane:
    if isinstance(request.target, ByModel):
        return "model", request.target.name, request.ticket.cls
    return "launch", request.target.id, request.ticket.cls


def _cost(request: _Request, instance: Instance) -> int:
    return max(1, min(request.ticket.sequences, instance.slots))


def _fits(request: _Request, launch: _Launch) -> bool:
    instance = launch.instance
    return instance is not None and launch.sequences + _cost(request, instance) <= max(1, instance.slots)


def _may_see(target: Target, ticket: Ticket, advert: Advert) -> bool:
    """Whether the key's model list covers what the launch is and the name it was asked under."""
    if ticket.principal is None or ticket.principal.models is None:
        return True
    name = target.name if isinstance(target, ByModel) else (*advert.served_names, advert.base_model)[0]
    return ticket.principal.may_use(name, advert.base_model)


def _may_run(target: Target, ticket: Ticket, launch: _Launch) -> bool:
    instance = launch.instance
    if instance is None or not _may_see(target, ticket, launch.advert):
        return False
    return not isinstance(target, ByModel) or target.route is None or launch.offers(target.route)
