"""The slots of one launch: what runs there, what may come, what can be taken back. PURE.

Invariants:

* the sequences that run are never more than the slots, unless the engine was started again with fewer;
* batch starts only within the launch's budget (``BatchBudget``), and not before a batch prompt that is under way has
  been processed while realtime is active. Realtime may take every slot. A batch request larger than all that batch
  may ever have counts as that much, so it starts when nothing else of batch runs;
* a promoted batch request holds what is free, if it needs more: it must not make realtime wait for more than one place,
  and what of it finds no room waits inside the engine, behind realtime.

Nothing here knows queues, keys or clocks.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_bootstrap.scheduler.ports import BatchBudget
from vllm_bootstrap.scheduler.queues import CLASSES, Lane, Request, Turns
from vllm_bootstrap.scheduler.tickets import ByModel, Target
from vllm_bootstrap.serving import Advert, Instance, RequestClass

MAX_TAKEN_BACK = 2
"""So often a request is taken back before its first byte; then it stays where it is."""

Find = Callable[[RequestClass, str, "Launch"], Request | None]
"""``find(cls, key, launch)``: the key's next request that the launch may serve."""


class Launch:
    """A launch as last announced, with what runs there and how many wait for it. ``wanted`` is the slots that waiting
    realtime requests need, ``returning`` the slots of requests that were taken back and have not let go yet.
    ``ejected``: it cannot be connected to; ``retired``: it is to be put away when nothing runs there any more.
    ``ended_at``: when a request of a class ended there last."""

    def __init__(self, advert: Advert, budget: Callable[[int], BatchBudget], find: Find) -> None:
        self.ejected = self.retired = False
        self.ended_at: dict[RequestClass, float] = {}
        self.sequences = self.batch = self.returning = self.wanted = self.last_grant = 0
        self.in_flight: dict[RequestClass, int] = dict.fromkeys(CLASSES, 0)
        self.waiting: dict[RequestClass, int] = dict.fromkeys(CLASSES, 0)
        self.turns: dict[RequestClass, Turns] = {
            "realtime": Turns(lambda owner: find("realtime", owner, self)),
            "batch": Turns(lambda owner: find("batch", owner, self)),
        }
        self.revocable: dict[int, Request] = {}
        self._told_waits = False
        self.advert = advert
        self.slots = max(1, advert.instance.slots) if advert.instance is not None else 1
        self.budget = budget(self.slots)
        self._routes: frozenset[tuple[str, str]] = frozenset()
        self._learn(advert.instance)

    # What it is

    @property
    def instance(self) -> Instance | None:
        """Where new requests go; None: nowhere, now."""
        return None if self.ejected or self.retired else self.advert.instance

    @property
    def free(self) -> int:
        return self.slots - self.sequences

    @property
    def busyness(self) -> tuple[int, int]:
        """For choosing the least busy; among equals the one that was chosen longest ago."""
        return self.sequences, self.last_grant

    def say(self, advert: Advert) -> bool:
        """It announced itself: whether that changes what it may serve. Another engine than before, or none, ends an
        ejection and a retirement."""
        before, self.advert = self.advert, advert
        instance = advert.instance
        if instance is None or before.instance is None or instance.endpoint != before.instance.endpoint:
            self.ejected = self.retired = False
        if (instance, advert.served_names, advert.group_id) == (before.instance, before.served_names, before.group_id):
            return False
        self._learn(instance)
        return True

    def _learn(self, instance: Instance | None) -> None:
        self._routes = frozenset((route.method, route.path) for route in instance.routes) if instance else frozenset()
        if instance is not None:
            self.slots = max(1, instance.slots)
            self.budget.resize(self.slots)

    def answers_to(self, target: Target) -> bool:
        if isinstance(target, ByModel):
            return target.name in self.advert.served_names
        return target.id in (self.advert.launch_id, self.advert.group_id)

    def offers(self, route: tuple[str, str]) -> bool:
        instance = self.advert.instance
        return instance is not None and (route in self._routes or instance.offers(*route))

    # Who waits for it

    def count(self, request: Request, change: int, now: float) -> None:
        """``change`` is 1: a request that it may serve has begun to wait; -1: that does not wait any more."""
        self.waiting[request.ticket.cls] += change
        if request.ticket.cls == "realtime":
            self.wanted += change * self.cost_of(request)
        else:
            self.tell_waits(now)

    def nobody_waits(self) -> None:
        """Forget who waits, to be told anew with ``all_wait``. ``tell_waits`` comes after that."""
        self.waiting = dict.fromkeys(CLASSES, 0)
        self.wanted = 0

    def all_wait(self, lane: Lane) -> None:
        """It may serve those that wait in ``lane``."""
        for (cls, _), line in lane.lines.items():
            self.waiting[cls] += line.live
            self.turns[cls].enter(line.head())
            if cls == "realtime":
                self.wanted += sum(self.cost_of(request) for request in line)

    def tell_waits(self, now: float) -> None:
        """Let the budget know whether any batch request waits."""
        if (self.waiting["batch"] > 0) != self._told_waits:
            self._told_waits = not self._told_waits
            self.budget.batch_waits(self._told_waits, now)

    # What may start

    def cost_of(self, request: Request) -> int:
        sequences = request.ticket.sequences
        return sequences if 1 <= sequences <= self.slots else 1 if sequences < 1 else self.slots

    def fits(self, request: Request) -> bool:
        """Whether there are slots for a realtime request."""
        running, slots = self.sequences, self.slots
        return running + request.ticket.sequences <= slots or running + self.cost_of(request) <= slots

    def fits_batch(self, request: Request, now: float) -> bool:
        """Whether there are slots and budget for a batch request."""
        if not self.fits(request) or self.budget.paced_until(now) is not None:
            return False
        return self.batch + self._counts(request, now) <= self.budget.allowance(now)

    def promotes(self, now: float) -> bool:
        """Whether a batch request should start now for the floor's sake, whatever else waits."""
        return self.free > 0 and self.budget.overdue(now) and self.budget.paced_until(now) is None

    def _counts(self, request: Request, now: float) -> int:
        """What it counts against the batch budget."""
        cost = self.cost_of(request)
        if self.batch or cost <= 1:
            return cost
        report = self.budget.report(now)
        return max(1, min(cost, report.slots - report.reserve))

    # What starts and ends

    def start(self, request: Request, number: int, now: float, *, promoted: bool = False) -> None:
        """``request`` gets its slots. ``number`` counts grants."""
        request.launch, request.granted_at = self, now
        request.grant_number = self.last_grant = number
        request.promoted, request.began = promoted, False
        ticket, cost = request.ticket, self.cost_of(request)
        if promoted and cost > self.free:
            cost = self.free
        request.cost = cost
        cls = ticket.cls
        if cls == "realtime":
            self.budget.realtime_granted(cost, ticket.prompt_tokens, now)
        else:
            if promoted:
                self.budget.promoted(now)
            request.counted = cost if promoted else self._counts(request, now)
            self.batch += request.counted
            self.budget.batch_granted(request.id, cost, ticket.prompt_tokens, now)
            if ticket.replayable and not promoted and request.taken_back < MAX_TAKEN_BACK:
                self.revocable[request.id] = request
        self.sequences += cost
        self.in_flight[cls] += 1

    def began(self, request: Request, now: float, *, streamed: bool) -> None:
        """The answer has begun: too late to take it back."""
        request.began = True
        if request.ticket.cls == "realtime":
            if streamed:
                self.budget.realtime_began(now - request.granted_at, now)
            return
        self.keep(request)
        if streamed:
            self.budget.batch_began(request.id, now)

    def end(self, request: Request, now: float, *, worked: bool) -> None:
        """``request`` gives its slots back."""
        cls, cost = request.ticket.cls, request.cost
        self.sequences -= cost
        self.in_flight[cls] -= 1
        self.ended_at[cls] = now
        if cls == "realtime":
            self.budget.realtime_ended(cost, now)
        else:
            self.keep(request)
            self.batch -= request.counted
            self.budget.batch_ended(request.id, cost, now, worked=worked)
        request.launch = None

    # What is taken back

    def youngest(self) -> Request | None:
        """What would be taken back first."""
        return self.revocable[next(reversed(self.revocable))] if self.revocable else None

    def revoke(self, request: Request) -> None:
        """Its holder is asked to let go."""
        del self.revocable[request.id]
        request.returning = True
        request.taken_back += 1
        self.returning += request.cost

    def keep(self, request: Request) -> None:
        """It is not (any more) to be taken back."""
        self.revocable.pop(request.id, None)
        if request.returning:
            request.returning = False
            self.returning -= request.cost
