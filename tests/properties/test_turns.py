"""Turns of keys that come and go at one launch: whoever waits gets as much as the others that do, whenever it began."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.budgets import HandBudget
from vllm_bootstrap.scheduler.admission import Admission
from vllm_bootstrap.scheduler.tickets import ByModel, Grant, Ticket
from vllm_bootstrap.serving import Advert, Endpoint, Instance, RequestClass

MODEL = ByModel("m")
KEYS = ("a", "b", "c")


class TurnsMachine(RuleBasedStateMachine):
    """``got``: for each two keys, what each has been given since both began to wait. ``ahead``: for each key that came
    for the first time and waits, who was given a place before it."""

    @initialize(slots=st.integers(1, 4), cls=st.sampled_from(("realtime", "batch")))
    def one_launch(self, slots: int, cls: RequestClass) -> None:
        self.slots, self.cls = slots, cls
        self.admission = Admission(max_queued=10_000, budget=HandBudget)
        instance = Instance("a", "a", "raw", "base", ("m",), Endpoint(uds="/x"), slots, ())
        self.admission.update(Advert("a", "a", "base", ("m",), "ready", instance), 0.0)
        self.ids = 0
        self.waiting: dict[int, tuple[str, int]] = {}
        self.running: dict[int, tuple[str, int]] = {}
        self.largest: dict[str, int] = {}
        self.got: dict[tuple[str, str], list[int]] = {}
        self.ahead: dict[str, list[str]] = {}

    def waits(self, owner: str) -> bool:
        return any(who == owner for who, _ in self.waiting.values())

    def comes(self, owner: str, sequences: int) -> None:
        self.ids += 1
        cost = min(sequences, self.slots)
        self.largest[owner] = max(cost, self.largest.get(owner, 0))
        self.waiting[self.ids] = owner, cost
        grant = self.admission.request(self.ids, MODEL, Ticket(owner, self.cls, sequences), 0.0)
        if grant is not None:
            self.granted(grant)
        self.follow()

    def follow(self) -> None:
        for effect in self.admission.take_effects():
            assert isinstance(effect, Grant)
            self.granted(effect)
        self.forget_who_does_not_wait()

    def granted(self, grant: Grant) -> None:
        owner, cost = self.waiting.pop(grant.request)
        self.running[grant.request] = owner, cost
        assert sum(held for _, held in self.running.values()) <= self.slots
        for (one, other), amounts in self.got.items():
            amounts[0] += cost * (one == owner)
            amounts[1] += cost * (other == owner)
        self.ahead.pop(owner, None)
        for before in self.ahead.values():
            before.append(owner)

    def forget_who_does_not_wait(self) -> None:
        owners = sorted({owner for owner, _ in self.waiting.values()})
        both = [(one, other) for one in owners for other in owners if one < other]
        self.got = {pair: self.got.get(pair, [0, 0]) for pair in both}
        self.ahead = {owner: before for owner, before in self.ahead.items() if owner in owners}

    # What may happen

    @rule(
        requests=st.lists(st.tuples(st.sampled_from(KEYS), st.integers(1, 5)), min_size=1, max_size=8),
    )
    def some_come(self, requests: list[tuple[str, int]]) -> None:
        for owner, sequences in requests:
            self.comes(owner, sequences)

    @rule(sequences=st.integers(1, 5))
    def a_stranger_comes(self, sequences: int) -> None:
        owner = f"stranger-{self.ids}"
        self.ahead[owner] = []
        self.comes(owner, sequences)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), times=st.integers(1, 4))
    def some_end(self, data: st.DataObject, times: int) -> None:
        for _ in range(times):
            if self.running:
                request = data.draw(st.sampled_from(sorted(self.running)))
                del self.running[request]
                self.admission.done(request, 0.0)
                self.follow()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def one_goes(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[request]
        self.admission.cancel(request, 0.0)
        self.follow()

    # What always holds

    @invariant()
    def nobody_gets_more_than_another_that_waits_as_well(self) -> None:
        """Plus the largest request of each."""
        for (one, other), (mine, yours) in self.got.items():
            assert abs(mine - yours) <= self.largest[one] + self.largest[other]

    @invariant()
    def a_newcomer_waits_for_one_request_of_each_other_key_at_most(self) -> None:
        for before in self.ahead.values():
            assert len(before) == len(set(before))

    @invariant()
    def no_place_is_empty_while_somebody_waits_for_one(self) -> None:
        held = sum(cost for _, cost in self.running.values())
        assert not self.waiting or held + max(cost for _, cost in self.waiting.values()) > self.slots

    def teardown(self) -> None:
        """All get their turn."""
        while getattr(self, "running", None):
            request = next(iter(self.running))
            del self.running[request]
            self.admission.done(request, 0.0)
            self.follow()
            self.nobody_gets_more_than_another_that_waits_as_well()
            self.a_newcomer_waits_for_one_request_of_each_other_key_at_most()
        assert not getattr(self, "waiting", None)


TurnsMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestTurns = TurnsMachine.TestCase
