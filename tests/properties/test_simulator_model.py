"""The simulator's batch under any order of submits, aborts, pauses and time."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.support.fake_time import FakeTime
from vllm_bootstrap.engines.simulator.metrics import Metrics
from vllm_bootstrap.engines.simulator.model import Model
from vllm_bootstrap.engines.simulator.sequence import DECODE, ENDED, PREFILL, WAITING, Sequence

SLOTS = 3


class Batch(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.time, self.metrics = FakeTime(), Metrics()
        self.model = Model(
            slots=SLOTS, tokens_per_second=10, prefill_tokens_per_second=100, capacity_tokens=100,
            metrics=self.metrics, clock=self.time.now, call_later=self.time.call_later,
        )  # fmt: skip
        self.all: list[Sequence] = []
        self.told: dict[Sequence, str] = {}
        self.frozen = False
        self.started: list[Sequence] = []

    def on_token(self, sequence):
        assert sequence not in self.told
        assert not self.frozen

    def on_end(self, sequence):
        assert sequence not in self.told
        assert sequence.produced == sequence.total
        self.told[sequence] = "ended"

    def on_failure(self, sequence, message):
        assert sequence not in self.told
        self.told[sequence] = message

    @rule(total=st.integers(0, 6), prompt=st.integers(0, 40), priority=st.integers(-2, 2))
    def submit(self, total, prompt, priority):
        if self.model.dead is None:
            sequence = Sequence(self, prompt_tokens=prompt, total=total, priority=priority)
            self.all.append(sequence)
            self.model.submit(sequence)

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def abort(self, data):
        sequence = data.draw(st.sampled_from(self.all))
        if sequence not in self.told:
            self.told[sequence] = "aborted"
        self.model.abort(sequence)

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.1, 0.35, 2.0]))
    def advance(self, seconds):
        self.time.advance(seconds)

    @rule()
    def freeze(self):
        self.model.freeze("x")
        self.frozen = True

    @rule()
    def thaw(self):
        self.frozen = False
        self.model.thaw("x")

    @precondition(lambda self: len(self.all) > 8)
    @rule()
    def die(self):
        if self.model.dead is None:
            self.model.fail("dead")

    @invariant()
    def slots_are_kept_and_used(self):
        states = [s.state for s in self.all]
        running = states.count(PREFILL) + states.count(DECODE)
        assert running == self.model.running <= SLOTS
        assert states.count(WAITING) == self.model.waiting
        assert running == SLOTS or not self.model.waiting

    @invariant()
    def nobody_waits_behind_a_higher_number(self):
        waiting = [s for s in self.all if s.state == WAITING]
        for earlier in waiting:
            same = [s for s in self.all if s.priority > earlier.priority and s.admitted_at > earlier.arrived_at]
            assert not same

    @invariant()
    def counters_are_the_sum(self):
        assert self.metrics.generation_tokens == sum(s.produced for s in self.all)
        assert sum(self.metrics.finished.values()) == sum(s.state == ENDED for s in self.all)
        assert all(s in self.told for s in self.all if s.state == ENDED)

    def teardown(self):
        self.thaw()
        self.time.advance(1000)
        assert all(s in self.told for s in self.all)
        assert self.time.pending == 0


Batch.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBatch = Batch.TestCase
