from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from tests.support.aio import eventually, run
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import ApiError, ConcurrencyLimit, Draining, LaunchNotReady, QueueFull, Unavailable
from vllm_bootstrap.scheduler.gate import ByLaunch, ByModel, Gate, Lease, Pending, Ticket
from vllm_bootstrap.serving import Advert, Endpoint, Instance

ME = Ticket("me")
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
        assert state.remaining == 13
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
