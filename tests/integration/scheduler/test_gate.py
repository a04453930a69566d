from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

from tests.support.aio import eventually, run
from tests.support.budgets import HandBudget
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import (
    ApiError,
    ConcurrencyLimit,
    Draining,
    LaunchNotReady,
    ModelFailed,
    ModelLoading,
    QueueFull,
    Unavailable,
)
from vllm_bootstrap.scheduler import gate as gate_module
from vllm_bootstrap.scheduler.gate import ByLaunch, ByModel, Gate, Lease, Pending, Ticket
from vllm_bootstrap.scheduler.ports import EngineSignals, NoProspects
from vllm_bootstrap.scheduler.tickets import Grant, Usage
from vllm_bootstrap.serving import Advert, Endpoint, Instance

ME = Ticket("me")
BULK = Ticket("bulk", "batch", replayable=True)
MODEL = ByModel("m")


def advert(slots: int = 1, *, launch_id: str = "a", state: str = "ready") -> Advert:
    instance = Instance(launch_id, launch_id, "raw", "base", ("m",), Endpoint(uds="/x"), slots, ())
    return Advert(launch_id, launch_id, "base", ("m",), state, instance if state == "ready" else None)


def in_use(gate: Gate) -> int:
    return sum(sum(gate.load(one.launch_id).in_flight.values()) for one in gate.adverts())


def waiting(gate: Gate) -> int:
    return sum(sum(report.queued.values()) for report in gate.queues().values())


def at_rest(gate: Gate) -> bool:
    return in_use(gate) == 0 and waiting(gate) == 0 and not gate._pending


def test_a_free_slot_is_a_lease_at_once() -> None:
    async def main() -> None:
        gate = Gate()
        gate.update(advert())
        lease = await gate.acquire(MODEL, ME)
        assert lease.instance.launch_id == "a"
        assert lease.queue_ms == 0
        lease.release()
        lease.release()
        assert at_rest(gate)

    run(main())


def test_waiting_requests_get_the_slot_in_turn() -> None:
    async def main() -> None:
        gate = Gate()
        gate.update(advert())
        first = await gate.acquire(MODEL, ME)
        tasks = [asyncio.create_task(gate.acquire(MODEL, ME)) for _ in range(3)]
        await eventually(lambda: waiting(gate) == 3)
        lease = first
        for task in tasks:
            assert not task.done()
            lease.release()
            lease = await task
            assert lease.queue_ms >= 0
        lease.release()
        assert at_rest(gate)

    run(main())


def test_refusals_are_raised_at_once() -> None:
    async def main() -> None:
        gate = Gate(max_queued=1, ended=lambda one: one == "old")
        with pytest.raises(LaunchNotReady):
            await gate.acquire(ByLaunch("old"), ME)
        gate.update(advert())
        lease = await gate.acquire(MODEL, ME)
        waiter = asyncio.create_task(gate.acquire(MODEL, ME))
        await eventually(lambda: waiting(gate) == 1)
        with pytest.raises(QueueFull):
            await gate.acquire(MODEL, ME)
        lease.release()
        (await waiter).release()
        assert at_rest(gate)

    run(main())


def test_a_deadline_ends_the_wait() -> None:
    async def main() -> None:
        gate = Gate(queue_timeout_s=0.02)
        gate.update(advert())
        lease = await gate.acquire(MODEL, ME)
        with pytest.raises(Unavailable):
            await gate.acquire(MODEL, ME)
        own = asyncio.get_running_loop().time() + 0.001
        with pytest.raises(Unavailable):
            await gate.acquire(MODEL, ME, own)
        lease.release()
        assert at_rest(gate)

    run(main())


def test_cancelling_a_waiter_leaves_the_queue_clean() -> None:
    async def main() -> None:
        gate = Gate()
        gate.update(advert())
        lease = await gate.acquire(MODEL, ME)
        waiter = asyncio.create_task(gate.acquire(MODEL, ME))
        await eventually(lambda: waiting(gate) == 1)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert waiting(gate) == 0
        lease.release()
        assert at_rest(gate)

    run(main())


@pytest.mark.parametrize("turns", range(4))
def test_a_grant_and_a_cancel_that_cross_lose_no_slot(turns: int) -> None:
    async def main() -> None:
        gate = Gate()
        gate.update(advert())
        lease = await gate.acquire(MODEL, ME)
        waiter = asyncio.create_task(gate.acquire(MODEL, ME))
        await eventually(lambda: waiting(gate) == 1)
        lease.release()  # the grant is under way
        for _ in range(turns):
            await asyncio.sleep(0)
        waiter.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await waiter).release()
        await eventually(lambda: at_rest(gate))

    run(main())


def test_a_pending_request_that_is_given_up_hands_back_what_comes() -> None:
    async def main() -> None:
        gate = Gate()
        gate.update(advert())
        lease = gate.request(MODEL, ME)
        pending = gate.request(MODEL, ME)
        assert isinstance(lease, Lease)
        assert isinstance(pending, Pending)
        told: list[Any] = []
        pending.notify = told.append
        lease.release()
        pending.cancel()
        pending.cancel()
        await eventually(lambda: at_rest(gate))
        assert told == []

    run(main())


def test_a_rejection_and_a_cancel_that_cross() -> None:
    async def main() -> None:
        gate = Gate()
        gate.update(advert())
        lease = await gate.acquire(MODEL, ME)
        waiter = asyncio.create_task(gate.acquire(MODEL, ME))
        await eventually(lambda: waiting(gate) == 1)
        gate.drain()
        waiter.cancel()
        with pytest.raises((asyncio.CancelledError, Draining)):
            await waiter
        lease.release()
        assert at_rest(gate)

    run(main())


def test_nobody_hangs_when_a_launch_dies() -> None:
    async def main() -> None:
        gate = Gate(max_queued=200)
        withdrawn: list[str] = []
        gate.on_withdrawn(withdrawn.append)
        gate.update(advert(100))
        leases = [await gate.acquire(MODEL, ME) for _ in range(100)]
        waiters = [asyncio.create_task(gate.acquire(MODEL, ME)) for _ in range(100)]
        await eventually(lambda: waiting(gate) == 100)
        gate.update(advert(state="failed"))
        outcomes = await asyncio.gather(*waiters, return_exceptions=True)
        assert all(isinstance(outcome, ApiError) for outcome in outcomes)
        for lease in leases:
            lease.release()
        assert at_rest(gate)
        assert withdrawn == ["a"]
        gate.update(advert(1))  # it was restarted
        (await gate.acquire(MODEL, ME)).release()
        gate.forget("a")
        assert withdrawn == ["a", "a"]

    run(main())


def test_limits_are_exact_when_five_hundred_come_at_once() -> None:
    key = Principal("key", frozenset({"realtime"}), max_parallel=7, requests_per_minute=20)

    async def one(gate: Gate) -> str:
        try:
            lease = await gate.acquire(MODEL, Ticket("key", principal=key))
        except ConcurrencyLimit:
            return "parallel"
        except ApiError:
            return "rate"
        assert gate._admission.limits.parallel("key") <= 7
        await asyncio.sleep(0)
        lease.release()
        return "ran"

    async def main() -> None:
        gate = Gate(max_queued=1000)
        gate.update(advert(3))
        outcomes = await asyncio.gather(*(one(gate) for _ in range(500)))
        assert outcomes.count("ran") == 7
        state = gate.rate(key)
        assert state is not None
        assert state.requests is not None
        assert state.requests.remaining == 13
        outcomes = [await one(gate) for _ in range(500)]
        assert outcomes.count("ran") == 13
        assert at_rest(gate)

    run(main())


def test_where_a_request_without_a_slot_goes() -> None:
    async def main() -> None:
        gate = Gate()
        gate.update(advert())
        lease = await gate.acquire(MODEL, ME)
        assert gate.instance(ByLaunch("a")).launch_id == "a"
        assert gate.instance(ByLaunch("a"), Principal("p", frozenset())).launch_id == "a"
        lease.release()

    run(main())


class Holder:
    """Keeps what a gate gives it, as the gateway does."""

    def __init__(self, gate: Gate, ticket: Ticket, deadline: float | None = None) -> None:
        self.lease: Lease | None = None
        self.pending: Pending | None = None
        self.error: ApiError | None = None
        self.revoked = 0
        self.take(gate.request(MODEL, ticket, deadline))

    def take(self, got: Lease | Pending) -> None:
        if isinstance(got, Pending):
            self.pending = got
            got.notify = self.on_outcome
        else:
            self.on_outcome(got)

    def on_outcome(self, outcome: Lease | ApiError) -> None:
        self.pending = None
        if isinstance(outcome, Lease):
            self.lease = outcome
            outcome.on_revoked = self.on_revoked
        else:
            self.error = outcome

    def on_revoked(self) -> None:
        self.revoked += 1
        assert self.lease is not None
        lease, self.lease = self.lease, None
        self.take(lease.again("revoked"))


class Event(NamedTuple):
    kind: str
    cls: str
    model: str
    launch_id: str | None = None
    code: str | None = None


class Notes:
    """Writes down what happens to requests."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events

    def admitted(self, ticket: Ticket, grant: Grant) -> None:
        self.events.append(Event("admitted", ticket.cls, grant.model, grant.instance.launch_id))

    def promoted(self, ticket: Ticket, grant: Grant) -> None:
        self.events.append(Event("promoted", ticket.cls, grant.model, grant.instance.launch_id))

    def rejected(self, ticket: Ticket, model: str, error: ApiError) -> None:
        self.events.append(Event("rejected", ticket.cls, model, code=error.code))

    def revoked(self, ticket: Ticket, model: str, launch_id: str) -> None:
        self.events.append(Event("revoked", ticket.cls, model, launch_id))


def by_hand(**options: Any) -> tuple[Gate, list[HandBudget], list[Event]]:
    budgets: list[HandBudget] = []
    events: list[Event] = []

    def make(slots: int) -> HandBudget:
        budgets.append(HandBudget(slots))
        return budgets[-1]

    return Gate(budget=make, watcher=Notes(events), **options), budgets, events


def kinds(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.kind, event.cls) for event in events]


def test_realtime_takes_a_place_back_and_the_batch_request_comes_again() -> None:
    async def main() -> None:
        gate, budgets, events = by_hand()
        gate.update(advert())
        batch = Holder(gate, BULK)
        realtime = Holder(gate, ME)
        assert batch.revoked == 0, "never from inside another request's call"
        await eventually(lambda: realtime.lease)
        assert batch.revoked == 1
        assert batch.pending is not None
        assert realtime.lease is not None
        realtime.lease.first_byte()
        realtime.lease.first_byte(streamed=False)
        realtime.lease.settle(Usage(1, 2))
        realtime.lease.release()
        await eventually(lambda: batch.lease)
        assert batch.lease is not None
        batch.lease.release()
        assert at_rest(gate)
        assert len(budgets[0].of("realtime_began")) == 1
        assert kinds(events) == [
            ("admitted", "batch"), ("revoked", "batch"), ("admitted", "realtime"), ("admitted", "batch"),
        ]  # fmt: skip
        assert events[1].model == "m"
        assert events[1].launch_id == "a"

    run(main())


@pytest.mark.parametrize("why", ["first byte", "no listener", "released"])
def test_a_revocation_that_its_holder_cannot_follow(why: str) -> None:
    async def main() -> None:
        gate, _, events = by_hand()
        gate.update(advert())
        batch = Holder(gate, BULK)
        realtime = Holder(gate, ME)
        lease = batch.lease
        assert lease is not None
        if why == "first byte":
            lease.first_byte()
        elif why == "no listener":
            lease.on_revoked = None
        else:
            lease.release()
        for _ in range(3):
            await asyncio.sleep(0)
        assert batch.revoked == 0
        assert ("revoked", "batch") not in kinds(events)
        lease.release()
        await eventually(lambda: realtime.lease)
        assert realtime.lease is not None
        realtime.lease.release()
        assert at_rest(gate)

    run(main())


def test_when_one_cannot_follow_another_is_asked() -> None:
    async def main() -> None:
        gate, _, events = by_hand()
        gate.update(advert(2))
        older, younger = Holder(gate, BULK), Holder(gate, BULK)
        realtime = Holder(gate, ME)
        assert younger.lease is not None
        younger.lease.on_revoked = None
        await eventually(lambda: realtime.lease)
        assert (older.revoked, younger.revoked) == (1, 0)
        assert kinds(events).count(("revoked", "batch")) == 1
        assert realtime.lease is not None
        realtime.lease.release()
        younger.lease.release()
        await eventually(lambda: older.lease)
        assert older.lease is not None
        older.lease.release()
        assert at_rest(gate)

    run(main())


def test_an_unreachable_engine_is_left_for_another_and_probed_by_others() -> None:
    async def main() -> None:
        gate, _, events = by_hand()
        ejected: list[Instance] = []
        gate.on_ejected(ejected.append)
        gate.update(advert())
        gate.update(advert(launch_id="b"))
        lease = gate.request(MODEL, ME)
        assert isinstance(lease, Lease)
        moved = lease.again("unreachable")
        assert isinstance(moved, Lease)
        assert moved.instance.launch_id == "b"
        lease.release()  # it is over
        with pytest.raises(RuntimeError):
            lease.again("revoked")
        gate.unreachable("a")
        assert [one.launch_id for one in ejected] == ["a"]
        waiter = gate.request(MODEL, ME)
        assert isinstance(waiter, Pending)
        told: list[Any] = []
        waiter.notify = told.append
        with pytest.raises(Unavailable):
            moved.again("unreachable")
        await eventually(lambda: told)
        assert isinstance(told[0], Unavailable)
        assert kinds(events)[-2:] == [("rejected", "realtime")] * 2
        gate.reachable("a")
        (await gate.acquire(MODEL, ME)).release()
        assert at_rest(gate)

    run(main())


def test_one_timer_wakes_the_gate_when_a_budget_changes() -> None:
    async def main() -> None:
        gate, budgets, events = by_hand()
        gate.update(advert(2))
        (budget,) = budgets
        now = asyncio.get_running_loop().time()
        budget.most, budget.change_at = 0, now + 600
        batch = Holder(gate, BULK)
        assert gate._tick_timer is not None
        first = gate._tick_timer
        budget.change_at = now + 0.02
        gate.signals("a", EngineSignals(running=0))
        assert first.cancelled()
        budget.due = now + 0.01
        await eventually(lambda: batch.lease)
        assert kinds(events) == [("promoted", "batch"), ("admitted", "batch")]
        assert gate.budgets()["a"].batch_sequences == 1
        assert batch.lease is not None
        batch.lease.release("unworked")
        assert at_rest(gate)

    run(main())


class OpensLater(HandBudget):
    """Nothing for batch before ``opens_at``, when nobody needs to say anything."""

    opens_at = math.inf

    def allowance(self, now: float) -> int:
        return self.slots if now >= self.opens_at else 0

    def next_change(self, now: float) -> float | None:
        return self.opens_at if now < self.opens_at < math.inf else None


class BusyClock:
    """So busy a machine that every two looks at the clock are ``STEP_S`` apart."""

    STEP_S = 0.02

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        told, self.now = self.now, self.now + self.STEP_S
        return told


@dataclass
class Scene:
    """A batch request waits for its budget to open; another launch, a request that runs and one that waits are there
    for something else to happen."""

    gate: Gate
    runs: Lease
    waits: Pending


HAPPENINGS: dict[str, Callable[[Scene], object]] = {
    "the timer, early": lambda scene: scene.gate._tick(),
    "a request that waits": lambda scene: scene.gate.request(MODEL, BULK),
    "a request that need not wait": lambda scene: scene.gate.request(MODEL, ME),
    "a first byte": lambda scene: scene.runs.first_byte(),
    "an end": lambda scene: scene.runs.release(),
    "a place that is left for another": lambda scene: scene.runs.again("revoked"),
    "a waiter that goes": lambda scene: scene.waits.cancel(),
    "a waiter that waited too long": lambda scene: scene.gate._expire(scene.waits._id),
    "what an engine says": lambda scene: scene.gate.signals("a", EngineSignals(running=0)),
    "a launch that changes": lambda scene: scene.gate.update(advert(5)),
    "a launch that is deleted": lambda scene: scene.gate.forget("b"),
    "an engine that cannot be reached": lambda scene: scene.gate.unreachable("b"),
    "an engine that can be reached again": lambda scene: scene.gate.reachable("a"),
}


@pytest.mark.parametrize("happens", HAPPENINGS.values(), ids=HAPPENINGS)
def test_a_budget_that_opens_while_the_gate_is_at_work_is_not_missed(
    monkeypatch: pytest.MonkeyPatch, happens: Callable[[Scene], object]
) -> None:
    """Just before its time a decision is made without it, and just after that the gate sees to its next timer."""
    budgets: list[OpensLater] = []

    def make(slots: int) -> OpensLater:
        budgets.append(OpensLater(slots))
        return budgets[-1]

    async def main() -> None:
        gate = Gate(budget=make)
        clock = BusyClock()
        monkeypatch.setattr(gate_module, "monotonic", clock)
        gate.update(advert(4))
        runs = await gate.acquire(MODEL, ME)
        batch = Holder(gate, BULK)
        waits = gate.request(MODEL, BULK)
        assert isinstance(waits, Pending)
        gate.update(advert(4, launch_id="b"))
        assert gate._tick_timer is None
        for budget in budgets:
            budget.opens_at = clock.now + clock.STEP_S / 2
        happens(Scene(gate, runs, waits))
        await eventually(lambda: batch.lease)

    run(main())


def test_events_of_refusals_name_no_model_that_is_not_served() -> None:
    async def main() -> None:
        gate, _, events = by_hand()
        gate.update(advert(state="bootstrapping"))
        for target in (MODEL, ByModel("made-up"), ByLaunch("a")):
            with pytest.raises(ApiError):
                gate.request(target, ME)
        assert [(event.model, event.code) for event in events] == [
            ("m", "model_loading"), ("", "model_not_found"), ("", "launch_not_ready"),
        ]  # fmt: skip

    run(main())


def test_coming_again_a_request_has_the_patience_it_had_left() -> None:
    async def main() -> None:
        gate, _, _ = by_hand(queue_timeout_s=60)
        gate.update(advert())
        loop = asyncio.get_running_loop()
        batch = Holder(gate, BULK)
        own = Holder(gate, BULK, loop.time() + 1000)
        realtime = Holder(gate, ME)
        await eventually(lambda: realtime.lease)
        assert batch.pending is not None
        assert batch.pending.due - loop.time() <= 60
        assert own.pending is not None
        assert own.pending.due - loop.time() > 900
        assert realtime.lease is not None
        realtime.lease.release()
        await eventually(lambda: batch.lease)
        assert batch.lease is not None
        assert batch.lease.patience_s <= 60
        batch.lease.release()
        await eventually(lambda: own.lease)
        assert own.lease is not None
        assert own.lease.deadline is not None
        own.lease.release()
        assert at_rest(gate)

    run(main())


def test_ten_thousand_may_wait_and_all_get_their_turn() -> None:
    async def main() -> None:
        gate = Gate(max_queued=10_000)
        gate.update(advert(8))
        running = [gate.request(MODEL, ME) for _ in range(8)]
        done = 0

        def run_it(outcome: Lease | ApiError) -> None:
            nonlocal done
            assert isinstance(outcome, Lease)
            done += 1
            outcome.release()

        for number in range(10_000):
            pending = gate.request(MODEL, Ticket(f"key{number % 7}", "batch" if number % 3 else "realtime"))
            assert isinstance(pending, Pending)
            pending.notify = run_it
        with pytest.raises(QueueFull):
            gate.request(MODEL, Ticket("key1", "batch"))
        for lease in running:
            assert isinstance(lease, Lease)
            lease.release()
        await eventually(lambda: done == 10_000, 30)
        assert at_rest(gate)

    run(main())


class _Loadable(NoProspects):
    """``m`` may be loaded."""

    def base_of(self, name: str) -> str | None:
        return "base" if name == "m" else None


def test_a_cold_model_holds_its_requests_for_a_while() -> None:
    async def main() -> None:
        gate = Gate(prospects=_Loadable(), hold_s=0.05)
        with pytest.raises(ModelLoading, match="held for"):
            await gate.acquire(MODEL, ME)
        with pytest.raises(ModelLoading):
            await gate.acquire(MODEL, ME, hold_s=0.02)
        with pytest.raises(ModelLoading):
            gate.request(MODEL, ME, hold_s=0)
        assert at_rest(gate)

    run(main())


def test_after_its_hold_a_request_whose_model_was_loaded_waits_for_its_turn() -> None:
    async def main() -> None:
        gate = Gate(prospects=_Loadable(), hold_s=0.05, queue_timeout_s=30)
        asked = [asyncio.create_task(gate.acquire(MODEL, ME)) for _ in range(2)]
        await asyncio.sleep(0)
        assert gate.demand()["m"].realtime == 2
        gate.update(advert(slots=1))
        first = await asked[0]
        await asyncio.sleep(0.1)  # the hold of the second is over now: it must not end it
        assert not asked[1].done()
        first.release()
        (await asked[1]).release()
        assert gate.last_ends("a").keys() == {"realtime"}
        assert at_rest(gate)

    run(main())


def test_with_infinity_a_request_waits_for_a_load_as_long_as_it_takes() -> None:
    async def main() -> None:
        gate = Gate(prospects=_Loadable(), hold_s=0.01)
        pending = gate.request(MODEL, BULK, math.inf, math.inf)
        assert isinstance(pending, Pending)
        assert pending.timer is None
        got: list[Any] = []
        pending.notify = got.append
        gate.update(advert())
        await eventually(lambda: got)
        got[0].release()

    run(main())


@pytest.mark.parametrize("hold_s", [0.0, 0.02])
def test_a_request_whose_engine_is_lost_is_held_no_longer_than_it_wanted(hold_s: float) -> None:
    async def main() -> None:
        gate = Gate(prospects=_Loadable(), hold_s=60, queue_timeout_s=60)
        gate.update(advert(slots=1))
        at_once = gate.request(MODEL, ME, hold_s=hold_s)
        waiter = gate.request(MODEL, ME, hold_s=hold_s)
        assert isinstance(at_once, Lease)
        assert isinstance(waiter, Pending)
        got: list[Any] = []
        waiter.notify = got.append
        at_once.release()
        await eventually(lambda: got)
        told: list[Any] = []
        again = got[0].again("unreachable")
        again.notify = told.append
        await eventually(lambda: told, 5)
        assert isinstance(told[0], ModelLoading)
        assert at_rest(gate)

    run(main())


def test_retired_refused_and_forgotten_models() -> None:
    async def main() -> None:
        prospects = _Loadable()
        gate = Gate(prospects=prospects)
        gate.update(advert())
        gate.retire("a")
        assert gate.is_retired("a")
        waiting = asyncio.create_task(gate.acquire(MODEL, ME))
        await asyncio.sleep(0)
        gate.restore("a")
        (await waiting).release()
        gate.retire("a")
        refused = asyncio.create_task(gate.acquire(MODEL, ME))
        await asyncio.sleep(0)
        gate.refuse("m", ModelFailed("it cannot"))
        with pytest.raises(ModelFailed):
            await refused
        forgotten = asyncio.create_task(gate.acquire(MODEL, ME))
        await asyncio.sleep(0)
        prospects.base_of = lambda _name: None  # type: ignore[method-assign]
        gate.prospects_changed()
        with pytest.raises(ApiError):
            await forgotten
        assert at_rest(gate)

    run(main())
