"""The simulated engine under any order of submits, aborts, pauses and time: blocks, slots, budget, one end each."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.batching import BLOCK, Engine
from vllm_bootstrap.engines.simulator.sequence import DECODE, ENDED, LEAVING, PREFILL, WAITING

SLOTS, BLOCKS = 3, 12
LONGEST = BLOCK * BLOCKS


class Machine(RuleBasedStateMachine):
    @initialize(
        budget=st.sampled_from([2, 10, 10]), caching=st.booleans(), fcfs=st.booleans(), api=st.sampled_from([0.0, 0.3])
    )
    def start(self, budget, caching, fcfs, api):
        self.budget = budget
        self.engine = Engine(
            slots=SLOTS, budget=budget, blocks=BLOCKS, caching=caching, fcfs=fcfs, api_request_s=api, api_token_s=api,
            latency_s=api, step_prefill_token_s=0.1,
        )  # fmt: skip
        self.all, self.aborted = [], set()

    @rule(
        prompt=st.integers(0, 30), total=st.integers(0, 16), priority=st.integers(-1, 1), known=st.sampled_from("ab-")
    )
    def submit(self, prompt, total, priority, known):
        if self.engine.batch.dead is None:
            words = [known] * prompt if known != "-" and prompt else None
            self.all.append(self.engine.submit(prompt, total, priority, words))

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def abort(self, data):
        sequence = data.draw(st.sampled_from(self.all))
        if sequence.state != ENDED:
            self.aborted.add(sequence)
        self.engine.batch.abort(sequence)

    @rule(seconds=st.sampled_from([0.0, 0.2, 1.0, 3.3, 20.0]))
    def advance(self, seconds):
        self.engine.run(seconds)

    @rule()
    def freeze(self):
        self.engine.batch.freeze("x")

    @rule()
    def thaw(self):
        self.engine.batch.thaw("x")

    @precondition(lambda self: len(self.all) > 10)
    @rule()
    def die(self):
        if self.engine.batch.dead is None:
            self.engine.batch.fail("dead")

    @invariant()
    def slots_are_kept(self):
        states = [s.state for s in self.all]
        assert states.count(PREFILL) + states.count(DECODE) == self.engine.batch.running <= SLOTS
        assert states.count(WAITING) == self.engine.batch.waiting
        assert self.engine.batch.busy == any(state != ENDED for state in states)

    @invariant()
    def blocks_are_neither_negative_nor_leaked(self):
        engine = self.engine
        held = [s for s in self.all if s.room]
        assert all(s.state in (PREFILL, DECODE) for s in held)
        shared = {key for s in held for key in s.held}
        own = sum(s.room // BLOCK - len(s.held) for s in held)
        assert engine.used() == own + len(shared)
        assert 0 <= engine.used() <= BLOCKS
        assert 0 <= engine.batch.cache_usage <= 1
        assert all(s.computed <= s.room for s in held)

    @invariant()
    def no_step_is_larger_than_the_budget(self):
        chunks = self.engine.batch._chunks.values()
        assert sum(chunks) <= self.budget
        assert all(chunks), "one that runs got no token"

    @invariant()
    def everybody_is_told_the_truth_once(self):
        for sequence in self.all:
            told = [what for _, what, of in self.engine.notes if of is sequence]
            ends = [what for what in told if what != "token"]
            assert len(ends) <= 1
            assert told.count("token") == sequence.produced <= sequence.generated <= sequence.total
            assert (sequence.state == ENDED) == (bool(ends) or sequence in self.aborted)
            assert "end" not in ends or sequence.produced == sequence.total
        metrics = self.engine.metrics
        assert metrics.generation_tokens == sum(s.produced for s in self.all)
        assert sum(metrics.finished.values()) == sum(s.state == ENDED for s in self.all)
        assert metrics.finished["abort"] == len(self.aborted)
        assert all(s.state != LEAVING or s.generated == s.total for s in self.all)

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.batch.thaw("x")
            self.engine.run(100_000)
            assert all(s.state == ENDED for s in self.all)
            assert self.engine.used() == 0
            assert self.engine.time.pending == 0


Machine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
