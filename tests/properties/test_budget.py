"""The batch budget under any sequence of events: bounds, the floor, recovery, and no look into the past."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_bootstrap.scheduler.budget import LONGEST_HOLD_S, Budget, BudgetPolicy
from vllm_bootstrap.scheduler.budget_floor import WINDOW_S
from vllm_bootstrap.scheduler.ports import EngineSignals

FLOOR = 0.05
maybe = st.none() | st.integers(0, 10**6)
looks = st.builds(
    EngineSignals,
    running=maybe,
    waiting=st.none() | st.integers(0, 300),
    kv_usage=st.none() | st.floats(0, 1),
    preemptions=maybe,
    prompt_tokens=maybe,
    inter_token_seconds_sum=st.none() | st.floats(0, 1e6),
    inter_token_count=maybe,
    prefill_seconds_sum=st.none() | st.floats(0, 1e6),
)


class Budgeting(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(BudgetPolicy(floor_share=FLOOR), 64)
        self.now = 1000.0
        self.slots = 64
        self.realtime = 0
        self.batch: dict[int, int] = {}
        self.requests = 0
        self.waits_since: float | None = None
        self.starved_s = 0.0

    @rule(seconds=st.floats(0, 30))
    def pass_time(self, seconds: float) -> None:
        """As admission does it: looked at whenever something changes by itself, and the floor is used when due."""
        end = self.now + seconds
        while (change := self.budget.next_change(self.now)) is not None and change <= end:
            assert change > self.now
            self._starve(change)
            self.use_the_floor()
        self._starve(end)

    def _starve(self, now: float) -> None:
        self.starved_s = 0.0 if self.batch or self.waits_since is None else self.starved_s + now - self.now
        self.now = now

    def use_the_floor(self) -> None:
        if self.budget.overdue(self.now):
            self.budget.promoted(self.now)
            self.grant_batch(1, 10)

    @rule(slots=st.integers(1, 300))
    def resize(self, slots: int) -> None:
        self.slots = slots
        self.budget.resize(slots)

    @rule(sequences=st.integers(1, 20))
    def realtime_comes(self, sequences: int) -> None:
        self.budget.realtime_arrived(self.now)
        self.budget.realtime_granted(sequences, 10, self.now)
        self.realtime += sequences

    @rule(ttft_s=st.floats(0.0001, 10))
    def realtime_begins(self, ttft_s: float) -> None:
        self.budget.realtime_began(ttft_s, self.now)

    @precondition(lambda self: self.realtime)
    @rule(data=st.data())
    def realtime_ends(self, data: st.DataObject) -> None:
        sequences = data.draw(st.integers(1, self.realtime))
        self.realtime -= sequences
        self.budget.realtime_ended(sequences, self.now)

    @rule(sequences=st.integers(1, 8), prompt_tokens=st.integers(0, 10**6))
    def grant_batch(self, sequences: int, prompt_tokens: int) -> None:
        self.requests += 1
        self.batch[self.requests] = sequences
        self.budget.batch_granted(self.requests, sequences, prompt_tokens, self.now)
        self.starved_s = 0.0

    @precondition(lambda self: self.batch)
    @rule(data=st.data(), begins=st.booleans())
    def batch_goes_on(self, data: st.DataObject, begins: bool) -> None:
        request = data.draw(st.sampled_from(sorted(self.batch)))
        if begins:
            self.budget.batch_began(request, self.now)
        else:
            self.budget.batch_ended(request, self.batch.pop(request), self.now)

    @rule(waiting=st.booleans())
    def batch_waits(self, waiting: bool) -> None:
        self.budget.batch_waits(waiting, self.now)
        if not waiting:
            self.waits_since, self.starved_s = None, 0.0
        elif self.waits_since is None:
            self.waits_since = self.now

    @rule(look=looks)
    def engine_says(self, look: EngineSignals) -> None:
        self.budget.signals(look, self.now)

    @invariant()
    def the_allowance_is_within_its_bounds(self) -> None:
        report = self.budget.report(self.now)
        assert 0 <= report.reserve < self.slots
        assert 0 <= report.allowance <= self.slots - report.reserve
        assert report.batch_sequences == sum(self.batch.values())
        assert report.realtime_sequences == self.realtime
        assert 0 <= self.budget.take_back(self.now) <= report.batch_sequences
        assert report.reason.endswith(".")

    @invariant()
    def nothing_is_due_in_the_past(self) -> None:
        for due in (self.budget.next_change(self.now), self.budget.paced_until(self.now)):
            assert due is None or due > self.now

    @invariant()
    def batch_that_waits_is_never_starved_for_longer_than_a_minute(self) -> None:
        assert self.starved_s <= WINDOW_S + 1e-6

    def teardown(self) -> None:
        """Whatever happened: when realtime has gone and the engine is at ease, batch gets all but the reserve."""
        self.budget.realtime_ended(self.realtime, self.now)
        now = self.now + LONGEST_HOLD_S + 10
        for look in range(40):
            self.budget.signals(EngineSignals(kv_usage=0.1), now + look)
        report = self.budget.report(now + 40)
        assert report.allowance == report.slots - report.reserve
        assert self.budget.paced_until(now) is None


TestBudgeting = Budgeting.TestCase
TestBudgeting.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
