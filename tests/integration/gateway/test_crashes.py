"""Requests that end in the middle of a step: by a client that goes at that moment, by a mistake in our own code, or
by a limit while hundreds arrive at once. One request may be lost by its own fault; a place, a count or the next request
never."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.aio import eventually
from tests.support.data_plane import LAUNCH, Plane, Reply, advert, instance, request, run, running
from tests.support.raw_upstream import EVENTS, LAST_CHUNK, RawUpstream, Visit, answer, chunk
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.gateway.limits import GatewayLimits

REALTIME, BATCH = frozenset({"realtime"}), frozenset({"batch"})
MANY = 500
BODY: dict[str, Any] = {"model": "model", "prompt": "x" * 100, "max_tokens": 20}
ESTIMATE = len(json.dumps(BODY).encode()) // 4 + 20
USED = 7
# Client, daemon and engine are one event loop here: on a machine that stands still a connection takes its time.
UNHURRIED = GatewayLimits(upstream_connect_timeout_s=50)
DONE = answer(b'{"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}')


async def at_rest(plane: Plane, engine: RawUpstream) -> None:
    await eventually(lambda: plane.in_use() == plane.queued() == plane.gateway.body_bytes == 0)
    await eventually(lambda: not plane.gateway.connections and not plane.gateway.inflight.list())
    plane.gate.forget(LAUNCH)
    await eventually(lambda: engine.open == 0)


# -- at every step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queues", [False, True])
def test_fault_29_a_client_that_goes_after_any_number_of_steps(tmp_path: Path, queues: bool) -> None:
    """The number of turns of the event loop between the request and the going is what varies."""

    async def script(visit: Visit) -> None:
        await visit.send(EVENTS, chunk(b"data: 1\n\n"), chunk(b"data: [DONE]\n\n"), LAST_CHUNK)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            for turns in range(60):
                other = await plane.connect()
                if queues:
                    await other.send(request())
                wire = await plane.connect()
                wire.writer.write(request())
                for _ in range(turns):
                    await asyncio.sleep(0)
                wire.close()
                other.close()
                await eventually(lambda: plane.in_use() == plane.queued() == 0 and not plane.gateway.inflight.list())
                assert (await plane.ask()).status == 200
            await at_rest(plane, engine)

    run(main())


MISTAKES = [
    "vllm_bootstrap.gateway.exchange.admit",
    "vllm_bootstrap.gateway.exchange.make_intake",
    "vllm_bootstrap.gateway.exchange.target_of",
    "vllm_bootstrap.gateway.exchange.ticket_of",
    "vllm_bootstrap.gateway.passage.render",
    "vllm_bootstrap.gateway.exchange.headers.own_headers",
    "vllm_bootstrap.gateway.exchange.Relay.begin",
    "vllm_bootstrap.gateway.exchange.Relay.deliver",
    "vllm_bootstrap.gateway.inflight.Inflight.add",
    "vllm_bootstrap.gateway.place.Place.first_byte",
    "vllm_bootstrap.gateway.pool.Pool.take",
    "vllm_bootstrap.gateway.upstream.UpstreamConnection.start",
    "vllm_bootstrap.scheduler.gate.Gate.request",
    "vllm_bootstrap.scheduler.gate.Lease.first_byte",
    "vllm_bootstrap.scheduler.gate.Lease.settle",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("place", MISTAKES)
def test_fault_29_a_mistake_of_ours_costs_one_request_and_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, queued: bool
) -> None:
    release = asyncio.Event()
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'

    async def script(visit: Visit) -> None:
        if b"hold" in visit.body:
            await release.wait()
        await visit.send(EVENTS, chunk(b"data: {}\n\n"), chunk(usage), chunk(b"data: [DONE]\n\n"), LAST_CHUNK)

    def mistake(*_: Any, **__: Any) -> Any:
        raise RuntimeError("injected")

    async def victim(plane: Plane) -> bytes:
        async with plane.wire() as wire:
            await wire.send(request(body={**BODY, "stream": True}, headers=[("Connection", "close")]))
            return await wire.at_end()

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            assert b"[DONE]" in await victim(plane)
            if queued:
                holder = asyncio.create_task(plane.ask(body={**BODY, "prompt": "hold"}))
                await eventually(lambda: len(engine.requests) == 2)
                waiter = asyncio.create_task(victim(plane))
                await asyncio.sleep(0)
                await eventually(lambda: plane.queued() == 1)
                with monkeypatch.context() as broken:
                    broken.setattr(place, mistake)
                    release.set()
                    told = await waiter
                await asyncio.gather(holder, return_exceptions=True)
            else:
                with monkeypatch.context() as broken:
                    broken.setattr(place, mistake)
                    told = await victim(plane)
            assert b"injected" not in told
            await eventually(lambda: plane.in_use() == plane.queued() == 0 and not plane.gateway.inflight.list())
            assert b"[DONE]" in await victim(plane)
            await at_rest(plane, engine)

    run(main())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["_pass_on_event", "_pass_on_chunk"])
def test_fault_29_a_mistake_of_ours_in_the_middle_of_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """In a chunk that comes alone, and in one that comes with another."""
    goes_on = asyncio.Event()
    event = chunk(b"data: {}\n\n")

    async def script(visit: Visit) -> None:
        await visit.send(EVENTS, event)
        await goes_on.wait()
        await visit.send(event if place == "_pass_on_event" else event * 2)
        await visit.gone()

    def mistake(*_: Any, **__: Any) -> Any:
        raise RuntimeError("injected")

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        monkeypatch.setattr(f"vllm_bootstrap.gateway.exchange.Relay.{place}", mistake)
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                await wire.send(request(headers=[("Connection", "close")]))
                await wire.head()
                assert await anext(wire.chunks()) == b"data: {}\n\n"
                goes_on.set()
                told = await wire.at_end()
            assert b"internal_error" in told
            assert b"injected" not in told
            await at_rest(plane, engine)

    run(main())


def test_fault_30_what_waits_for_an_engine_that_dies_goes_to_the_other_one(tmp_path: Path) -> None:
    release = asyncio.Event()
    frail, sound = "l00000000000000000001", "l00000000000000000002"

    async def script(visit: Visit) -> None:
        await release.wait()
        await visit.send(DONE)

    async def main() -> None:
        async with (
            running(tmp_path, max_queued=MANY) as plane,
            RawUpstream(tmp_path / "e1", script).running() as first,
            RawUpstream(tmp_path / "e2", script).running() as second,
        ):
            plane.announce(instance(first.endpoint, frail, slots=5), instance(second.endpoint, sound, slots=5))
            tasks = [asyncio.create_task(plane.ask(body=BODY)) for _ in range(40)]
            await eventually(lambda: len(first.requests) == len(second.requests) == 5 and plane.queued() == 30)
            for visit in first.requests:
                visit.cut()
            plane.gate.update(advert(launch_id=frail, state="failed"))
            # Some of those that waited may have been given a place there in between, and have failed over since.
            await eventually(lambda: sum(task.done() for task in tasks) >= 5)
            release.set()
            replies = await asyncio.wait_for(asyncio.gather(*tasks), 10)
            ends = Counter(reply.status for reply in replies)
            assert ends[200] + ends[502] == 40
            assert ends[200] >= 30
            assert {reply.header("x-launch-id") for reply in replies if reply.status == 200} == {sound}
            assert plane.in_use() == plane.queued() == 0

    run(main())


# -- limits of keys ----------------------------------------------------------------------------------------------------


class Crowd:
    """Five hundred requests at once with one key, against an engine that answers none before ``release``."""

    def __init__(self, plane: Plane, engine: RawUpstream, release: asyncio.Event) -> None:
        self.plane, self.engine, self.release = plane, engine, release

    async def comes(self, accepted: int, number: int = MANY) -> Counter[str]:
        """So many must reach the engine and be answered; what becomes of all."""
        self.release.clear()
        before = len(self.engine.requests)
        tasks = [asyncio.create_task(self.plane.ask(body=BODY, key="sk-me")) for _ in range(number)]
        await eventually(lambda: sum(task.done() for task in tasks) == number - accepted, 20)
        await eventually(lambda: len(self.engine.requests) - before == accepted, 20)
        assert all(not 200 <= task.result().status < 300 for task in tasks if task.done())
        self.release.set()
        replies = await asyncio.gather(*tasks)
        for reply in replies:
            if reply.status == 429:
                self.refused_well(reply)
        return Counter(reply.code if reply.status != 200 else "200" for reply in replies)

    def refused_well(self, reply: Reply) -> None:
        assert 1 <= int(reply.header("retry-after") or 0) <= 60
        assert reply.json["src"] == "vllm-bootstrap"
        assert reply.json["error"]["type"]
        assert reply.json["error"]["message"]


LIMITS: dict[str, tuple[dict[str, Any], list[tuple[int, str]]]] = {
    # As often as they come, fifty at once.
    "parallel": ({"max_parallel": 50}, [(50, "concurrency_limit")] * 2),
    "requests a minute": ({"requests_per_minute": 120}, [(120, "rate_limit_exceeded"), (0, "rate_limit_exceeded")]),
    # The estimates of forty fit; they use less, and what they did not use lets others in.
    "tokens a minute": (
        {"tokens_per_minute": 40 * ESTIMATE + ESTIMATE // 2},
        [
            (40, "rate_limit_exceeded"),
            ((40 * ESTIMATE + ESTIMATE // 2 - 40 * USED) // ESTIMATE, "rate_limit_exceeded"),
        ],
    ),
    "tokens of batch": (
        {"max_enqueued_tokens": 10 * ESTIMATE, "scopes": BATCH},
        [(10, "rate_limit_exceeded")] * 2,
    ),
    "all of them": (
        {"max_parallel": 60, "requests_per_minute": 90, "tokens_per_minute": 100 * ESTIMATE},
        [(60, "concurrency_limit"), (30, "rate_limit_exceeded")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_fault_28_limits_are_exact_however_many_come_at_once(tmp_path: Path, name: str) -> None:
    fields, waves = LIMITS[name]
    me = Principal("me", **{"scopes": REALTIME, **fields})
    release = asyncio.Event()

    async def script(visit: Visit) -> None:
        await release.wait()
        await visit.send(DONE)

    async def main() -> None:
        async with (
            running(tmp_path, UNHURRIED, keys={"sk-me": me}, max_queued=MANY) as plane,
            RawUpstream(tmp_path / "e", script).running() as engine,
        ):
            plane.announce(instance(engine.endpoint))
            crowd = Crowd(plane, engine, release)
            for accepted, code in waves:
                ends = await crowd.comes(accepted)
                assert ends["200"] == accepted
                assert ends[code] == MANY - accepted
            await at_rest(plane, engine)

    run(main())


def test_fault_28_the_six_headers_tell_what_is_left(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(DONE)

    async def main() -> None:
        me = Principal("me", REALTIME, requests_per_minute=2, tokens_per_minute=1000)
        async with (
            running(tmp_path, keys={"sk-me": me}) as plane,
            RawUpstream(tmp_path / "e", script).running() as engine,
        ):
            plane.announce(instance(engine.endpoint))
            replies = [await plane.ask(body=BODY, key="sk-me") for _ in range(3)]
            assert [reply.status for reply in replies] == [200, 200, 429]
            for kind, limit in (("requests", "2"), ("tokens", "1000")):
                assert {reply.header(f"x-ratelimit-limit-{kind}") for reply in replies} == {limit}
                assert all(reply.header(f"x-ratelimit-reset-{kind}") for reply in replies)
            left = [reply.header("x-ratelimit-remaining-requests") for reply in replies]
            assert left == ["1", "0", "0"]
            # The first is still reserved as estimated when its answer begins, and has used less when the last comes.
            assert int(replies[0].header("x-ratelimit-remaining-tokens") or 0) <= 1000 - USED
            assert replies[2].header("x-ratelimit-remaining-tokens") == str(1000 - 2 * USED)

    run(main())
