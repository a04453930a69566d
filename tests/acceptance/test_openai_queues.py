"""The stock ``openai`` client where there is more to do than an engine takes: it waits and leaves, finds the queue
full, is turned away by what stops, and loses its engine. Mostly its async half, since that is what waits in numbers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from tests.support.stock_client import FREE_WITHIN_S, LONG, MODEL, Box, boxed
from tests.support.waiting import wait_for

WAITING = 3
ASKED: dict[str, Any] = {"model": MODEL, "prompt": "a", "max_tokens": 1}


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    """One slot, and as many as ``WAITING`` may wait for it."""
    with boxed({"max_num_seqs": 1}, max_in_flight_requests=WAITING) as made:
        yield made


@asynccontextmanager
async def held(client: openai.AsyncOpenAI, model: str = MODEL) -> AsyncIterator[Any]:
    """A stream that has begun and goes on: its slot is taken."""
    stream = await client.completions.create(model=model, prompt="a", stream=True, **LONG)
    events = aiter(stream)
    await anext(events)
    try:
        yield events
    finally:
        await stream.close()


async def until(condition: Any, within_s: float = 10.0) -> None:
    await asyncio.to_thread(wait_for, condition, within_s)


async def queued(box: Box, cls: str, count: int) -> None:
    await until(lambda: box.load("queued")[cls] == count)


def assert_refused(error: BaseException | None, kind: type[openai.APIStatusError], *codes: str) -> None:
    """What callers look at: the class, the code (one of ``codes``), and when to come back."""
    assert isinstance(error, kind)
    assert error.code in codes
    assert error.response.json()["src"] == "vllm-bootstrap"
    assert 1 <= int(error.response.headers["retry-after"]) <= 60
    assert error.request_id


@pytest.mark.parametrize("streamed", [True, False])
def test_fault_18_async_tasks_that_are_cancelled_while_they_wait_leave_nothing(box: Box, streamed: bool) -> None:
    async def main() -> None:
        async with box.async_client() as client:
            async with held(client):
                waiting = [asyncio.create_task(client.completions.create(**ASKED, stream=streamed)) for _ in range(2)]
                await queued(box, "realtime", 2)
                for task in waiting:
                    task.cancel()
                ends = await asyncio.gather(*waiting, return_exceptions=True)
                assert all(isinstance(end, asyncio.CancelledError) for end in ends)
                await until(lambda: box.load("queued")["realtime"] == 0, FREE_WITHIN_S)
                under_way = await asyncio.to_thread(box.daemon.request, "GET", "/requests")
                assert [one["state"] for one in under_way.json()["data"]] == ["running"]
                assert await asyncio.to_thread(box.running) == 1
                again = [asyncio.create_task(client.completions.create(**ASKED)) for _ in range(2)]
                await queued(box, "realtime", 2)
            assert [len((await task).choices) for task in again] == [1, 1], "their places are there for others"

    asyncio.run(main())
    box.assert_freed()


def test_fault_28_a_full_queue_is_a_rate_limit_error_and_realtime_takes_the_place_of_batch(box: Box) -> None:
    async def main() -> None:
        async with box.async_client() as client, box.async_client(key="k-batch") as batch:
            async with held(client):
                waiting = []
                for number in range(1, WAITING + 1):
                    waiting.append(asyncio.create_task(batch.completions.create(**ASKED)))
                    await queued(box, "batch", number)
                with pytest.raises(openai.RateLimitError) as refused:
                    await batch.completions.create(**ASKED)
                assert_refused(refused.value, openai.RateLimitError, "queue_full")
                with box.client(key="k-batch") as plain, pytest.raises(openai.RateLimitError) as refused:
                    await asyncio.to_thread(plain.completions.create, **ASKED, stream=True)
                assert_refused(refused.value, openai.RateLimitError, "queue_full")
                realtime = asyncio.create_task(client.completions.create(**ASKED))
                youngest = waiting.pop()
                await asyncio.wait([youngest], timeout=10)
                assert_refused(youngest.exception(), openai.RateLimitError, "queue_full")
                await queued(box, "realtime", 1)
            assert (await realtime).choices
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await until(lambda: not any(box.load("queued").values()), FREE_WITHIN_S)

    asyncio.run(main())
    box.assert_freed()


def test_fault_28_a_launch_that_stops_turns_away_those_who_wait_and_those_who_come(box: Box) -> None:
    fields = {"served_model_name": "stops", "max_num_seqs": 1, "knobs": {"slow-stop": 2}}
    launch_id = box.daemon.ready("org/stops", **fields)["launch_id"]

    async def main() -> None:
        asked, by_id = {**ASKED, "model": "stops"}, f"/proxy/{launch_id}/v1"
        async with box.async_client() as client, box.async_client(by_id) as pinned, held(client, "stops"):
            waits = asyncio.create_task(client.completions.create(**asked))
            waits_by_id = asyncio.create_task(pinned.completions.create(**asked))
            await until(lambda: box.daemon.status(launch_id)["load"]["queued"]["realtime"] == 2)
            await asyncio.to_thread(box.daemon.stop_launch, launch_id, wait="false")
            with pytest.raises(openai.InternalServerError) as refused:
                await client.completions.create(**asked)
            with pytest.raises(openai.ConflictError) as refused_by_id:
                await pinned.completions.create(**asked)
            await asyncio.wait([waits, waits_by_id], timeout=10)
            for error in (waits.exception(), refused.value):
                assert_refused(error, openai.InternalServerError, "draining")
                assert "is being stopped" in str(error)
            for error in (waits_by_id.exception(), refused_by_id.value):
                assert_refused(error, openai.ConflictError, "launch_not_ready")
                assert "is stopping" in str(error)

    asyncio.run(main())
    box.daemon.stop_launch(launch_id)


def test_fault_28_a_daemon_that_stops_turns_away_those_who_wait_and_those_who_come() -> None:
    async def main(box: Box) -> None:
        async with box.async_client() as client, held(client) as events:
            waits = asyncio.create_task(client.completions.create(**ASKED))
            await queued(box, "realtime", 1)
            box.daemon.send_signal(signal.SIGTERM)
            await asyncio.wait([waits], timeout=10)
            with pytest.raises(openai.InternalServerError) as refused:
                await client.completions.create(**ASKED)
            for error in (waits.exception(), refused.value):
                assert_refused(error, openai.InternalServerError, "draining")
                assert "The daemon is stopping" in str(error)
            with pytest.raises(openai.APIError) as broken:
                async for _ in events:
                    pass
            assert not isinstance(broken.value, openai.APIStatusError)
            assert broken.value.code == "draining"

    with boxed({"max_num_seqs": 1, "knobs": {"slow-stop": 1.5}}) as box:
        asyncio.run(main(box))


def test_fault_30_an_engine_that_is_killed_ends_what_it_had_with_the_clients_own_errors(box: Box) -> None:
    restart = {"policy": "on-failure", "max_attempts": 2, "backoff_s": 0.1}
    status = box.daemon.ready("org/frail", served_model_name="frail", max_num_seqs=2, restart=restart)
    launch_id, asked = status["launch_id"], {**ASKED, "model": "frail"}

    async def main() -> None:
        async with box.async_client() as client, held(client, "frail") as events:
            whole = asyncio.create_task(client.completions.create(model="frail", prompt="a", **LONG))
            load = {"in_flight": 2, "queued": 0}
            await until(lambda: _load(box, launch_id) == load)
            waits = asyncio.create_task(client.completions.create(**asked))
            await until(lambda: _load(box, launch_id) == {**load, "queued": 1})
            os.kill(status["pid"], signal.SIGKILL)
            with pytest.raises(openai.APIError, match="engine") as broken:
                async for _ in events:
                    pass
            assert not isinstance(broken.value, openai.APIStatusError)
            assert broken.value.code == "upstream_error"
            await asyncio.wait([whole, waits], timeout=10)
            lost, refused = whole.exception(), waits.exception()
            assert isinstance(lost, openai.InternalServerError)
            assert (lost.status_code, lost.code) == (502, "upstream_error")
            # It may have been on its way to the engine, in the place of one of those that had just ended.
            assert isinstance(refused, openai.InternalServerError)
            if refused.status_code == 502:
                assert refused.code == "upstream_error"
            else:
                assert_refused(refused, openai.InternalServerError, "draining", "model_loading", "overloaded")
            await until(lambda: box.daemon.status(launch_id)["attempt"] == 2)
            await asyncio.to_thread(box.daemon.wait_state, launch_id, "ready")
            assert (await client.completions.create(**asked)).choices

    asyncio.run(main())
    box.daemon.stop_launch(launch_id)


def _load(box: Box, launch_id: str) -> dict[str, int]:
    load = box.daemon.status(launch_id)["load"]
    return {part: load[part]["realtime"] for part in ("in_flight", "queued")}
