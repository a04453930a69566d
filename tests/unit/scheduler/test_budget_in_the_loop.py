"""The batch budget around a small model of an engine, in virtual time: does it settle where it should?"""

import heapq
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from vllm_bootstrap.scheduler.budget import Budget, BudgetPolicy
from vllm_bootstrap.scheduler.capacity import MAX_TAKEN_BACK

ALONE_S, STEP_S, ANSWER_S, BATCH_S = 0.012, 0.0005, 0.3, 0.8
# So soon a batch answer begins, and stays from then on.
BEGINS_S = 0.1
PROMPT_TOKENS, TOKEN_S = 150, 0.00003


@dataclass
class Engine:
    """A first byte comes later by what each running batch sequence adds, and by the rest of a batch prompt's time.
    Batch always has more; ``per_sequence_s`` may be changed on the way. Between the ``slow`` times something
    else keeps it busy. ``stalls``: so often, and for so long, nothing begins."""

    budget: Budget
    chance: random.Random
    per_sequence_s: float = STEP_S
    batch_s: float = BATCH_S
    begins_s: float = BEGINS_S
    prompt_s: float = PROMPT_TOKENS * TOKEN_S
    slow: tuple[float, float] = (0.0, 0.0)
    stalls: tuple[float, float] = (math.inf, 0.0)
    running: dict[int, float] = field(default_factory=dict)
    seen: list[tuple[float, float, int]] = field(default_factory=list)
    taken_back: int = 0
    again: list[int] = field(default_factory=list)
    times_back: dict[int, int] = field(default_factory=dict)
    done_s: float = 0.0
    lost_s: float = 0.0
    grants: int = 0
    events: list[tuple[float, str, float]] = field(default_factory=list)

    def run(self, arrivals: Iterator[float], until: float, now: float = 0.0) -> None:
        events = self.events
        for at in itertools.takewhile(lambda one: one < until, arrivals):
            heapq.heappush(events, (at, "arrives", 0.0))
        tick = now
        self.budget.batch_waits(True, now)
        while now < until:
            at, what, value = heapq.heappop(events) if events and events[0][0] <= tick else (tick, "tick", 0.0)
            now = at
            self.end_batch(now)
            if what == "arrives":
                self.budget.realtime_arrived(now)
                self.budget.realtime_granted(1, 20, now)
                ttft = self.first_byte(now)
                heapq.heappush(events, (now + ttft, "began", ttft))
                heapq.heappush(events, (now + ttft + ANSWER_S, "ended", 0.0))
                self.seen.append((now, ttft, len(self.running)))
            elif what == "began":
                self.budget.realtime_began(value, now)
            elif what == "ended":
                self.budget.realtime_ended(1, now)
            else:
                tick += 0.005
            self.fill(now)

    def first_byte(self, now: float) -> float:
        self.take_back(now)
        prompts_s = sum(max(0.0, since + self.prompt_s - now) for since in self.running.values())
        alone = 3 * ALONE_S if self.slow[0] <= now < self.slow[1] else ALONE_S
        work = alone + self.per_sequence_s * len(self.running)
        every_s, for_s = self.stalls
        stalled_s = max(0.0, for_s - now % every_s)
        return work * self.chance.uniform(0.85, 1.35) + prompts_s + stalled_s

    def take_back(self, now: float) -> None:
        unbegun = [
            request
            for request, since in self.running.items()
            if now - since < self.begins_s and self.times_back[request] < MAX_TAKEN_BACK
        ]
        for request in sorted(unbegun, reverse=True)[: self.budget.take_back(now)]:
            self.lost_s += now - self.running.pop(request)
            self.budget.batch_ended(request, 1, now, worked=False)
            self.taken_back += 1
            self.again.append(self.times_back.pop(request) + 1)

    def end_batch(self, now: float) -> None:
        for request, since in list(self.running.items()):
            if now - since >= self.batch_s * (1 + request % 7 / 7):
                self.done_s += now - self.running.pop(request)
                del self.times_back[request]
                self.budget.batch_ended(request, 1, now)

    def fill(self, now: float) -> None:
        self.take_back(now)
        while len(self.running) < self.budget.allowance(now) and self.budget.paced_until(now) is None:
            self.grants += 1
            self.running[self.grants] = now
            self.times_back[self.grants] = self.again.pop() if self.again else 0
            self.budget.batch_granted(self.grants, 1, PROMPT_TOKENS, now)

    def tail(self, start: float, end: float) -> float:
        late = sorted(ttft for at, ttft, _ in self.seen if start <= at < end)
        return late[int(len(late) * 0.99)]

    def mean_batch(self, start: float, end: float) -> float:
        counts = [count for at, _, count in self.seen if start <= at < end]
        return sum(counts) / len(counts)


def poisson(rate: float, chance: random.Random, start: float = 0.0) -> Iterator[float]:
    at = start
    while at < 1000:
        at += chance.expovariate(rate)
        yield at


def made(seed: int, slots: int = 128) -> Engine:
    return Engine(Budget(BudgetPolicy(), slots), random.Random(seed))


@pytest.mark.parametrize("rate", [3.0, 15.0, 40.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_settles_where_realtime_is_hardly_later_and_batch_still_runs(rate, seed):
    engine = made(seed)
    engine.run(poisson(rate, engine.chance), until=180)
    assert engine.tail(60, 180) <= 1.6 * 1.345 * ALONE_S, "alone: 1.345; a hundredth of these few answers is luck"
    assert engine.mean_batch(60, 180) >= 1, "1.3 to 5.5: at three answers a second the baseline rests on a few dozen"


def test_a_slower_engine_gets_less_and_a_faster_one_more():
    counts = {}
    for per_sequence_s in (STEP_S / 4, STEP_S * 4):
        engine = made(5)
        engine.per_sequence_s = per_sequence_s
        engine.run(poisson(20, engine.chance), until=120)
        counts[per_sequence_s] = engine.mean_batch(60, 120)
    slow, fast = counts[STEP_S * 4], counts[STEP_S / 4]
    assert fast > 2 * slow
    assert slow > 0


def test_after_realtime_has_gone_batch_fills_the_engine_within_seconds():
    engine = made(7)
    engine.run((at for at in poisson(15, engine.chance) if at < 60), until=60)
    assert len(engine.running) < 40
    engine.run(iter(()), until=75, now=60)
    assert len(engine.running) == 115


def test_what_made_the_engine_slow_when_realtime_was_first_heard_does_not_count_for_long():
    engine = made(11)
    engine.slow = (0.0, 4.0)
    engine.run(poisson(15, engine.chance), until=120)
    assert engine.budget.report(120).ttft_baseline_s < 1.2 * ALONE_S
    assert engine.tail(40, 120) <= 1.6 * 1.345 * ALONE_S
    assert engine.mean_batch(40, 120) >= 2


@pytest.mark.parametrize("seed", range(5))
def test_a_flood_that_comes_with_more_realtime_does_not_pass_for_what_realtime_is_like_alone(seed):
    engine = made(seed)
    engine.run((at for at in poisson(5, engine.chance) if at < 60), until=60)
    engine.slow = (60.0, 66.0)
    for until in range(61, 121):
        engine.run((at for at in poisson(25, engine.chance, start=until - 1) if at < until), until, until - 1)
        assert engine.budget.report(until).ttft_baseline_s < 1.2 * ALONE_S
    assert engine.tail(66, 120) <= 1.6 * 1.345 * ALONE_S
    assert engine.mean_batch(80, 120) >= 1.5


@pytest.mark.parametrize(("begins_s", "at_most"), [(10.0, 2), (BEGINS_S, 15 * 2 * BATCH_S)])
def test_when_realtime_comes_back_only_its_first_moments_feel_a_full_engine(begins_s, at_most):
    engine = made(9)
    engine.begins_s = begins_s
    engine.run((at for at in poisson(15, engine.chance) if at < 40), until=70)
    assert len(engine.running) == 115
    engine.run(poisson(15, engine.chance, start=70), until=100, now=70)
    assert engine.taken_back > (80 if begins_s > 1 else 0)
    late = [at for at, ttft, _ in engine.seen if at >= 70 and ttft > 3 * ALONE_S]
    assert len(late) <= at_most
    assert all(at < 70 + 2 * BATCH_S for at in late)


# -- batch answers that take long: what has begun is not taken back ---------------------------------------------------

QUICK_STEP_S = STEP_S / 10


@pytest.mark.parametrize("batch_s", [6.0, 30.0, 200.0])
@pytest.mark.parametrize("rate", [2.0, 15.0])
def test_batch_with_long_answers_learns_what_it_may_use(batch_s, rate):
    engine = made(4)
    engine.per_sequence_s, engine.batch_s = QUICK_STEP_S, batch_s
    engine.run(iter(()), until=10)
    engine.run(poisson(rate, engine.chance, start=10), until=1000, now=10)
    assert engine.budget.report(1000).ttft_baseline_s == pytest.approx(1.1 * ALONE_S, rel=0.15)
    assert engine.tail(500, 1000) <= 1.5 * 1.345 * ALONE_S
    assert engine.mean_batch(500, 1000) >= 6, "the cap begins with three"


@pytest.mark.parametrize("begins_s", [BEGINS_S, 1000.0])
@pytest.mark.parametrize("batch_s", [6.0, 30.0])
def test_a_pace_that_keeps_changing_costs_long_answers_little(batch_s, begins_s):
    engine = made(6)
    engine.per_sequence_s, engine.batch_s, engine.begins_s = QUICK_STEP_S, batch_s, begins_s
    engine.run(poisson(10, engine.chance), until=60)
    for now in range(60, 960, 50):
        rate = 25 if now // 50 % 2 else 5
        engine.run((at for at in poisson(rate, engine.chance, start=now) if at < now + 50), until=now + 50, now=now)
    assert engine.tail(60, 960) <= 1.6 * 1.345 * ALONE_S
    assert engine.lost_s < 0.4 * engine.done_s
    assert engine.mean_batch(60, 960) > 4


@pytest.mark.parametrize("seed", range(4))
def test_a_pause_of_realtime_by_chance_does_not_fill_the_engine_with_long_answers(seed):
    engine = made(seed)
    engine.batch_s = 10.0
    engine.run(poisson(2, engine.chance), until=600)
    assert engine.tail(60, 600) <= 1.6 * 1.345 * ALONE_S
    assert engine.mean_batch(60, 600) >= 1


@pytest.mark.parametrize(("batch_s", "pauses"), [(BATCH_S, 5.7), (6.0, 7.5), (60.0, 6.7)])
def test_realtime_that_has_gone_is_missed_longer_where_batch_answers_are_long(batch_s, pauses):
    gap_s = 1.5
    engine = made(3)
    engine.batch_s = batch_s
    engine.run((gap_s * number for number in range(1000)), until=1500)
    now = 1500.0
    while len(engine.running) < 20:
        engine.run(iter(()), until=now + 0.25, now=now)
        now += 0.25
        assert now < 1530
    assert now - 1500 == pytest.approx(pauses * gap_s, abs=2)


# -- batch prompts that take longer than realtime bears ---------------------------------------------------------------


@pytest.mark.parametrize(("prompt_s", "at_least"), [(0.004, 3), (0.02, 0.5), (0.1, 0.05)])
@pytest.mark.parametrize("rate", [10.0, 40.0])
def test_long_batch_prompts_are_let_in_as_seldom_as_realtime_bears(prompt_s, at_least, rate):
    engine = made(6)
    engine.prompt_s, engine.per_sequence_s = prompt_s, STEP_S / 2
    engine.run(poisson(rate, engine.chance), until=600)
    late = [ttft > 1.5 * 1.345 * ALONE_S for at, ttft, _ in engine.seen if at > 60]
    assert sum(late) < 0.01 * len(late)
    assert engine.mean_batch(60, 600) >= at_least


def test_when_batch_prompts_are_short_again_batch_is_back_within_minutes():
    engine = made(6)
    engine.prompt_s = 0.1
    engine.run(poisson(20, engine.chance), until=120)
    assert engine.mean_batch(60, 120) < 1
    engine.prompt_s = 0.002
    engine.run(poisson(20, engine.chance, start=120), until=400, now=120)
    assert engine.mean_batch(300, 400) >= 1.5


# -- what is heard alone is wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_baseline_of_a_slow_half_minute_does_not_outlive_it(seed):
    engine = made(seed)
    engine.slow = (100.0, 130.0)
    engine.run(poisson(10, engine.chance), until=400)
    assert engine.budget.report(400).ttft_baseline_s < 1.1 * ALONE_S / 0.85
    assert engine.tail(160, 400) <= 1.6 * 1.345 * ALONE_S
    assert engine.mean_batch(160, 400) >= 1.5


@pytest.mark.parametrize("prompt_s", [PROMPT_TOKENS * TOKEN_S, 0.05])
@pytest.mark.parametrize("stalls", [(10.0, 0.3), (3.0, 0.06)], ids=str)
def test_an_engine_that_stands_still_now_and_then_makes_batch_neither_starve_nor_run_wild(prompt_s, stalls):
    counts, tails, quiet = {}, {}, (math.inf, 0.0)
    for some in (quiet, stalls):
        engines = [made(seed) for seed in range(1, 5)]
        for engine in engines:
            engine.prompt_s, engine.stalls = prompt_s, some
            engine.run(poisson(40, engine.chance), until=240)
        counts[some] = sum(engine.mean_batch(60, 240) for engine in engines) / len(engines)
        late = [ttft > 1.5 * 1.345 * ALONE_S for engine in engines for at, ttft, _ in engine.seen if at >= 60]
        tails[some] = sum(late) / len(late)
    assert counts[stalls] >= 0.3 * counts[quiet], "0.45 to 1.2"
    assert tails[stalls] <= stalls[1] / stalls[0] + tails[quiet] + 0.01, "1.0 to 1.4 hundredths below that"
