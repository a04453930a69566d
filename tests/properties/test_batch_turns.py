"""Sources of several owners that come, go and change: whoever has work gets as much as the others that have."""

from __future__ import annotations

from math import inf

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_bootstrap.batches.turns import Source, Turns

OWNERS = ("a", "b", "c", "d")


class TurnsMachine(RuleBasedStateMachine):
    """``got``: for each two owners, what each has taken since both have work."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = Turns()
        self.ids = 0
        self.sources: dict[str, Source] = {}
        self.got: dict[tuple[str, str], list[int]] = {}
        self.largest: dict[str, int] = {}

    def follow(self) -> None:
        owners = sorted({source.owner for source in self.sources.values() if source.ready})
        both = [(one, other) for one in owners for other in owners if one < other]
        self.got = {pair: self.got.get(pair, [0, 0]) for pair in both}

    def change(self, source: Source) -> None:
        self.sources[source.id] = source
        self.follow()

    def any_id(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.sources)))

    @rule(owner=st.sampled_from(OWNERS), priority=st.integers(-2, 2), deadline=st.sampled_from((1.0, 2.0, inf)))
    def one_comes(self, owner: str, priority: int, deadline: float) -> None:
        self.ids += 1
        source = Source(f"{self.ids:06}", owner, priority, deadline)
        self.turns.put(source)
        self.change(source)

    @precondition(lambda self: self.sources)
    @rule(data=st.data())
    def one_goes(self, data: st.DataObject) -> None:
        gone = self.any_id(data)
        self.turns.drop(gone)
        del self.sources[gone]
        self.follow()

    @precondition(lambda self: self.sources)
    @rule(data=st.data(), ready=st.booleans())
    def one_is_ready_or_not(self, data: st.DataObject, ready: bool) -> None:
        old = self.sources[self.any_id(data)]
        self.turns.set_ready(old.id, ready)
        self.change(Source(old.id, old.owner, old.priority, old.deadline, ready))

    @precondition(lambda self: self.sources)
    @rule(data=st.data(), priority=st.integers(-2, 2))
    def one_changes(self, data: st.DataObject, priority: int) -> None:
        old = self.sources[self.any_id(data)]
        self.turns.change(old.id, priority)
        self.change(Source(old.id, old.owner, priority, old.deadline, old.ready))

    @rule(takes=st.lists(st.integers(1, 8), min_size=1, max_size=12))
    def some_are_taken(self, takes: list[int]) -> None:
        for sequences in takes:
            turn = self.turns.next()
            if turn is None:
                return
            owner = self.sources[turn].owner
            self.turns.taken(turn, sequences)
            self.largest[owner] = max(sequences, self.largest.get(owner, 0))
            for (one, other), amounts in self.got.items():
                amounts[0] += sequences * (one == owner)
                amounts[1] += sequences * (other == owner)

    @invariant()
    def the_turn_is_the_best_ready_source_of_its_owner(self) -> None:
        turn = self.turns.next()
        ready = [source for source in self.sources.values() if source.ready]
        assert (turn is None) == (not ready)
        if turn is not None:
            owner = self.sources[turn].owner
            assert turn == min((source for source in ready if source.owner == owner), key=lambda one: one.rank).id

    @invariant()
    def nobody_gets_more_than_another_that_has_work_as_well(self) -> None:
        for (one, other), (mine, yours) in self.got.items():
            assert abs(mine - yours) <= self.largest.get(one, 0) + self.largest.get(other, 0)

    @invariant()
    def memory_is_bounded(self) -> None:
        assert len(self.turns) == len(self.sources)
        assert len(self.turns._owners) <= len(OWNERS)


TurnsMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBatchTurns = TurnsMachine.TestCase
