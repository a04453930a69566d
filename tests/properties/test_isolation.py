"""A lane whose engines die: by poison lines whenever they have one, and sometimes by accident."""

from __future__ import annotations

from math import ceil, log2

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_bootstrap.batches.isolation import POISON_DEATHS, Isolation


def allowed_deaths(lines: int) -> int:
    """How many deaths a line may be there at that was in flight with ``lines - 1`` others at the first."""
    return ceil(log2(lines)) + POISON_DEATHS


@given(
    lines=st.integers(1, 300),
    poison=st.sets(st.integers(0, 299), max_size=3),
    places=st.integers(1, 300),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_all_poison_is_found_all_else_ends_and_deaths_are_few(lines, poison, places, order) -> None:
    poison = {key for key in poison if key < lines}
    lane: Isolation[int] = Isolation()
    waiting, running, found, deaths = list(range(lines)), [], set(), 0
    while waiting or running:
        for key in [key for key in waiting if lane.admits(key)][: places - len(running)]:
            lane.started(key)
            waiting.remove(key)
            running.append(key)
        assert running
        if poison.intersection(running):
            deaths += 1
            dead = lane.died(running)
            waiting += [key for key in running if key != dead]
            running = []
            found |= {dead} - {None}
        else:
            lane.ended(running.pop(order.randrange(len(running))))
    assert found == poison
    assert deaths <= len(poison) * allowed_deaths(min(lines, places))
    assert not lane.suspects


class IsolationMachine(RuleBasedStateMachine):
    """``waiting``: lines to be run, with their stored deaths. ``engines``: what is in flight on each, in order.
    ``company``: how many were in flight at each death a line was there at, since it last showed its innocence."""

    @initialize(engines=st.integers(1, 3), places=st.integers(1, 8))
    def empty_lane(self, engines: int, places: int) -> None:
        self.lane: Isolation[int] = Isolation()
        self.places = places
        self.engines: list[list[int]] = [[] for _ in range(engines)]
        self.lines = 0
        self.stored: dict[int, int] = {}
        self.waiting: set[int] = set()
        self.away: set[int] = set()
        self.poison: set[int] = set()
        self.company: dict[int, list[int]] = {}

    @property
    def running(self) -> list[int]:
        return [key for engine in self.engines for key in engine]

    def admitted(self) -> list[int]:
        for key in self.waiting:  # one that comes with deaths changes the answer for all
            self.lane.admits(key, self.stored[key])
        return [key for key in sorted(self.waiting) if self.lane.admits(key, self.stored[key])]

    def start(self, key: int, engine: int) -> None:
        if self.lane.isolating:
            assert {key, *self.running} <= set(self.lane.suspects)
        self.lane.started(key)
        self.waiting.discard(key)
        self.engines[engine].append(key)

    def leaves_flight(self, key: int) -> None:
        next(engine for engine in self.engines if key in engine).remove(key)

    def dies(self, engine: int) -> None:
        keys, self.engines[engine] = self.engines[engine], []
        dead = self.lane.died(keys)
        for key in keys:
            self.stored[key] += 1
            self.company.setdefault(key, []).append(len(keys))
        self.waiting.update(key for key in keys if key != dead)
        if dead is not None:
            assert self.company.pop(dead).count(1) == POISON_DEATHS
            self.poison.discard(dead)

    # What may happen

    @rule(count=st.integers(1, 8), stored=st.integers(0, 2), poison=st.booleans())
    def lines_come(self, count: int, stored: int, poison: bool) -> None:
        for _ in range(count):
            self.lines += 1
            self.stored[self.lines] = stored
            self.waiting.add(self.lines)
        if poison:
            self.poison.add(self.lines)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def some_start(self, data: st.DataObject) -> None:
        for key in self.admitted():
            engine = data.draw(st.integers(0, len(self.engines) - 1))
            if len(self.engines[engine]) < self.places:
                self.start(key, engine)

    @precondition(lambda self: set(self.running) - self.poison)
    @rule(data=st.data(), again=st.booleans())
    def one_ends(self, data: st.DataObject, again: bool) -> None:
        key = data.draw(st.sampled_from(sorted(set(self.running) - self.poison)))
        self.leaves_flight(key)
        self.lane.ended(key)
        self.company.pop(key, None)
        if again:  # it failed, and is to be tried once more
            self.waiting.add(key)

    @precondition(lambda self: self.poison.intersection(self.running))
    @rule()
    def poison_kills(self) -> None:
        for number, engine in enumerate(self.engines):
            if self.poison.intersection(engine):
                self.dies(number)

    @rule(data=st.data())
    def an_accident_or_an_operators_stop(self, data: st.DataObject) -> None:
        self.dies(data.draw(st.integers(0, len(self.engines) - 1)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def one_comes_back(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        self.leaves_flight(key)
        self.lane.came_back(key)
        self.waiting.add(key)

    @precondition(lambda self: self.running or self.waiting)
    @rule(data=st.data())
    def one_is_withdrawn(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted({*self.running, *self.waiting})))
        if key in self.waiting:
            self.waiting.discard(key)
        else:
            self.leaves_flight(key)
        self.lane.withdrawn(key)
        self.company.pop(key, None)
        self.away.add(key)

    @precondition(lambda self: self.away)
    @rule()
    def the_withdrawn_come_again(self) -> None:
        self.waiting |= self.away
        self.away = set()

    # What always holds

    @invariant()
    def something_runs_or_may_run(self) -> None:
        if self.waiting:
            admitted = self.admitted()
            assert admitted or self.running
            assert not self.lane.isolating or set(admitted) == set(self.lane.wanted())

    @invariant()
    def what_is_known_is_what_is(self) -> None:
        assert self.lane.in_flight == len(self.running)
        assert set(self.lane.suspects) <= {*self.waiting, *self.running}
        assert self.company.keys() <= set(self.lane.suspects)

    @invariant()
    def whoever_is_there_at_deaths_is_soon_alone(self) -> None:
        for sizes in self.company.values():
            assert len(sizes) <= allowed_deaths(sizes[0])
            assert sizes.count(1) < POISON_DEATHS

    def teardown(self) -> None:
        """Without further accidents all come to their end."""
        guilty = {key for key, sizes in getattr(self, "company", {}).items() if 1 in sizes}
        while getattr(self, "waiting", None) or getattr(self, "running", None):
            for key in self.admitted():
                engine = min(range(len(self.engines)), key=lambda number: len(self.engines[number]))
                if len(self.engines[engine]) < self.places:
                    self.start(key, engine)
            assert self.running
            if self.poison.intersection(self.running):
                known = {*self.running, *self.waiting}
                before = set(self.poison)
                self.poison_kills()
                gone = known - {*self.running, *self.waiting}
                assert gone <= before | guilty
            else:
                for engine in self.engines:
                    if engine:
                        self.lane.ended(key := engine.pop(0))
                        self.company.pop(key, None)
            self.whoever_is_there_at_deaths_is_soon_alone()


IsolationMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestIsolation = IsolationMachine.TestCase
