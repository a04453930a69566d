"""Admission against a model of it that is too simple to be wrong: plain lists, looked through from the start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.budgets import HandBudget
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import (
    ApiError,
    BadRequest,
    ConcurrencyLimit,
    Draining,
    LaunchNotReady,
    ModelLoading,
    ModelNotFound,
    NotFound,
    QueueFull,
    TooManyRequests,
    Unavailable,
)
from vllm_bootstrap.scheduler.admission import Admission
from vllm_bootstrap.scheduler.capacity import MAX_TAKEN_BACK
from vllm_bootstrap.scheduler.ports import EngineSignals
from vllm_bootstrap.scheduler.tickets import (
    ByLaunch,
    ByModel,
    Effect,
    Ending,
    Grant,
    Reject,
    Revoke,
    Target,
    Ticket,
    Usage,
)
from vllm_bootstrap.serving import Advert, Endpoint, Instance, RequestClass

MAX_QUEUED, MAX_BYTES, TOKENS, ENQUEUED, A_MINUTE = 4, 30, 40, 25, 5
LAUNCHES = {"a": (("m",), "g"), "b": (("m", "n"), "g"), "c": (("n",), "c")}
COUNTED_UNDER = {"a": "m", "b": "m", "g": "m", "c": "n"}
BASES = {"a": "open/1", "b": "secret/2", "c": "open/3"}
SCOPES = frozenset({"realtime", "batch"})
PRINCIPALS = {
    "nobody": None,
    "free": Principal("free", SCOPES),
    "two": Principal("two", SCOPES, max_parallel=2),
    "open": Principal("open", SCOPES, models=("m", "n", "open/*")),
    "counted": Principal("counted", SCOPES, tokens_per_minute=TOKENS, max_enqueued_tokens=ENQUEUED),
    "rated": Principal("rated", SCOPES, requests_per_minute=A_MINUTE),
}
targets = st.sampled_from([ByModel("m"), ByModel("n"), *map(ByLaunch, ("a", "b", "c", "g"))])
STATES = ("bootstrapping", "stopping", "failed", "ready")
tickets = st.builds(
    lambda owner, cls, sequences, tokens, size, priority, replayable: Ticket(
        owner, cls, sequences, tokens, PRINCIPALS[owner], tokens, priority, size, replayable
    ),
    st.sampled_from(sorted(PRINCIPALS)),
    st.sampled_from(("realtime", "batch")),
    st.integers(1, 6),
    st.integers(0, 8),
    st.integers(0, 12),
    st.integers(-1, 1),
    st.booleans(),
)


@dataclass(eq=False)
class Seen:
    id: int
    target: Target
    ticket: Ticket
    launch: str | None = None
    cost: int = 0
    counted: int = 0
    began: bool = False
    promoted: bool = False
    returning: bool = False
    kept: bool = False
    taken_back: int = 0
    entries: list[list[float]] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, int]:
        return -self.ticket.priority, self.id

    @property
    def model(self) -> str:
        """In whose queue it counts."""
        return self.target.name if isinstance(self.target, ByModel) else COUNTED_UNDER[self.target.id]

    @property
    def tokens(self) -> int:
        return self.ticket.prompt_tokens + self.ticket.output_tokens


class AdmissionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.fresh: list[HandBudget] = []
        self.admission = Admission(max_queued=MAX_QUEUED, max_queued_bytes=MAX_BYTES, budget=self.make_budget)
        self.budgets: dict[str, HandBudget] = {}
        self.slots: dict[str, int] = {}
        self.ejected: set[str] = set()
        self.retired: set[str] = set()
        self.states: dict[str, str] = {}
        self.waiting: list[Seen] = []
        self.running: dict[int, Seen] = {}
        self.ended: set[int] = set()
        self.window: list[list[float]] = []
        self.rated: list[float] = []
        self.last_id = 0
        self.now = 0.0
        self.forgotten: set[int] = set()
        self.last_taken_back: Seen | None = None

    def make_budget(self, slots: int) -> HandBudget:
        self.fresh.append(HandBudget(slots))
        return self.fresh[-1]

    # The simple model

    def answers(self, launch: str, target: Target) -> bool:
        names, group = LAUNCHES[launch]
        return target.name in names if isinstance(target, ByModel) else target.id in (launch, group)

    def may_see(self, launch: str, target: Target, ticket: Ticket) -> bool:
        principal = ticket.principal
        name = target.name if isinstance(target, ByModel) else LAUNCHES[launch][0][0]
        allowed = principal is None or principal.may_use(name, BASES[launch])
        return self.answers(launch, target) and allowed

    @property
    def open(self) -> set[str]:
        """Launches that new requests go to."""
        return self.slots.keys() - self.ejected - self.retired

    def may_run(self, launch: str, target: Target, ticket: Ticket) -> bool:
        return launch in self.open and self.may_see(launch, target, ticket)

    def pool(self, one: Seen) -> list[str]:
        return [launch for launch in LAUNCHES if self.may_run(launch, one.target, one.ticket)]

    def waits_for(self, launch: str, cls: RequestClass) -> list[Seen]:
        return [o for o in self.waiting if o.ticket.cls == cls and self.may_run(launch, o.target, o.ticket)]

    def on(self, launch: str) -> list[Seen]:
        return [one for one in self.running.values() if one.launch == launch and one.id not in self.forgotten]

    def used(self, launch: str) -> int:
        return sum(one.cost for one in self.on(launch))

    def cost(self, one: Seen, launch: str) -> int:
        return min(one.ticket.sequences, self.slots[launch])

    def fits(self, one: Seen, launch: str) -> bool:
        return self.used(launch) + self.cost(one, launch) <= self.slots[launch]

    def counted(self, one: Seen, launch: str) -> int:
        budget, cost = self.budgets[launch], self.cost(one, launch)
        alone = not any(o.ticket.cls == "batch" for o in self.on(launch))
        return max(1, min(cost, budget.slots - budget.reserve)) if alone else cost

    def fits_batch(self, one: Seen, launch: str) -> bool:
        budget = self.budgets[launch]
        held = sum(o.counted for o in self.on(launch) if o.ticket.cls == "batch")
        room = held + self.counted(one, launch) <= budget.allowance(self.now)
        return self.fits(one, launch) and room and budget.paced_until(self.now) is None

    def grant(self, one: Seen, effect: Grant) -> None:
        """A grant must be for one that waits, the first of its key and class, and must fit."""
        launch = effect.instance.launch_id
        assert self.may_run(launch, one.target, one.ticket)
        cls = one.ticket.cls
        mine = [o for o in self.waits_for(launch, cls) if o.ticket.owner == one.ticket.owner]
        assert min(mine, key=lambda o: o.rank) is one
        one.counted = self.counted(one, launch) if cls == "batch" else 0
        one.cost = self.cost(one, launch)
        if effect.promoted:
            assert cls == "batch"
            one.cost = one.counted = min(one.cost, self.slots[launch] - self.used(launch))
            assert one.cost > 0
            assert self.budgets[launch].paced_until(self.now) is None
        elif cls == "batch":
            assert not self.waits_for(launch, "realtime"), "batch went before realtime"
            assert self.fits_batch(one, launch)
        else:
            assert self.fits(one, launch)
        self.waiting.remove(one)
        one.launch, one.promoted, one.began, one.kept = launch, effect.promoted, False, False
        self.running[one.id] = one

    def follow(self, arrived: Seen | None = None, due: int | None = None, *, drains: bool = False) -> None:
        """``arrived``: who has come just now, ``due``: whose deadline has, ``drains``: the daemon stops. That is why
        somebody else may be refused who waits; beside that, only because nobody can serve him any more."""
        for effect in self.admission.take_effects():
            if isinstance(effect, Reject):
                self.check_rejected(effect, arrived, due, drains=drains)
            self.follow_one(effect)

    def check_rejected(self, effect: Reject, arrived: Seen | None, due: int | None, *, drains: bool) -> None:
        one, error = next(one for one in self.waiting if one.id == effect.request), effect.error
        if drains:
            assert type(error) is Draining
        elif one.id == due:
            assert type(error) is Unavailable
        elif isinstance(error, QueueFull):
            assert arrived is not None
            self.check_displaced(one, arrived)
        else:
            self.check_nobody_serves(error, one)
        assert error.retry_after is not None or error.status not in (429, 503)

    def queue_of(self, model: str) -> list[Seen]:
        return [one for one in self.waiting if one.model == model]

    def check_displaced(self, one: Seen, arrived: Seen) -> None:
        """Only by realtime, only as long as too much waits, and only whoever of batch came last and never had a place:
        of a key of which others wait, as long as there is one."""
        assert arrived.ticket.cls == "realtime"
        assert arrived.model == one.model
        waiting = self.queue_of(one.model)
        assert arrived in waiting
        assert len(waiting) > MAX_QUEUED or sum(o.ticket.body_bytes for o in waiting) > MAX_BYTES
        new = [o for o in waiting if o.ticket.cls == "batch" and o.launch is None]
        owners = [o.ticket.owner for o in waiting if o.ticket.cls == "batch"]
        assert one is max([o for o in new if owners.count(o.ticket.owner) > 1] or new, key=lambda o: o.id)

    def check_nobody_serves(self, refusal: ApiError, one: Seen) -> None:
        """Cases 2 and 3, said according to what is known of the launches that it is for."""
        assert not self.pool(one), f"{refusal!r} though {self.pool(one)} could serve it"
        seen = [self.states[name] for name in self.states if self.may_see(name, one.target, one.ticket)]
        alive = {state for state in seen if state != "failed"}
        said: set[type[ApiError]]
        if isinstance(one.target, ByModel):
            by_state = {"bootstrapping": ModelLoading, "ready": Unavailable, "stopping": Draining}
            said = {next((error for state, error in by_state.items() if state in alive), ModelNotFound)}
        elif alive:  # of a group's launches any may be spoken of
            said = {Unavailable if state == "ready" else LaunchNotReady for state in alive}
        else:
            said = {LaunchNotReady if seen else NotFound}
        assert type(refusal) in said

    def follow_one(self, effect: Effect) -> None:
        assert effect.request not in self.ended
        if isinstance(effect, Revoke):
            one = self.running[effect.request]
            assert one.ticket.cls == "batch"
            assert one.ticket.replayable
            assert self.may_be_taken_back(one)
            one.taken_back += 1
            one.returning = True
            self.last_taken_back = one
            return
        one = next(one for one in self.waiting if one.id == effect.request)
        if isinstance(effect, Grant):
            self.grant(one, effect)
        else:
            self.waiting.remove(one)
            self.end(one, worked=False)

    def may_be_taken_back(self, one: Seen) -> bool:
        stays = one.began or one.promoted or one.kept or one.returning or one.taken_back >= MAX_TAKEN_BACK
        return one.ticket.cls == "batch" and one.ticket.replayable and not stays

    def end(self, one: Seen, *, worked: bool) -> None:
        self.ended.add(one.id)
        if one.entries and not worked:
            one.entries[0][1] = 0

    def rated_lately(self) -> int:
        return sum(at > self.now - 60 for at in self.rated)

    def used_tokens(self) -> float:
        return sum(amount for at, amount in self.window if at > self.now - 60)

    # What may happen

    @initialize(slots=st.integers(1, 4))
    def two_are_ready(self, slots: int) -> None:
        self.ready("a", slots)
        self.ready("b", 3)

    @rule(
        launch=st.sampled_from(sorted(LAUNCHES)),
        serves=st.booleans(),
        slots=st.integers(1, 4),
        state=st.sampled_from([*STATES, None]),
    )
    def launch_changes(self, launch: str, serves: bool, slots: int, state: str | None) -> None:
        if serves:
            self.ready(launch, slots)
        elif state is not None:
            self.withdrawn(launch, state)
        else:
            self.forgotten_launch(launch)

    def ready(self, launch: str, slots: int) -> None:
        names, group = LAUNCHES[launch]
        self.slots[launch] = slots
        instance = Instance(launch, group, "raw", BASES[launch], names, Endpoint(uds="/x"), slots, ())
        self.say(launch, Advert(launch, group, BASES[launch], names, "ready", instance))

    def withdrawn(self, launch: str, state: str) -> None:
        names, group = LAUNCHES[launch]
        self.gone(launch)
        self.say(launch, Advert(launch, group, BASES[launch], names, state))

    def gone(self, launch: str) -> None:
        self.slots.pop(launch, None)
        self.ejected.discard(launch)
        self.retired.discard(launch)

    def say(self, launch: str, advert: Advert) -> None:
        self.states[launch] = advert.state
        self.fresh.clear()
        self.admission.update(advert, self.now)
        if self.fresh:
            self.budgets[launch] = self.fresh[0]
        self.follow()
        self.every_place_is_made()

    def forgotten_launch(self, launch: str) -> None:
        self.gone(launch)
        self.states.pop(launch, None)
        self.forgotten |= {one.id for one in self.running.values() if one.launch == launch}
        self.admission.forget(launch, self.now)
        self.follow()
        self.every_place_is_made()

    @rule(launch=st.sampled_from(sorted(LAUNCHES)), out=st.booleans())
    def connections_fail_or_work(self, launch: str, out: bool) -> None:
        if out:
            news = self.admission.eject(launch, self.now) is not None
            assert news == (launch in self.open)
            if news:
                self.ejected.add(launch)
        else:
            self.ejected.discard(launch)
            self.admission.readmit(launch, self.now)
        self.follow()

    @rule(launch=st.sampled_from(sorted(LAUNCHES)), away=st.booleans())
    def is_put_away_or_needed_after_all(self, launch: str, away: bool) -> None:
        before = set(self.retired)
        if away:
            self.admission.retire(launch, self.now)
            self.retired |= self.slots.keys() & {launch}
        else:
            self.admission.restore(launch, self.now)
            self.retired.discard(launch)
        self.follow()
        if self.retired != before:
            self.every_place_is_made()

    @rule(launch=st.sampled_from(sorted(LAUNCHES)), too_many=st.integers(0, 3), due=st.booleans())
    def engines_say_how_they_are(self, launch: str, too_many: int, due: bool) -> None:
        budget = self.budgets.get(launch)
        if budget is not None:
            budget.too_many, budget.due = too_many, self.now if due else None
        before = self.on(launch)
        self.admission.signals(launch, EngineSignals(running=1), self.now)
        self.follow()
        if budget is not None and launch in self.states:
            assert budget.of("signals")[-1] == (EngineSignals(running=1), self.now)
            self.what_is_too_much_comes_back(launch, before)

    def what_is_too_much_comes_back(self, launch: str, before: list[Seen]) -> None:
        """Or nothing more could be taken back, of what ran there before."""
        budget = self.budgets[launch]
        coming = sum(one.cost for one in self.on(launch) if one.returning)
        if launch in self.states:
            assert coming >= budget.too_many or not any(self.may_be_taken_back(one) for one in before)
        budget.too_many = 0

    @rule(
        launch=st.sampled_from(sorted(LAUNCHES)),
        most=st.none() | st.integers(0, 4),
        reserve=st.integers(0, 1),
        paced=st.none() | st.floats(0, 3),
        due=st.booleans(),
        too_many=st.integers(0, 3),
    )
    def budget_moves(
        self, launch: str, most: int | None, reserve: int, paced: float | None, due: bool, too_many: int
    ) -> None:
        budget = self.budgets.get(launch)
        if budget is not None:
            budget.most, budget.reserve, budget.too_many = most, reserve, too_many
            budget.paced = None if paced is None else self.now + paced
            budget.due = self.now if due else None
            before = self.on(launch)
            self.tick()
            self.what_is_too_much_comes_back(launch, before)

    @rule(passed=st.floats(0, 40))
    def time_passes(self, passed: float) -> None:
        self.now += passed
        self.tick()

    def tick(self) -> None:
        self.admission.tick(self.now)
        self.follow()

    @rule(wishes=st.lists(st.tuples(targets, tickets), min_size=1, max_size=6))
    def some_arrive(self, wishes: list[tuple[Target, Ticket]]) -> None:
        for target, ticket in wishes:
            self.arrives(target, ticket)

    def arrives(self, target: Target, ticket: Ticket) -> None:
        self.last_id += 1
        one = Seen(self.last_id, target, ticket)
        pool = self.pool(one)
        try:
            grant = self.admission.request(self.last_id, target, ticket, self.now)
        except ApiError as refusal:
            self.check_refusal(refusal, one, pool)
            self.follow()
            self.ended.add(one.id)
            return
        assert pool
        self.check_limits(one)
        self.waiting.append(one)
        if grant is not None:
            self.grant(one, grant)
        self.last_taken_back = None
        self.follow(arrived=one)
        if grant is None and ticket.cls == "realtime":
            self.room_is_made(pool)

    def room_is_made(self, pool: list[str]) -> None:
        """Realtime waits: as much of batch is taken back as all that wait with it need, and nothing more."""
        too_many = self.room_beyond_need(pool)
        if self.last_taken_back is not None:
            assert too_many < self.last_taken_back.cost

    def room_beyond_need(self, pool: list[str]) -> int:
        """How much more comes free than is waited for; what is too little cannot be had."""
        wanted = max(sum(self.cost(o, n) for o in self.waits_for(n, "realtime")) for n in pool)
        running = [one for launch in pool for one in self.on(launch)]
        coming = sum(self.slots[launch] - self.used(launch) for launch in pool)
        coming += sum(one.cost for one in running if one.returning)
        assert not wanted or coming >= wanted or not any(self.may_be_taken_back(one) for one in running)
        return coming - wanted

    def another_place_is_made(self, launch: str | None) -> None:
        """One there stays although it was taken back."""
        if launch in self.open:
            self.room_beyond_need([str(launch)])

    def every_place_is_made(self) -> None:
        """Launches have changed."""
        for one in self.waiting:
            if one.ticket.cls == "realtime":
                self.room_beyond_need(self.pool(one))

    def held(self, owner: str) -> list[Seen]:
        return [one for one in [*self.waiting, *self.running.values()] if one.ticket.owner == owner]

    def enqueued(self) -> int:
        return sum(one.tokens for one in self.held("counted") if one.ticket.cls == "batch")

    def check_limits(self, one: Seen) -> None:
        """It was accepted: its key must have had room."""
        assert one.ticket.owner != "two" or len(self.held("two")) < 2
        if one.ticket.owner == "rated":
            assert self.rated_lately() < A_MINUTE
            self.rated.append(self.now)
        if one.ticket.owner == "counted":
            assert self.used_tokens() + one.tokens <= TOKENS
            assert one.ticket.cls == "realtime" or self.enqueued() + one.tokens <= ENQUEUED
            one.entries.append([self.now, one.tokens])
            self.window += one.entries

    def check_refusal(self, refusal: ApiError, one: Seen, pool: list[str]) -> None:
        if isinstance(refusal, ConcurrencyLimit):
            assert len(self.held("two")) >= 2
        elif isinstance(refusal, QueueFull):
            waiting = self.queue_of(one.model)
            sizes = sum(o.ticket.body_bytes for o in waiting) + one.ticket.body_bytes
            assert len(waiting) >= MAX_QUEUED or sizes > MAX_BYTES
            if one.ticket.cls == "realtime":
                ahead = [n for n in pool if not self.waits_for(n, "realtime") and self.fits(one, n)]
                assert not ahead, "it could have run at once"
        elif isinstance(refusal, BadRequest | TooManyRequests):
            limit = ENQUEUED if one.ticket.cls == "batch" else TOKENS
            if one.ticket.owner == "rated":
                assert self.rated_lately() == A_MINUTE
            elif isinstance(refusal, BadRequest):
                assert one.tokens > limit
            else:
                too_many = self.used_tokens() + one.tokens > TOKENS
                assert too_many or (one.ticket.cls == "batch" and self.enqueued() + one.tokens > ENQUEUED)
        else:
            self.check_nobody_serves(refusal, one)

    @rule(data=st.data(), streamed=st.booleans())
    def answers_begin(self, data: st.DataObject, streamed: bool) -> None:
        if self.running:
            one = self.running[data.draw(st.sampled_from(sorted(self.running)))]
            was_coming, one.began, one.returning = one.returning, True, False
            self.admission.began(one.id, self.now, streamed=streamed)
            self.follow()
            if was_coming:
                self.another_place_is_made(one.launch)

    @rule(data=st.data(), ending=st.sampled_from(get_args(Ending)), used=st.none() | st.integers(0, 20))
    def ends(self, data: st.DataObject, ending: Ending, used: int | None) -> None:
        if self.running:
            one = self.running.pop(data.draw(st.sampled_from(sorted(self.running))))
            if used is not None:
                self.admission.settle(one.id, Usage(used, 0), self.now)
                if one.entries:
                    one.entries[0][1] = min(used, one.tokens)
                    self.window.append([self.now, max(0, used - one.tokens)])
            self.end(one, worked=ending != "unworked")
            self.admission.done(one.id, self.now, ending)
            self.follow()

    @rule(data=st.data())
    def comes_again(self, data: st.DataObject) -> None:
        """Taken back, or its engine could not be reached."""
        able = sorted(one.id for one in self.running.values() if one.returning or not one.began)
        if able:
            one = self.running.pop(data.draw(st.sampled_from(able)))
            pool = self.pool(one)
            one.returning = False
            self.forgotten.discard(one.id)
            try:
                grant = self.admission.again(one.id, self.now)
            except ApiError as refusal:
                self.check_nobody_serves(refusal, one)
                self.end(one, worked=False)
            else:
                assert pool
                self.waiting.append(one)
                if grant is not None:
                    self.follow_in_order(grant)
            self.follow()

    def follow_in_order(self, grant: Grant) -> None:
        """It got a place at once, though some may have got theirs before it, where it gave up its own."""
        one = next(one for one in self.waiting if one.id == grant.request)
        number = {id_: request.grant_number for id_, request in self.admission._requests.items()}
        for effect in self.admission.take_effects():
            assert not isinstance(effect, Reject)
            if one in self.waiting and isinstance(effect, Grant) and number[effect.request] > number[one.id]:
                self.grant(one, grant)
            self.follow_one(effect)
        if one in self.waiting:
            self.grant(one, grant)

    @rule(data=st.data())
    def stays_although_revoked(self, data: st.DataObject) -> None:
        returning = sorted(one.id for one in self.running.values() if one.returning)
        if returning:
            one = self.running[data.draw(st.sampled_from(returning))]
            one.returning, one.kept = False, True
            self.admission.kept(one.id)
            self.follow()
            self.another_place_is_made(one.launch)

    @rule(data=st.data())
    def client_goes(self, data: st.DataObject) -> None:
        everybody = sorted(self.running) + [one.id for one in self.waiting]
        if everybody:
            request = data.draw(st.sampled_from(everybody))
            waits = [one for one in self.waiting if one.id == request]
            one = waits[0] if waits else self.running.pop(request)
            self.waiting = [one for one in self.waiting if one.id != request]
            self.end(one, worked=not waits)
            self.admission.cancel(request, self.now)
            self.follow()

    @rule(data=st.data())
    def deadline_comes(self, data: st.DataObject) -> None:
        everybody = [one.id for one in self.waiting] + sorted(self.running)[:1]
        if everybody:
            request = data.draw(st.sampled_from(everybody))
            waited = request not in self.running
            self.admission.expire(request, self.now)
            self.follow(due=request)
            assert (request in self.ended) is waited

    @rule(data=st.data())
    def the_past_is_repeated(self, data: st.DataObject) -> None:
        if self.ended:
            request = data.draw(st.sampled_from(sorted(self.ended)))
            self.admission.done(request, self.now)
            self.admission.cancel(request, self.now)
            self.admission.expire(request, self.now)
            self.admission.began(request, self.now, streamed=True)
            self.admission.settle(request, Usage(5, 5), self.now)
            self.admission.kept(request)
            assert self.admission.take_effects() == []

    # What always holds

    @invariant()
    def nothing_waits_that_could_run(self) -> None:
        for launch in self.open:
            realtime, batch = self.waits_for(launch, "realtime"), self.waits_for(launch, "batch")
            assert not realtime or not all(self.fits(one, launch) for one in realtime)
            if batch and not realtime:
                assert not all(self.fits_batch(one, launch) for one in batch)
            budget = self.budgets[launch]
            if batch and budget.overdue(self.now) and budget.paced_until(self.now) is None:
                assert self.used(launch) >= self.slots[launch], "the floor was not given"

    @invariant()
    def everybody_is_in_one_place(self) -> None:
        """Waiting, running or ended, each that ever came: so all end once, and what is over has no place."""
        waiting = {one.id for one in self.waiting}
        assert len(waiting) == len(self.waiting)
        assert sorted([*waiting, *self.running, *self.ended]) == list(range(1, self.last_id + 1))

    @invariant()
    def nothing_waits_for_what_is_not_there(self) -> None:
        for one in self.waiting:
            assert self.pool(one)

    @invariant()
    def counts_agree(self) -> None:
        reports = self.admission.queues()
        for launch in self.states:
            load, mine = self.admission.load(launch), self.on(launch)
            assert sum(load.in_flight.values()) == len(mine)
            assert sum(load.queued.values()) == sum(self.answers(launch, one.target) for one in self.waiting)
            budget = self.budgets[launch]
            assert budget.slots == self.slots.get(launch, budget.slots)
            assert budget.realtime == sum(one.cost for one in mine if one.ticket.cls == "realtime")
            assert budget.batch == sum(one.cost for one in mine if one.ticket.cls == "batch")
            told = budget.of("batch_waits")
            assert (bool(told) and told[-1][0]) == bool(self.waits_for(launch, "batch"))
        assert sum(sum(report.queued.values()) for report in reports.values()) == len(self.waiting)
        assert self.admission.batch_waiting == sum(one.ticket.cls == "batch" for one in self.waiting)

    @invariant()
    def queues_are_bounded(self) -> None:
        """But for those that come back, and batch requests of which their key had no other when they came."""
        for name in ("m", "n"):
            shelf = self.admission._directory.shelf(name)
            mine = [one for one in self.waiting if shelf is not None and self.admission.model_of(one.id) == name]
            new = [one for one in mine if one.launch is None]
            lone, alone = self.lone(mine), self.lone(new)  # another of its key may have come back since
            assert sum(one.ticket.body_bytes for one in lone if one in new) <= 2 * MAX_BYTES
            bounded = [one for one in new if one not in alone]
            assert len(bounded) <= MAX_QUEUED
            assert sum(one.ticket.body_bytes for one in bounded) <= MAX_BYTES

    @staticmethod
    def lone(waiting: list[Seen]) -> list[Seen]:
        """Batch requests of keys of which no other is among them."""
        batch = [one for one in waiting if one.ticket.cls == "batch"]
        owners = [one.ticket.owner for one in batch]
        return [one for one in batch if owners.count(one.ticket.owner) == 1]

    @invariant()
    def keys_hold_what_they_have(self) -> None:
        for name in PRINCIPALS.keys() - {"nobody"}:
            assert self.admission.limits.parallel(name) == len(self.held(name))
        counted = PRINCIPALS["counted"]
        assert counted is not None
        state = self.admission.limits.rate(counted, self.now)
        assert state is not None
        assert state.tokens is not None
        assert state.tokens.remaining == max(0, TOKENS - self.used_tokens())
        assert self.admission.limits.enqueued("counted") == self.enqueued()
        rated = PRINCIPALS["rated"]
        assert rated is not None
        state = self.admission.limits.rate(rated, self.now)
        assert state is not None
        assert state.requests is not None
        assert state.requests.remaining == A_MINUTE - self.rated_lately()

    def teardown(self) -> None:
        self.admission.drain(self.now)
        self.follow(drains=True)
        assert self.waiting == []
        for request in list(self.running):
            self.admission.done(request, self.now)
            assert self.admission.take_effects() == []
        assert not self.admission._requests
        assert not self.admission._dispatcher.lines
        assert self.admission.batch_waiting == 0
        for report in self.admission.queues().values():
            assert not any((*report.in_flight.values(), *report.queued.values()))
        for name in PRINCIPALS:
            assert self.admission.limits.parallel(name) == self.admission.limits.enqueued(name) == 0
        for launch in self.admission._directory.launches.values():
            counts = (launch.sequences, launch.batch, launch.returning, launch.wanted, *launch.in_flight.values())
            assert not any(counts)
            assert not launch.revocable
        for budget in self.budgets.values():
            assert budget.realtime == budget.batch == 0


TestAdmission = AdmissionMachine.TestCase
TestAdmission.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)


@settings(max_examples=200, deadline=None)
@given(
    slots=st.integers(1, 6),
    cls=st.sampled_from(("realtime", "batch")),
    backlogs=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=40), min_size=2, max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_keys_that_wait_share_alike(slots: int, cls: RequestClass, backlogs: list[list[int]], order: object) -> None:
    """While two keys both wait, neither gets more than the other plus the largest request of each."""
    admission = Admission(max_queued=1000, budget=HandBudget)
    instance = Instance("a", "a", "raw", "base", ("m",), Endpoint(uds="/x"), slots, ())
    admission.update(Advert("a", "a", "base", ("m",), "ready", instance), 0.0)
    blocker = admission.request(1, ByModel("m"), Ticket("blocker", "realtime", slots), 0.0)
    assert blocker is not None
    running, left, got, largest = [1], {}, {}, {}
    owner_of: dict[int, tuple[str, int]] = {1: ("blocker", 0)}
    number = 1
    for key, backlog in enumerate(backlogs):
        owner = f"key{key}"
        left[owner], got[owner], largest[owner] = len(backlog), 0, max(min(cost, slots) for cost in backlog)
        for cost in backlog:
            number += 1
            owner_of[number] = (owner, min(cost, slots))
            assert admission.request(number, ByModel("m"), Ticket(owner, cls, cost), 0.0) is None
    while running:
        done = running.pop(order.randrange(len(running)))  # type: ignore[attr-defined]
        admission.done(done, 0.0)
        for effect in admission.take_effects():
            assert isinstance(effect, Grant)
            owner, cost = owner_of[effect.request]
            running.append(effect.request)
            got[owner] += cost
            left[owner] -= 1
            waiting = [key for key in left if left[key]]
            for one in waiting:
                for other in waiting:
                    assert got[one] - got[other] <= largest[one] + largest[other]
    assert not any(left.values())
