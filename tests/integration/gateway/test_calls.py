"""Requests of the daemon's own: what becomes of them is told once, and nothing of them stays behind."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.gateway.test_places import OTHER, holding, leaves_nothing, two_engines
from tests.support.aio import eventually
from tests.support.data_plane import KEYS, LAUNCH, Plane, instance, request, run, running
from tests.support.raw_upstream import LAST_CHUNK, RawUpstream, Visit, answer, chunk
from vllm_bootstrap.auth.keys import Key
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import TooManyRequests
from vllm_bootstrap.gateway import GatewayLimits, call
from vllm_bootstrap.gateway.call import Call, Failure, Reply
from vllm_bootstrap.scheduler.gate import ByLaunch, ByModel, Target
from vllm_bootstrap.scheduler.tickets import Usage
from vllm_bootstrap.serving import Endpoint

BULK = KEYS["sk-batch"]
COMPLETIONS = "/v1/completions"
BODY: dict[str, Any] = {"model": "model", "prompt": "x"}
USAGE = b'{"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass
class Ends:
    """Calls of a test and what became of them, in order."""

    plane: Plane
    told: list[Reply | Failure] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def make(
        self,
        body: Any = None,
        *,
        path: str = COMPLETIONS,
        target: Target | None = None,
        principal: Principal = BULK,
        **more: Any,
    ) -> Call:
        raw = body if isinstance(body, bytes) else json.dumps(BODY if body is None else body).encode()
        target = ByModel("model") if target is None else target
        made = Call(self.plane.gateway, principal, target, path, raw, on_end=self.told.append, **more)
        self.calls.append(made)
        return made

    def start(self, body: Any = None, **more: Any) -> Call:
        told = len(self.told)
        made = self.make(body, **more)
        made.start()
        assert len(self.told) == told, "nothing is told from inside of start"
        return made

    async def end(self, body: Any = None, **more: Any) -> Reply | Failure:
        told = len(self.told)
        self.start(body, **more)
        await eventually(lambda: len(self.told) > told)
        return self.told[told]

    async def reply(self, body: Any = None, **more: Any) -> Reply:
        end = await self.end(body, **more)
        assert isinstance(end, Reply), end
        return end

    async def failure(self, body: Any = None, **more: Any) -> Failure:
        end = await self.end(body, **more)
        assert isinstance(end, Failure), end
        return end

    async def over(self, told: int) -> None:
        """Nothing is left of any of them, and so many were told of."""
        await eventually(lambda: len(self.told) == told)
        await leaves_nothing(self.plane)
        assert not self.plane.gateway.calls
        assert {one.running_on for one in self.calls} == {None}
        no_room = [end for end in self.told if isinstance(end, Failure) and isinstance(end.error, TooManyRequests)]
        assert len(self.plane.records) == sum(one._started for one in self.calls) - len(no_room)


def code_of(end: Reply | Failure) -> str:
    assert isinstance(end, Failure), end
    return end.error.code


# Answers


def test_an_answer_comes_whole_with_what_is_known_of_it(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(answer(USAGE))

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            ends = Ends(plane)
            reply = await ends.reply({**BODY, "priority": -7}, request_id="line-1")
            assert reply == Reply(200, USAGE, LAUNCH, "line-1", Usage(3, 4), 0)
            (asked,) = engine.requests
            assert asked.lines[0] == b"POST /v1/completions HTTP/1.1"
            assert asked.header(b"x-request-id") == [b"line-1"]
            assert asked.header(b"x-vllm-priority") == [b"100"]
            assert asked.header(b"authorization") == [b"Bearer internal-key"]
            assert asked.header(b"content-type") == [b"application/json"]
            assert json.loads(asked.body) == BODY
            (record,) = plane.records
            assert (record.method, record.path, record.status, record.code) == ("POST", COMPLETIONS, 200, None)
            assert (record.owner, record.model, record.launch_id, record.cls) == ("bulk", "model", LAUNCH, "batch")
            assert (record.prompt_tokens, record.completion_tokens) == (3, 4)
            assert (record.bytes_in, record.bytes_out) == (len(json.dumps({**BODY, "priority": -7})), len(USAGE))
            await ends.over(1)

    run(main())


@pytest.mark.parametrize("status", [b"400 Bad Request", b"429 Too Many Requests", b"500 Oops", b"503 Busy"])
def test_what_an_engine_refuses_is_its_answer(tmp_path: Path, status: bytes) -> None:
    refusal = b'{"error":{"message":"no","type":"x","code":1}}'

    async def script(visit: Visit) -> None:
        await visit.send(answer(refusal, status=status))

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            ends = Ends(plane)
            reply = await ends.reply()
            assert (reply.status, reply.body, reply.usage) == (int(status[:3]), refusal, None)
            assert [(record.status, record.code) for record in plane.records] == [(int(status[:3]), None)]
            await ends.over(1)

    run(main())


def test_an_answer_in_pieces(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def script(visit: Visit) -> None:
        await visit.send(HEAD)
        for at in range(0, len(USAGE), 10):
            await visit.send(chunk(USAGE[at : at + 10]))
            await go.wait()
        await visit.send(LAST_CHUNK)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            ends = Ends(plane)
            made = ends.start()
            await eventually(lambda: made._size == 10)
            assert made.running_on == LAUNCH
            assert plane.gateway.body_bytes == 0
            (info,) = plane.gateway.inflight.list()
            assert (info.state, info.cls, info.owner, info.launch_id) == ("running", "batch", "bulk", LAUNCH)
            go.set()
            await ends.over(1)
            assert isinstance(ends.told[0], Reply)
            assert (ends.told[0].body, ends.told[0].usage) == (USAGE, Usage(3, 4))

    run(main())


def test_an_answer_that_ends_with_its_connection(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(b"HTTP/1.1 200 OK\r\n\r\n", USAGE)
        visit.writer.close()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            ends = Ends(plane)
            reply = await ends.reply()
            assert (reply.body, reply.usage) == (USAGE, None)
            await ends.over(1)

    run(main())


def test_whoever_is_told_may_start_the_next(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            left = 50
            ended = asyncio.Event()

            def following(end: Reply | Failure) -> None:
                nonlocal left
                assert isinstance(end, Reply)
                left -= 1
                if left:
                    begin()
                else:
                    ended.set()

            def begin() -> None:
                body = json.dumps(BODY).encode()
                Call(plane.gateway, BULK, ByModel("model"), COMPLETIONS, body, on_end=following).start()

            begin()
            await ended.wait()
            assert (len(engine.requests), engine.connections) == (50, 1)
            await leaves_nothing(plane)
            assert len(plane.records) == 50

    run(main())


def test_nobody_who_is_told_can_break_anything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def mistake(_: Reply | Failure) -> None:
        raise RuntimeError("injected")

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            body = json.dumps(BODY).encode()
            made = Call(plane.gateway, BULK, ByModel("model"), COMPLETIONS, body, on_end=mistake)
            made.start()
            await eventually(lambda: len(plane.records) == 1)
            ends = Ends(plane)
            assert (await ends.reply()).status == 200
            await leaves_nothing(plane)
            assert [record.status for record in plane.records] == [200, 200]

    with caplog.at_level(logging.ERROR):
        run(main())
    assert "a mistake of ours" in caplog.text


# What is asked of whom


def test_the_body_says_how_many_sequences_and_the_priority_who_is_next(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        if b"first" in visit.body:
            await go.wait()
        await visit.send(answer())

    go = asyncio.Event()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            ends = Ends(plane)
            ends.start({**BODY, "prompt": "first"})
            await eventually(lambda: len(engine.requests) == 1)
            for name, priority in (("low", -5), ("middle", 0), ("high", 100)):
                ends.start({**BODY, "prompt": [name, name]}, priority=priority)
            assert [one.sequences for one in plane.gateway.inflight.list()] == [1, 2, 2, 2]
            assert [one.state for one in plane.gateway.inflight.list()] == ["running"] + ["queued"] * 3
            assert {one.running_on for one in ends.calls} == {LAUNCH, None}
            go.set()
            await ends.over(4)
            assert [json.loads(visit.body)["prompt"][0] for visit in engine.requests[1:]] == ["high", "middle", "low"]

    run(main())


def test_a_launch_is_asked_by_its_id(tmp_path: Path) -> None:
    async def main() -> None:
        async with two_engines(tmp_path) as (plane, engine):
            ends = Ends(plane)
            assert (await ends.reply(target=ByLaunch(OTHER))).launch_id == OTHER
            assert (await ends.reply({"prompt": "x"}, target=ByLaunch(OTHER))).launch_id == OTHER
            failure = await ends.failure(target=ByLaunch(LAUNCH))
            assert (failure.error.code, failure.sent) == ("upstream_error", False)
            assert len(engine.requests) == 2
            assert code_of(await ends.end(target=ByLaunch("nobody"))) == "not_found"
            assert code_of(await ends.end(target=ByLaunch("ended-before"))) == "launch_not_ready"
            await ends.over(5)

    run(main())


def test_an_older_engine_gets_the_priority_in_the_body(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint, priority_header=False, priority_field=True))
            ends = Ends(plane)
            await ends.reply({**BODY, "priority": -100})
            assert json.loads(engine.requests[0].body) == {**BODY, "priority": 100}
            await ends.over(1)

    run(main())


NARROW = Principal("narrow", frozenset({"batch"}), models=("other*",))
SMALL = Principal("small", frozenset({"batch"}), max_sequences=4)
WATCHER = KEYS["sk-monitor"]
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "no JSON": ("invalid_json", {"body": b"{"}),
    "no object": ("invalid_json", {"body": b"[]"}),
    "no model": ("bad_request", {"body": {"prompt": "x"}}),
    "another model": ("bad_request", {"body": {**BODY, "model": "another"}}),
    "no such model": ("model_not_found", {"body": {**BODY, "model": "nope"}, "target": ByModel("nope")}),
    "a stream": ("bad_request", {"body": {**BODY, "stream": True}}),
    "in the background": ("bad_request", {"body": {**BODY, "background": True}}),
    "a forbidden field": ("bad_request", {"body": {**BODY, "kv_transfer_params": {}}}),
    "media elsewhere": ("bad_request", {"body": {**BODY, "x": {"image_url": "http://169.254.169.254/"}}}),
    "too many sequences": ("bad_request", {"body": {**BODY, "n": 5}, "principal": SMALL}),
    "a model not for this key": ("model_not_found", {"principal": NARROW}),
    "a launch not for this key": (
        "not_found", {"principal": NARROW, "target": ByLaunch(LAUNCH), "body": {"prompt": "x"}},
    ),
    "another's adapter": ("model_not_found", {"principal": NARROW, "target": ByLaunch(LAUNCH)}),
    "no scope": ("insufficient_scope", {"principal": WATCHER}),
    "an unknown key": ("invalid_api_key", {"principal": Principal("gone", frozenset({"batch"}))}),
    "a key with other rights": ("insufficient_scope", {"principal": Principal("watcher", frozenset({"batch"}))}),
    "no route": ("not_found", {"path": "/v1/nothing"}),
    "a route without JSON": ("not_found", {"path": "/v1/audio/transcriptions"}),
    "a route this engine lacks": ("not_found", {"path": "/v1/score", "target": ByLaunch(LAUNCH)}),
    "a response nobody made": (
        "not_found", {"path": "/v1/responses", "body": {"model": "model", "input": "x", "previous_response_id": "r"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_a_client_may_not_ask_a_batch_may_not(tmp_path: Path, why: str) -> None:
    code, asked = REFUSED[why]

    async def main() -> None:
        keys = {**KEYS, "sk-narrow": NARROW, "sk-small": SMALL}
        async with running(tmp_path, keys=keys) as plane, RawUpstream(tmp_path / "e").running() as engine:
            routes = tuple(one for one in instance(engine.endpoint).routes if one.path != "/v1/score")
            plane.announce(instance(engine.endpoint, routes=routes, refuses_http_media=True))
            ends = Ends(plane)
            body, rest = asked.get("body"), {name: value for name, value in asked.items() if name != "body"}
            failure = await ends.failure(body, **rest)
            assert (failure.error.code, failure.sent) == (code, False)
            assert not engine.requests
            await ends.over(1)
            assert [record.code for record in plane.records] == [code]

    run(main())


def test_a_kept_response_belongs_to_the_key(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(answer(b'{"id":"resp_1"}'))

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            ends = Ends(plane)
            ask = {"model": "model", "input": "x"}
            await ends.reply({**ask, "store": False}, path="/v1/responses")
            assert len(plane.gateway.responses) == 0
            await ends.reply(ask, path="/v1/responses")
            assert plane.gateway.responses.find("resp_1", "bulk") == LAUNCH
            await ends.reply({**ask, "previous_response_id": "resp_1"}, path="/v1/responses")
            await ends.over(3)

    run(main())


def test_bodies_are_bounded_like_those_of_clients(tmp_path: Path) -> None:
    async def main() -> None:
        limits = GatewayLimits(max_body_bytes=2000, body_budget_bytes=1500)
        async with running(tmp_path, limits) as plane, RawUpstream(tmp_path / "e", holding).running() as engine:
            plane.announce(instance(engine.endpoint))
            ends = Ends(plane)
            first = ends.start({**BODY, "prompt": "x" * 1000})
            assert 1000 < plane.gateway.body_bytes < 1500
            assert code_of(await ends.end({**BODY, "prompt": "x" * 1000})) == "overloaded"
            first.cancel()
            assert plane.gateway.body_bytes == 0
            plane.gateway.limits = GatewayLimits(max_body_bytes=500)
            assert code_of(await ends.end({**BODY, "prompt": "x" * 1000})) == "request_too_large"
            await ends.over(2)

    run(main())


def test_what_the_scheduler_refuses_is_told_and_the_wait_has_no_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            running(tmp_path, max_queued=2, queue_timeout_s=0.01) as plane,
            RawUpstream(tmp_path / "e", holding).running() as engine,
        ):
            plane.announce(instance(engine.endpoint, slots=1))
            ends = Ends(plane)
            for _ in range(3):
                ends.start()
            assert code_of(await ends.end()) == "queue_full"
            await asyncio.sleep(0.05)
            assert (plane.queued(), len(ends.told)) == (2, 1)
            assert {pending.due for pending in plane.gate._pending.values()} == {math.inf}
            plane.gate.forget(LAUNCH)
            await eventually(lambda: len(ends.told) == 3)
            assert {code_of(end) for end in ends.told[1:]} == {"model_not_found"}
            ends.calls[0].cancel()
            await ends.over(3)

    run(main())


# Places that are lost


@pytest.mark.parametrize("heads", [True, False])
def test_it_makes_room_for_realtime_until_its_answer_begins(tmp_path: Path, heads: bool) -> None:
    async def script(visit: Visit) -> None:
        if len(engines[0].requests) != 1:
            await visit.send(answer(b'{"who":"%b"}' % visit.header(b"x-vllm-priority")[0]))
            return
        if heads:
            await visit.send(HEAD)
        await visit.gone()

    engines: list[RawUpstream] = []

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            engines.append(engine)
            plane.announce(instance(engine.endpoint, slots=1))
            ends = Ends(plane)
            made = ends.start()
            await eventually(lambda: len(engine.requests) == 1)
            if heads:
                await eventually(lambda: made._connection is not None and made._connection.head_ready)
            assert (await plane.ask()).body == b'{"who":"0"}'
            await eventually(lambda: len(ends.told) == 1)
            assert isinstance(ends.told[0], Reply)
            assert ends.told[0].body == b'{"who":"100"}'
            assert engine.requests[0].body == engine.requests[2].body
            await leaves_nothing(plane)

    run(main())


def test_an_answer_that_has_begun_keeps_its_place(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def script(visit: Visit) -> None:
        if visit.header(b"x-vllm-priority") == [b"100"]:
            await visit.send(HEAD, chunk(b"{"))
            await go.wait()
            await visit.send(chunk(b"}"), LAST_CHUNK)
        else:
            await visit.send(answer())

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            ends = Ends(plane)
            made = ends.start()
            await eventually(lambda: made._size == 1)
            realtime = asyncio.create_task(plane.ask())
            await eventually(lambda: plane.queued() == 1)
            await asyncio.sleep(0.05)
            assert len(engine.requests) == 1
            go.set()
            assert (await realtime).status == 200
            assert isinstance(ends.told[0], Reply)
            assert ends.told[0].body == b"{}"
            await leaves_nothing(plane)

    run(main())


def test_another_engine_is_asked_when_one_cannot_be_reached(tmp_path: Path) -> None:
    async def main() -> None:
        async with two_engines(tmp_path) as (plane, engine):
            ends = Ends(plane)
            assert (await ends.reply()).launch_id == OTHER
            assert len(engine.requests) == 1
            assert plane.gateway.reviver.watched == {LAUNCH}
            await ends.over(1)

    run(main())


def test_no_engine_can_be_reached(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane:
            plane.announce(instance(Endpoint(uds=str(tmp_path / "gone"))))
            ends = Ends(plane)
            failure = await ends.failure()
            assert (failure.error.code, failure.sent) == ("upstream_error", False)
            await ends.over(1)

    run(main())


@pytest.mark.parametrize("begun", [False, True])
def test_an_engine_that_goes_before_or_in_its_answer(tmp_path: Path, begun: bool) -> None:
    async def script(visit: Visit) -> None:
        if begun:
            await visit.send(HEAD, chunk(b"{"))
        visit.cut()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            ends = Ends(plane)
            failure = await ends.failure()
            assert (failure.error.code, failure.launch_id, failure.sent) == ("upstream_error", LAUNCH, True)
            assert len(engine.requests) == 1
            await ends.over(1)
            assert [(record.status, record.code) for record in plane.records] == [(502, "upstream_error")]

    run(main())


def test_a_kept_connection_that_was_closed_is_no_failure(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        if len(visits) in (1, 2) and visit.connection == 1:
            visits.append(visit)
            if len(visits) == 3:
                visit.cut()
                return
        else:
            visits.append(visit)
        await visit.send(answer())

    visits: list[Visit] = []

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            ends = Ends(plane)
            for _ in range(3):
                assert (await ends.reply()).status == 200
            assert (len(engine.requests), engine.connections) == (4, 2)
            await ends.over(3)

    run(main())


def test_a_request_that_may_have_killed_an_engine_is_not_taken_to_another(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        if visit.body.endswith(b'"deadly"}'):
            (tmp_path / "one").unlink()
            visit.cut()
        await visit.send(answer())

    async def main() -> None:
        async with (
            running(tmp_path) as plane,
            RawUpstream(tmp_path / "one", script).running() as engine,
            RawUpstream(tmp_path / "two", holding).running() as sister,
        ):
            plane.announce(instance(engine.endpoint))
            ends = Ends(plane)
            await ends.reply()
            plane.announce(instance(sister.endpoint, OTHER))
            held = ends.start(target=ByLaunch(OTHER))  # so that the other one is asked first
            failure = await ends.failure({**BODY, "prompt": "deadly"})
            assert (failure.error.code, failure.launch_id, failure.sent) == ("upstream_error", LAUNCH, True)
            assert len(sister.requests) == 1
            held.cancel()
            await ends.over(2)

    run(main())


# Limits


@pytest.mark.parametrize("begun", [False, True])
def test_an_engine_that_does_not_go_on(tmp_path: Path, begun: bool) -> None:
    async def script(visit: Visit) -> None:
        if begun:
            await visit.send(HEAD, chunk(b"{"))
        await visit.gone()

    async def main() -> None:
        limits = GatewayLimits(upstream_first_byte_timeout_s=0.1, upstream_idle_timeout_s=0.1)
        async with running(tmp_path, limits) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            ends = Ends(plane)
            failure = await ends.failure()
            assert (failure.error.code, failure.launch_id, failure.sent) == ("upstream_timeout", LAUNCH, True)
            await eventually(lambda: engine.open == 0)
            await ends.over(1)

    run(main())


def test_an_engine_that_is_slow_but_goes_on(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(HEAD)
        for _ in range(8):
            await visit.send(chunk(b" "))
            await asyncio.sleep(0.05)
        await visit.send(LAST_CHUNK)

    async def main() -> None:
        limits = GatewayLimits(upstream_first_byte_timeout_s=0.2, upstream_idle_timeout_s=0.2)
        async with running(tmp_path, limits) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            ends = Ends(plane)
            assert (await ends.reply()).body == b" " * 8
            await ends.over(1)

    run(main())


@pytest.mark.parametrize("how", ["stated", "in pieces", "at once"])
def test_an_answer_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(call, "MOST_ANSWER_BYTES", 1000)

    async def script(visit: Visit) -> None:
        if how == "stated":
            await visit.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1001\r\n\r\n", b"x")
        elif how == "in pieces":
            await visit.send(HEAD, *[chunk(b"x" * 100)] * 11)
        else:
            await visit.send(answer(b"x" * 1001))
        await visit.gone()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            ends = Ends(plane)
            failure = await ends.failure()
            assert (failure.error.code, failure.launch_id, failure.sent) == ("upstream_error", LAUNCH, True)
            assert "1000 bytes" in failure.error.message
            await ends.over(1)

    run(main())


# Ended from outside


async def _at(plane: Plane, stage: str, ends: Ends, engine: RawUpstream) -> Call:
    """A call in that stage, on an engine with one slot."""
    if stage == "new":
        return ends.make()
    if stage == "refused":
        return ends.start(b"{")
    if stage == "queued":
        ends.start()
        await eventually(lambda: len(engine.requests) == 1)
    made = ends.start({**BODY, "prompt": stage})
    if stage == "waiting":
        await eventually(lambda: len(engine.requests) == 1)
    elif stage == "receiving":
        await eventually(lambda: made._size == 1)
    elif stage == "over":
        await eventually(lambda: bool(ends.told))
    return made


async def _by_stage(visit: Visit) -> None:
    if b"over" in visit.body:
        await visit.send(answer())
        return
    if b"receiving" in visit.body:
        await visit.send(HEAD, chunk(b"{"))
    await visit.gone()


@pytest.mark.parametrize("stage", ["new", "refused", "queued", "connecting", "waiting", "receiving", "over"])
def test_its_owner_can_give_it_up_at_any_time(tmp_path: Path, stage: str) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", _by_stage).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            ends = Ends(plane)
            made = await _at(plane, stage, ends, engine)
            told = len(ends.told)
            for _ in range(2):
                made.cancel()
                assert made.running_on is None
            made.start()
            for other in ends.calls:
                other.cancel()
            await ends.over(told)
            await eventually(lambda: engine.open == int(stage == "over"))
            if stage not in ("new", "refused", "over"):
                assert {(one.status, one.code) for one in plane.records} == {(499, "client_cancelled")}

    run(main())


@pytest.mark.parametrize("stage", ["queued", "connecting", "waiting", "receiving"])
def test_others_can_cancel_it_and_its_owner_hears_of_it(tmp_path: Path, stage: str) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", _by_stage).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            ends = Ends(plane)
            made = await _at(plane, stage, ends, engine)
            listed = plane.gateway.inflight.list()[-1]
            assert (listed.id, listed.path, listed.method) == (made.request_id, COMPLETIONS, "POST")
            assert plane.gateway.inflight.cancel(listed.id)
            (failure,) = ends.told
            assert code_of(failure) == "cancelled"
            assert isinstance(failure, Failure)
            assert failure.sent == (stage in ("waiting", "receiving"))
            assert failure.launch_id == (None if stage == "queued" else LAUNCH)
            for other in ends.calls:
                other.cancel()
            await ends.over(1)
            assert plane.records[0].code == "cancelled"

    run(main())


@pytest.mark.parametrize("how", ["drain", "close"])
def test_the_daemon_stops(tmp_path: Path, how: str) -> None:
    go = asyncio.Event()

    async def script(visit: Visit) -> None:
        await go.wait()
        await visit.send(answer())

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            ends = Ends(plane)
            await _at(plane, "queued", ends, engine)
            getattr(plane.gateway, how)()
            await eventually(lambda: len(ends.told) == (2 if how == "close" else 1))
            assert code_of(await ends.end()) == "draining"
            assert {code_of(end) for end in ends.told} == {"draining"}
            go.set()
            await ends.over(3)
            assert isinstance(ends.told[-1], Reply) == (how == "drain")

    run(main())


@pytest.mark.parametrize("cuts", [False, True])
def test_a_key_that_is_revoked(tmp_path: Path, cuts: bool) -> None:
    async def main() -> None:
        limits = GatewayLimits(revoked_keys_cut_streams=cuts)
        async with running(tmp_path, limits) as plane, RawUpstream(tmp_path / "e", holding).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            ends = Ends(plane)
            await _at(plane, "queued", ends, engine)
            _take_away(plane, "bulk")
            assert [code_of(end) for end in ends.told] == ["invalid_api_key"] * (1 + cuts)
            for one in ends.calls:
                one.cancel()
            await ends.over(1 + cuts)

    run(main())


def test_a_key_that_expires_or_loses_a_right_while_it_waits(tmp_path: Path) -> None:
    async def main() -> None:
        short = Principal("short", frozenset({"batch"}), expires_at=math.inf)
        limits = GatewayLimits(header_timeout_s=0.1)
        keys = {**KEYS, "sk-short": short}
        async with (
            running(tmp_path, limits, keys=keys) as plane,
            RawUpstream(tmp_path / "e", holding).running() as engine,
        ):
            plane.announce(instance(engine.endpoint, slots=1))
            ends = Ends(plane)
            first = ends.start()
            await eventually(lambda: len(engine.requests) == 1)
            ends.start(principal=short)
            ring = plane.gateway.guard._keys
            key = next(one for one in ring._shared if one.principal.name == "short")
            ring._by_name["short"] = Key(key.digest, Principal("short", frozenset({"monitor"})))
            await eventually(lambda: len(ends.told) == 1)  # by the sweep: nobody has said that keys were changed
            assert code_of(ends.told[0]) == "insufficient_scope"
            first.cancel()
            await ends.over(1)

    run(main())


def _take_away(plane: Plane, name: str) -> None:
    keys = plane.gateway.guard._keys
    keys._shared = tuple(key for key in keys._shared if key.principal.name != name)
    keys.reload()


# Our own mistakes

MISTAKES = [
    "vllm_bootstrap.gateway.call.JsonIntake",
    "vllm_bootstrap.gateway.call.BodyTap",
    "vllm_bootstrap.gateway.call.ticket_of",
    "vllm_bootstrap.gateway.passage.render",
    "vllm_bootstrap.gateway.inflight.Inflight.add",
    "vllm_bootstrap.gateway.pool.Pool.take",
    "vllm_bootstrap.gateway.upstream.UpstreamConnection.start",
    "vllm_bootstrap.gateway.upstream.UpstreamConnection.release",
    "vllm_bootstrap.scheduler.gate.Gate.request",
    "vllm_bootstrap.scheduler.gate.Lease.settle",
    "vllm_bootstrap.gateway.journey.Journey.spent",
]


@pytest.mark.interpreted
@pytest.mark.parametrize("place", MISTAKES)
def test_a_mistake_of_ours_is_told_and_costs_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def mistake(*_: Any, **__: Any) -> Any:
        raise RuntimeError("injected")

    async def script(visit: Visit) -> None:
        await visit.send(answer(USAGE))

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            ends = Ends(plane)
            await ends.reply()
            with monkeypatch.context() as broken:
                broken.setattr(place, mistake)
                assert code_of(await ends.end()) == "internal_error"
            await leaves_nothing(plane)
            assert not plane.gateway.calls
            await ends.reply()
            assert (await plane.ask(raw_body=json.dumps(BODY).encode())).status == 200

    run(main())


def test_a_client_and_a_call_of_one_id_are_two(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", holding).running() as engine:
            plane.announce(instance(engine.endpoint))
            ends = Ends(plane)
            wire = await plane.connect()
            await wire.send(request(headers=[("X-Request-Id", "mine")]))
            await eventually(lambda: len(engine.requests) == 1)
            made = ends.start(request_id="mine")
            await eventually(lambda: len(engine.requests) == 2)
            first, second = (visit.header(b"x-request-id")[0] for visit in engine.requests)
            assert first != second
            made.cancel()
            assert len(plane.gateway.inflight) == 1
            wire.close()
            await leaves_nothing(plane)

    run(main())
