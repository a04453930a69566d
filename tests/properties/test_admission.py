"""Admission against a model of it that is too simple to be wrong: plain lists, looked through from the start."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import ApiError, ConcurrencyLimit, QueueFull
from vllm_bootstrap.scheduler.admission import Admission
from vllm_bootstrap.scheduler.tickets import ByLaunch, ByModel, Effect, Grant, Ticket
from vllm_bootstrap.serving import Advert, Endpoint, Instance, RequestClass

MAX_QUEUED = 4
LAUNCHES = {"a": (("m",), "g"), "b": (("m", "n"), "g"), "c": (("n",), "c")}
BASES = {"a": "open/1", "b": "secret/2", "c": "open/3"}
PRINCIPALS = (
    None,
    Principal("free", frozenset({"realtime"})),
    Principal("two", frozenset({"realtime"}), max_parallel=2),
    Principal("open", frozenset({"realtime"}), models=("m", "n", "open/*")),
)
targets = st.sampled_from([ByModel("m"), ByModel("n"), *map(ByLaunch, ("a", "b", "c", "g"))])
STATES = ("bootstrapping", "stopping", "failed", "ready")
classes: st.SearchStrategy[RequestClass] = st.sampled_from(("realtime", "batch"))
wishes = st.tuples(targets, classes, st.integers(1, 6), st.sampled_from(PRINCIPALS))


@dataclass(eq=False)
class Seen:
    id: int
    target: ByModel | ByLaunch
    ticket: Ticket
    launch: str | None = None
    cost: int = 0


class AdmissionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(max_queued=MAX_QUEUED)
        self.slots: dict[str, int] = {}
        self.known: set[str] = set()
        self.waiting: list[Seen] = []
        self.running: dict[int, Seen] = {}
        self.ended: set[int] = set()
        self.last_id = 0
        self.now = 0.0
        self.forgotten: set[int] = set()

    # The simple model

    def answers(self, launch: str, target: ByModel | ByLaunch) -> bool:
        names, group = LAUNCHES[launch]
        return target.name in names if isinstance(target, ByModel) else target.id in (launch, group)

    def may_run(self, launch: str, target: ByModel | ByLaunch, ticket: Ticket) -> bool:
        principal = ticket.principal
        name = target.name if isinstance(target, ByModel) else LAUNCHES[launch][0][0]
        allowed = principal is None or principal.may_use(name, BASES[launch])
        return launch in self.slots and self.answers(launch, target) and allowed

    def used(self, launch: str) -> int:
        return sum(one.cost for one in self.running.values() if one.launch == launch)

    def fits(self, one: Seen, launch: str) -> bool:
        return self.used(launch) + min(one.ticket.sequences, self.slots[launch]) <= self.slots[launch]

    def next_for(self, launch: str) -> Seen | None:
        mine = [one for one in self.waiting if self.may_run(launch, one.target, one.ticket)]
        return min(mine, key=lambda one: (one.ticket.cls == "batch", one.id), default=None)

    def grant(self, one: Seen, launch: str) -> None:
        """A grant must go to the one whose turn it is, where it fits."""
        assert self.next_for(launch) is one
        assert self.fits(one, launch)
        self.waiting.remove(one)
        one.launch, one.cost = launch, min(one.ticket.sequences, self.slots[launch])
        self.running[one.id] = one

    def follow(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert effect.request not in self.ended
            one = next(one for one in self.waiting if one.id == effect.request)
            if isinstance(effect, Grant):
                self.grant(one, effect.instance.launch_id)
            else:
                self.waiting.remove(one)
                self.ended.add(one.id)

    # What may happen

    @initialize(slots=st.integers(1, 4))
    def two_are_ready(self, slots: int) -> None:
        self.ready("a", slots)
        self.ready("b", 3)

    @rule(launch=st.sampled_from(sorted(LAUNCHES)), slots=st.integers(0, 4), state=st.sampled_from([*STATES, None]))
    def launch_changes(self, launch: str, slots: int, state: str | None) -> None:
        if slots:
            self.ready(launch, slots)
        elif state is not None:
            self.withdrawn(launch, state)
        else:
            self.forgotten_launch(launch)

    def ready(self, launch: str, slots: int) -> None:
        names, group = LAUNCHES[launch]
        self.slots[launch] = slots
        self.known.add(launch)
        instance = Instance(launch, group, "raw", BASES[launch], names, Endpoint(uds="/x"), slots, ())
        advert = Advert(launch, group, BASES[launch], names, "ready", instance)
        self.follow(self.admission.update(advert, self.now))

    def withdrawn(self, launch: str, state: str) -> None:
        names, group = LAUNCHES[launch]
        self.slots.pop(launch, None)
        self.known.add(launch)
        self.follow(self.admission.update(Advert(launch, group, BASES[launch], names, state), self.now))

    def forgotten_launch(self, launch: str) -> None:
        self.slots.pop(launch, None)
        self.known.discard(launch)
        for one in self.running.values():  # they end without being counted against a launch of the same id
            if one.launch == launch:
                one.cost = 0
                self.forgotten.add(one.id)
        self.follow(self.admission.forget(launch))

    @rule(wishes=st.lists(wishes, min_size=1, max_size=6), passed=st.floats(0, 5))
    def some_arrive(
        self, wishes: list[tuple[ByModel | ByLaunch, RequestClass, int, Principal | None]], passed: float
    ) -> None:
        self.now += passed
        for target, cls, sequences, principal in wishes:
            self.arrives(target, Ticket("me", cls, sequences, 0, principal))

    def arrives(self, target: ByModel | ByLaunch, ticket: Ticket) -> None:
        self.last_id += 1
        pool = [launch for launch in LAUNCHES if self.may_run(launch, target, ticket)]
        held = sum(one.ticket.principal == ticket.principal for one in [*self.waiting, *self.running.values()])
        try:
            grant = self.admission.request(self.last_id, target, ticket, self.now)
        except ApiError as refusal:
            self.check_refusal(refusal, target, ticket, pool, held)
            return
        assert pool
        one = Seen(self.last_id, target, ticket)
        self.waiting.append(one)
        if grant is not None:
            self.grant(one, grant.instance.launch_id)

    def check_refusal(
        self, refusal: ApiError, target: ByModel | ByLaunch, ticket: Ticket, pool: list[str], held: int
    ) -> None:
        principal = ticket.principal
        if isinstance(refusal, ConcurrencyLimit):
            assert principal is not None
            assert principal.max_parallel is not None
            assert held >= principal.max_parallel
        elif isinstance(refusal, QueueFull):
            assert len(self.waiting) >= MAX_QUEUED
            one = Seen(self.last_id, target, ticket)
            self.waiting.append(one)
            turns = [launch for launch in pool if self.next_for(launch) is one and self.fits(one, launch)]
            self.waiting.remove(one)
            assert not turns, "it could have run at once"
        else:
            assert not pool, f"{refusal!r} though {pool} could serve it"

    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        if self.running:
            request = data.draw(st.sampled_from(sorted(self.running)))
            del self.running[request]
            self.ended.add(request)
            self.follow(self.admission.done(request, self.now))

    @rule(data=st.data())
    def client_goes(self, data: st.DataObject) -> None:
        everybody = sorted(self.running) + [one.id for one in self.waiting]
        if everybody:
            request = data.draw(st.sampled_from(everybody))
            self.running.pop(request, None)
            self.waiting = [one for one in self.waiting if one.id != request]
            self.ended.add(request)
            self.follow(self.admission.cancel(request, self.now))

    @rule(data=st.data())
    def deadline_comes(self, data: st.DataObject) -> None:
        everybody = [one.id for one in self.waiting] + sorted(self.running)[:1]
        if everybody:
            request = data.draw(st.sampled_from(everybody))
            effects = self.admission.expire(request, self.now)
            assert request in self.running or (effects and effects[0].request == request)
            self.follow(effects)

    @rule(data=st.data())
    def the_past_is_repeated(self, data: st.DataObject) -> None:
        if self.ended:
            request = data.draw(st.sampled_from(sorted(self.ended)))
            assert self.admission.done(request, self.now) == []
            assert self.admission.cancel(request, self.now) == []
            assert self.admission.expire(request, self.now) == []

    # What always holds

    @invariant()
    def nothing_waits_that_could_run(self) -> None:
        for launch in self.slots:
            one = self.next_for(launch)
            assert one is None or not self.fits(one, launch)

    @invariant()
    def nothing_waits_for_what_is_not_there(self) -> None:
        for one in self.waiting:
            assert any(self.may_run(launch, one.target, one.ticket) for launch in LAUNCHES)

    @invariant()
    def counts_agree(self) -> None:
        reports = self.admission.queues()
        for launch in self.known:
            load = self.admission.load(launch)
            mine = [o for o in self.running.values() if o.launch == launch and o.id not in self.forgotten]
            assert sum(load.in_flight.values()) == len(mine)
            assert sum(load.queued.values()) == sum(self.answers(launch, one.target) for one in self.waiting)
        assert sum(sum(report.queued.values()) for report in reports.values()) == len(self.waiting)
        assert all(sum(report.queued.values()) <= MAX_QUEUED for report in reports.values())

    @invariant()
    def keys_hold_what_they_have(self) -> None:
        for principal in PRINCIPALS[1:]:
            assert principal is not None
            held = sum(one.ticket.principal == principal for one in [*self.waiting, *self.running.values()])
            assert self.admission.limits.parallel(principal.name) == held

    def teardown(self) -> None:
        self.follow(self.admission.drain())
        assert self.waiting == []
        for request in list(self.running):
            assert self.admission.done(request, self.now) == []
        assert not self.admission._requests
        assert not self.admission._depth
        assert not self.admission._lanes


TestAdmission = AdmissionMachine.TestCase
TestAdmission.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
