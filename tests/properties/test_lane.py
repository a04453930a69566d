"""A lane through everything that happens to it: no job is lost, none is told twice, counters come back to zero."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.hasty import HastyLoop
from tests.support.lanes import COMPLETIONS, Desk, Jobs, Sent, answered, failed, join_in, make_lane, turn
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.batches.verdicts import Verdict
from vllm_bootstrap.batches.work import Outcome
from vllm_bootstrap.errors import (
    Cancelled,
    ConcurrencyLimit,
    Forbidden,
    ModelNotFound,
    QueueFull,
    StorageFull,
    TooManyRequests,
    Unavailable,
    UpstreamError,
)

BATCH = frozenset({"batch"})
KEYS = {"a": Principal("a", BATCH), "b": Principal("b", BATCH, max_parallel=2, max_sequences=3)}
BEFORE_SENDING = [
    failed(ModelNotFound("not there")),
    failed(QueueFull("full", retry_after=30)),
    failed(TooManyRequests("too many", retry_after=60)),
    failed(ConcurrencyLimit("too many at once", retry_after=1)),
    failed(Forbidden("not allowed")),
    failed(Unavailable("not now", retry_after=2)),
    failed(StorageFull("no room")),
    failed(UpstreamError("not reached")),
    failed(Cancelled("cancelled")),
]
FROM_ENGINE = [
    answered(400),
    answered(404),
    answered(429),
    answered(500),
    answered(501),
    failed(UpstreamError("cut"), sent=True),
    failed(Cancelled("cancelled"), sent=True),
]
LONG_S = 200.0


def good(sent: Sent) -> Outcome:
    """What an engine answers to that request."""
    count = len(sent.numbers)
    choices = [{"index": at, "text": str(number)} for at, number in enumerate(sent.numbers)]
    body: dict[str, Any] = {"id": "c", "choices": choices, "usage": {"prompt_tokens": count, "completion_tokens": 0}}
    return answered(200, json.dumps(body).encode())


class LaneMachine(RuleBasedStateMachine):
    """``sources``: those that are there. ``totals``: jobs that each began with."""

    @initialize(slots=st.integers(1, 6), joined=st.sampled_from((1, 3)), attempts=st.integers(1, 3))
    def begin(self, slots: int, joined: int, attempts: int) -> None:
        self.loop = HastyLoop()
        self.desk = Desk(dict(KEYS))
        self.sources: dict[str, Jobs] = {}
        self.totals: dict[str, int] = {}
        self.made = 0
        self.slots = slots
        self.paused: set[str] = set()

        async def make() -> None:
            self.lane = make_lane(self.desk, slots=slots, attempts=attempts, max_joined=joined)

        self.loop.run_until_complete(make())

    def soon(self, *what: Any) -> None:
        async def work() -> None:
            for one in what:
                one()
            await turn()

        self.loop.run_until_complete(work())

    def some(self, at: int, *, placed: bool | None = None) -> Sent | None:
        found = [one for one in self.desk.under_way if placed is None or (one.flight.launch is not None) is placed]
        return found[at % len(found)] if found else None

    # What happens

    @rule(owner=st.sampled_from("ab"), count=st.integers(1, 12), deaths=st.sets(st.integers(0, 11), max_size=2))
    def comes(self, owner: str, count: int, deaths: set[int]) -> None:
        self.made += 1
        source = Jobs(f"s{self.made}", count, owner=owner, path=COMPLETIONS)
        for at in deaths:
            if at < count:
                source.here[at].deaths = 1
        self.sources[source.id], self.totals[source.id] = source, count
        self.soon(lambda: join_in(self.lane, source))

    @rule(at=st.integers(0, 50), launch=st.sampled_from(("l1", "l2")))
    def gets_a_place(self, at: int, launch: str) -> None:
        if (sent := self.some(at, placed=False)) is not None:
            self.soon(lambda: sent.place(launch))

    @rule(at=st.integers(0, 50))
    def loses_its_place(self, at: int) -> None:
        if (sent := self.some(at, placed=True)) is not None:
            self.soon(sent.flight.unplaced)

    @rule(at=st.integers(0, 50))
    def is_answered(self, at: int) -> None:
        if (sent := self.some(at, placed=True)) is not None:
            self.soon(lambda: sent.end(good(sent)))

    @rule(at=st.integers(0, 50), outcome=st.sampled_from(FROM_ENGINE))
    def fares_ill(self, at: int, outcome: Outcome) -> None:
        if (sent := self.some(at, placed=True)) is not None:
            self.soon(lambda: sent.end(outcome))

    @rule(at=st.integers(0, 50), outcome=st.sampled_from(BEFORE_SENDING))
    def is_refused(self, at: int, outcome: Outcome) -> None:
        if (sent := self.some(at, placed=False)) is not None:
            self.soon(lambda: sent.end(outcome))

    @rule(
        launch=st.sampled_from(("l1", "l2")),
        news_first=st.booleans(),
        says=st.booleans(),
        verdict=st.sampled_from((Verdict.DIED, Verdict.STOPPED)),
    )
    def engine_dies(self, launch: str, news_first: bool, says: bool, verdict: Verdict) -> None:
        broken = [sent for sent in self.desk.under_way if sent.flight.launch == launch]
        outcome = answered(500) if says else failed(UpstreamError("cut"), sent=True)
        news = [lambda: self.lane.engine_ended(launch, verdict)]
        ends = [lambda sent=sent: sent.end(outcome) for sent in broken]
        self.soon(*(news + ends if news_first else ends + news))

    @rule(at=st.integers(0, 50))
    def pauses(self, at: int) -> None:
        if self.sources:
            name = sorted(self.sources)[at % len(self.sources)]
            self.paused.add(name)
            self.soon(lambda: self.lane.pause(name))

    @rule()
    def all_resume(self) -> None:
        names, self.paused = self.paused, set()
        self.soon(*(lambda name=name: self.lane.resume(name) for name in names))

    @rule(at=st.integers(0, 50))
    def withdraws(self, at: int) -> None:
        if self.sources:
            name = sorted(self.sources)[at % len(self.sources)]
            del self.sources[name]
            self.paused.discard(name)
            self.soon(lambda: self.lane.withdraw(name))

    @rule(at=st.integers(0, 50), which=st.integers(0, 50))
    def drops(self, at: int, which: int) -> None:
        if self.sources:
            source = self.sources[sorted(self.sources)[at % len(self.sources)]]
            out = sorted(source.out, key=lambda job: job.number)
            if out:
                job = out[which % len(out)]
                source.out.remove(job)
                source.dropped.add(job.number)
                self.soon(lambda: self.lane.drop(job.key))

    @rule(owner=st.sampled_from("ab"))
    def key_goes(self, owner: str) -> None:
        self.desk.keys.pop(owner, None)

    @rule(slots=st.integers(0, 6))
    def engines_change(self, slots: int) -> None:
        self.slots = slots
        self.soon(lambda: self.lane.engines(slots, "nothing serves it"))

    @rule(priority=st.integers(-3, 3), at=st.integers(0, 50))
    def priority_changes(self, priority: int, at: int) -> None:
        if self.sources:
            name = sorted(self.sources)[at % len(self.sources)]
            self.soon(lambda: self.lane.change(name, priority))

    @rule(seconds=st.sampled_from((0.3, 1.5, 4.0, LONG_S)))
    def time_passes(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))
        self.soon()

    @precondition(lambda self: self.sources)
    @rule()
    def nothing_stands_still_that_might_run(self) -> None:
        self.desk.keys.update(KEYS)
        self.soon(self.lane.keys_changed)
        self.loop.run_until_complete(asyncio.sleep(LONG_S))
        self.soon()
        waiting = [one for one in self.sources.values() if one.left and one.id not in self.paused]
        if self.slots and waiting:
            assert self.desk.under_way

    # What always holds

    @invariant()
    def nothing_is_lost_and_counts_are_right(self) -> None:
        for name, source in getattr(self, "sources", {}).items():
            known = len(source.here) + len(source.out) + len(source.endings) + len(source.dropped)
            assert known == self.totals[name]
            self.lane.waits_for(name)
        if not hasattr(self, "lane"):
            return
        lane = self.lane
        flights = list(lane._flights)
        assert flights == [sent.flight for sent in self.desk.under_way]
        assert lane._under_way == sum(flight.cost for flight in flights)
        assert lane._waiting == sum(flight.launch is None for flight in flights)
        assert lane._under_way == 0 or len(flights) <= 6 + 16

    def teardown(self) -> None:
        if not hasattr(self, "lane"):
            return
        self.all_resume()
        self.desk.keys.update(KEYS)
        self.soon(lambda: self.lane.engines(4, ""), self.lane.keys_changed)
        for _ in range(60):
            while self.desk.under_way:
                sent = self.desk.under_way[0]
                if sent.flight.launch is None:
                    self.soon(lambda sent=sent: sent.place("l3"))
                self.soon(lambda sent=sent: sent.end(good(sent)))
            if not any(source.left for source in self.sources.values()):
                break
            self.time_passes(LONG_S)
        for name, source in self.sources.items():
            assert not source.left, (name, self.lane.waits_for(name))
            assert len(source.endings) + len(source.dropped) == self.totals[name]
        lane = self.lane
        assert lane._isolation.in_flight == lane._under_way == lane._waiting == 0
        assert not any((lane._suspects, lane._later, lane._isolation.suspects))
        self.soon(lane.close)
        assert lane.empty
        self.loop.close()


LaneMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLane = LaneMachine.TestCase
