"""Requests for a model that must be loaded first: how long they wait, and what those who await a stream hear."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.integration.gateway.test_places import leaves_nothing
from tests.integration.gateway.test_simulator import simulating
from tests.support.aio import eventually
from tests.support.data_plane import KEYS, LAUNCH, Plane, Wire, instance, request, run, running
from tests.support.raw_upstream import EVENTS, LAST_CHUNK, RawUpstream, Visit, answer, chunk
from vllm_bootstrap.auth.keyfile import digest
from vllm_bootstrap.auth.keys import Key
from vllm_bootstrap.engines.routes import vllm_routes
from vllm_bootstrap.errors import Unavailable
from vllm_bootstrap.gateway import GatewayLimits, loading
from vllm_bootstrap.gateway.call import Call, Failure, Reply
from vllm_bootstrap.scheduler.gate import ByModel
from vllm_bootstrap.scheduler.ports import NoProspects
from vllm_bootstrap.serving import RequestClass

STREAM = {"model": "model", "prompt": "x", "stream": True}
TOKEN = b'data: {"choices":[{"text":"a"}]}\n\n'
DONE = b"data: [DONE]\n\n"
PROGRESS = [("X-Cold-Start", "progress")]
OFTEN = GatewayLimits(upstream_keep_alive_s=0.04)  # deadlines are looked at a hundred times a second
WITH_HOLDS = {
    **KEYS,
    "sk-patient": replace(KEYS["sk-realtime"], name="patient", cold_start_hold_s=60.0),
    "sk-hasty": replace(KEYS["sk-realtime"], name="hasty", cold_start_hold_s=0.0),
}


class Hope(NoProspects):
    """``model`` may be loaded."""

    def __init__(self) -> None:
        self.asked_for: list[tuple[str, RequestClass]] = []

    def base_of(self, name: str) -> str | None:
        return "org/model" if name == "model" else None

    def asked(self, name: str, cls: RequestClass, *, comes_back: bool = False) -> None:
        self.asked_for.append((name, cls))

    def ready_in_s(self, name: str) -> float | None:
        return 17.0


class Line:
    """What is told about the load."""

    def __init__(self, text: str | None = "loading model: 1 %") -> None:
        self.text = text

    def __call__(self, name: str) -> str | None:
        assert name == "model"
        return self.text


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "FIRST_AFTER_S", 0.02)
    monkeypatch.setattr(loading, "PAUSE_S", 0.02)


@contextlib.asynccontextmanager
async def cold(tmp: Path, **more: Any) -> AsyncIterator[tuple[Plane, Hope]]:
    hope = Hope()
    async with running(tmp, OFTEN, keys=WITH_HOLDS, prospects=hope, **more) as plane:
        yield plane, hope


# How long it waits


@pytest.mark.parametrize(("key", "word"), [("sk-realtime", "error"), ("sk-hasty", None), ("sk-patient", "error")])
def test_who_does_not_wait_is_told_when_to_come_again_and_the_load_begins(
    tmp_path: Path, key: str, word: str | None
) -> None:
    async def main() -> None:
        async with cold(tmp_path) as (plane, hope):
            reply = await plane.ask(key=key, headers=[("X-Cold-Start", word)] if word else [])
            assert (reply.status, reply.code, reply.header("retry-after")) == (503, "model_loading", "17")
            assert hope.asked_for == [("model", "realtime")]
            await leaves_nothing(plane)

    run(main())


@pytest.mark.parametrize(
    ("key", "word", "status"),
    [
        ("sk-realtime", None, 503),
        ("sk-realtime", "wait", 503),
        ("sk-hasty", "wait", 503),
        ("sk-patient", None, 200),
        ("sk-patient", "wait", 200),
    ],
)
def test_who_waits_does_so_as_long_as_its_key_or_else_the_daemon_says(
    tmp_path: Path, key: str, word: str | None, status: int
) -> None:
    async def main() -> None:
        async with cold(tmp_path, hold_s=0.1) as (plane, _), RawUpstream(tmp_path / "e").running() as engine:
            headers = [("X-Cold-Start", word)] if word else []
            asking = asyncio.create_task(plane.ask(key=key, headers=headers))
            await eventually(lambda: plane.queued() == 1)
            await asyncio.sleep(0.3)
            assert asking.done() is (status == 503)
            plane.announce(instance(engine.endpoint))
            reply = await asking
            assert reply.status == status
            if status == 200:
                assert not engine.requests[0].header(b"x-cold-start")
            await leaves_nothing(plane)

    run(main())


def test_a_head_that_comes_again_keeps_what_it_says_about_cold_starts(tmp_path: Path) -> None:
    async def main() -> None:
        async with cold(tmp_path, hold_s=60) as (plane, hope):
            wire = await plane.connect()
            for number in range(4):
                await wire.send(request(headers=[("X-Cold-Start", "error")]))
                assert (await wire.reply()).code == "model_loading"
                assert len(hope.asked_for) == number + 1
            await wire.send(request(headers=[("X-Cold-Start", "wait")]))
            await eventually(lambda: plane.queued() == 1)

    run(main())


def test_a_key_that_changes_is_waited_for_otherwise(tmp_path: Path) -> None:
    async def main() -> None:
        async with cold(tmp_path, hold_s=60) as (plane, _):
            wire = await plane.connect()
            await wire.send(request(key="sk-hasty"))
            assert (await wire.reply()).status == 503
            keys = plane.gateway.guard._keys
            keys._shared = (Key(digest("sk-hasty"), replace(WITH_HOLDS["sk-hasty"], cold_start_hold_s=None)),)
            keys.reload()
            await wire.send(request(key="sk-hasty"))
            await eventually(lambda: plane.queued() == 1)

    run(main())


def test_an_unknown_word_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with cold(tmp_path) as (plane, hope):
            reply = await plane.ask(headers=[("X-Cold-Start", "later")])
            assert (reply.status, reply.json["error"]["param"]) == (400, "x-cold-start")
            assert not hope.asked_for

    run(main())


def test_batches_wait_for_as_long_as_it_takes(tmp_path: Path) -> None:
    async def main() -> None:
        async with cold(tmp_path, hold_s=0.05) as (plane, hope), RawUpstream(tmp_path / "e").running() as engine:
            told: list[Reply | Failure] = []
            body = json.dumps({"model": "model", "prompt": "x"}).encode()
            Call(plane.gateway, KEYS["sk-batch"], ByModel("model"), "/v1/completions", body, on_end=told.append).start()
            await asyncio.sleep(0.3)
            assert (told, hope.asked_for) == ([], [("model", "batch")])
            plane.announce(instance(engine.endpoint))
            await eventually(lambda: bool(told))
            assert isinstance(told[0], Reply)
            await leaves_nothing(plane)

    run(main())


# What is said meanwhile


async def streaming(visit: Visit) -> None:
    await visit.send(EVENTS, chunk(TOKEN), chunk(TOKEN + DONE), LAST_CHUNK)


async def first(wire: Wire, body: Any = STREAM, *, path: str = "/v1/completions", headers: Any = PROGRESS) -> bytes:
    """Ask, and return the head that comes while the model is being loaded."""
    await wire.send(request(path=path, body=body, headers=headers))
    status, _, raw = await wire.head()
    assert status == 200
    return raw


async def comments(chunks: AsyncIterator[bytes], number: int) -> list[bytes]:
    return [await anext(chunks) for _ in range(number)]


def test_a_stream_hears_how_the_load_goes_and_then_its_engine(tmp_path: Path) -> None:
    async def main() -> None:
        line = Line()
        upstream = RawUpstream(tmp_path / "e", streaming)
        async with cold(tmp_path, hold_s=0.01, progress_of=line) as (plane, _), upstream.running() as engine:
            wire = await plane.connect()
            raw = await first(wire)
            lines = raw.decode().split("\r\n")[:-2]
            names = [one.partition(":")[0] for one in lines[1:]]
            assert lines[0] == "HTTP/1.1 200 OK"
            assert names == ["content-type", "x-request-id", "x-accel-buffering", "date", "transfer-encoding"]
            assert "content-type: text/event-stream; charset=utf-8" in lines
            chunks = wire.chunks()
            assert await comments(chunks, 1) == [b": loading model: 1 %\n\n"]
            line.text = "loading model: 45 %, about 12 s left"
            assert await comments(chunks, 1) == [b": loading model: 45 %, about 12 s left\n\n"]
            (info,) = plane.gateway.inflight.list()
            assert (info.state, info.stream) == ("queued", True)
            plane.announce(instance(engine.endpoint))
            assert b"".join([piece async for piece in chunks]) == TOKEN + TOKEN + DONE
            await eventually(lambda: bool(plane.records))
            record = plane.records[0]
            assert (record.status, record.code, record.launch_id, record.completion_tokens) == (200, None, LAUNCH, 3)
            # The same connection goes on.
            await wire.send(request())
            engine.script = None
            assert (await wire.reply()).header("x-launch-id") == LAUNCH
            await leaves_nothing(plane)

    run(main())


@pytest.mark.parametrize(
    ("body", "path", "headers"),
    [
        ({**STREAM, "stream": False}, "/v1/completions", PROGRESS),
        (STREAM, "/v1/completions", []),
        (STREAM, "/v1/embeddings", PROGRESS),
    ],
)
def test_who_awaits_no_stream_or_has_not_asked_is_answered_as_ever(
    tmp_path: Path, body: Any, path: str, headers: Any
) -> None:
    async def main() -> None:
        async with cold(tmp_path, progress_of=Line()) as (plane, _), RawUpstream(tmp_path / "e").running() as engine:
            asking = asyncio.create_task(plane.ask("POST", path, body, headers=headers))
            await eventually(lambda: plane.queued() == 1)
            await asyncio.sleep(0.2)
            plane.announce(instance(engine.endpoint))
            reply = await asking
            assert (reply.status, reply.header("x-launch-id"), reply.body) == (200, LAUNCH, b"{}")

    run(main())


def test_nothing_is_said_while_others_come_first(tmp_path: Path) -> None:
    async def main() -> None:
        async def slow(visit: Visit) -> None:
            await visit.gone()

        upstream = RawUpstream(tmp_path / "e", slow)
        async with cold(tmp_path, progress_of=Line(None)) as (plane, _), upstream.running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            busy = await plane.connect()
            await busy.send(request())
            await eventually(lambda: len(engine.requests) == 1)
            engine.script = streaming
            asking = asyncio.create_task(plane.ask(body=STREAM, headers=PROGRESS))
            await eventually(lambda: plane.queued() == 1)
            await asyncio.sleep(0.2)
            busy.close()
            reply = await asking
            assert (reply.header("x-launch-id"), reply.body) == (LAUNCH, TOKEN + TOKEN + DONE)

    run(main())


def test_a_model_can_want_that_all_its_streams_are_told(tmp_path: Path) -> None:
    async def main() -> None:
        shown = frozenset({"model"}).__contains__
        upstream = RawUpstream(tmp_path / "e", streaming)
        async with (
            cold(tmp_path, hold_s=0.01, progress_of=Line(), wants_progress=shown) as (plane, _),
            upstream.running() as engine,
        ):
            wire = await plane.connect()
            await first(wire, headers=[])
            chunks = wire.chunks()
            await comments(chunks, 1)
            plane.announce(instance(engine.endpoint))
            assert b"".join([piece async for piece in chunks]) == TOKEN + TOKEN + DONE
            await leaves_nothing(plane)

    run(main())


def test_an_old_client_gets_the_same_without_chunks(tmp_path: Path) -> None:
    async def main() -> None:
        upstream = RawUpstream(tmp_path / "e", streaming)
        async with cold(tmp_path, progress_of=Line()) as (plane, _), upstream.running() as engine:
            wire = await plane.connect()
            await wire.send(request(body=STREAM, headers=PROGRESS).replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1))
            _, headers, _ = await wire.head()
            fields = dict(headers)
            assert fields[b"connection"] == b"close"
            assert b"transfer-encoding" not in fields
            plane.announce(instance(engine.endpoint))
            assert await wire.at_end() == b": loading model: 1 %\n\n" + TOKEN + TOKEN + DONE
            await leaves_nothing(plane)

    run(main())


def test_a_stream_with_a_length_and_one_that_ends_with_its_connection(tmp_path: Path) -> None:
    async def main() -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"

        async def whole(visit: Visit) -> None:
            await visit.send(head + b"content-length: %d\r\n\r\n" % len(TOKEN + DONE), TOKEN + DONE)

        async def until_closed(visit: Visit) -> None:
            await visit.send(head + b"\r\n" + TOKEN + DONE)
            visit.writer.close()

        for number, script in enumerate((whole, until_closed)):
            upstream = RawUpstream(tmp_path / f"e{number}", script)
            async with cold(tmp_path, progress_of=Line()) as (plane, _), upstream.running() as engine:
                wire = await plane.connect()
                await first(wire)
                chunks = wire.chunks()
                await comments(chunks, 1)
                plane.announce(instance(engine.endpoint))
                assert b"".join([piece async for piece in chunks]) == TOKEN + DONE

    run(main())


def test_what_a_key_has_left_is_told_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with cold(tmp_path, progress_of=Line()) as (plane, _):
            wire = await plane.connect()
            await wire.send(request(body=STREAM, key="sk-slow", headers=PROGRESS))
            _, headers, _ = await wire.head()
            assert dict(headers)[b"x-ratelimit-remaining-requests"] == b"1"

    run(main())


def test_where_a_model_is_there_nothing_is_said_of_loads(tmp_path: Path) -> None:
    async def main() -> None:
        upstream = RawUpstream(tmp_path / "e", streaming)
        async with cold(tmp_path, progress_of=Line()) as (plane, _), upstream.running() as engine:
            plane.announce(instance(engine.endpoint))
            for prefix in ("", f"/proxy/{LAUNCH}"):
                reply = await plane.ask("POST", prefix + "/v1/completions", STREAM, headers=PROGRESS)
                assert (reply.header("x-launch-id"), reply.body) == (LAUNCH, TOKEN + TOKEN + DONE)
                assert not engine.requests[-1].header(b"x-cold-start")

    run(main())


def test_the_stock_client_reads_past_what_is_said(tmp_path: Path) -> None:
    async def main() -> None:
        async with cold(tmp_path, progress_of=Line()) as (plane, _), simulating(tmp_path) as endpoint:
            url = f"http://127.0.0.1:{plane.port}/v1"
            async with AsyncOpenAI(base_url=url, api_key="sk-realtime", max_retries=0) as client:
                stream = await client.chat.completions.create(  # its head is there before there is an engine
                    model="model",
                    messages=[{"role": "user", "content": "one two three"}],
                    stream=True,
                    extra_headers=dict(PROGRESS),
                )
                plane.announce(instance(endpoint, routes=vllm_routes()))
                said = [piece.choices[0].delta.content or "" async for piece in stream if piece.choices]
                assert "".join(said).strip()

    run(main())


# How it can end otherwise


def event(piece: bytes) -> Any:
    assert piece.endswith(b"\n\n")
    return json.loads(piece.partition(b"data: ")[2])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_load_that_fails_ends_the_stream_with_an_error_event(tmp_path: Path, path: str) -> None:
    async def main() -> None:
        async with cold(tmp_path, progress_of=Line()) as (plane, _):
            wire = await plane.connect()
            await first(wire, path=path)
            chunks = wire.chunks()
            await comments(chunks, 1)
            plane.gate.refuse("model", Unavailable("out of memory"))
            (last,) = [piece async for piece in chunks]
            assert event(last)["error"]["message"] == "out of memory"
            assert last.startswith(b"event: error\n") is path.endswith("messages")
            await eventually(lambda: bool(plane.records))
            assert (plane.records[0].status, plane.records[0].code) == (200, "overloaded")
            await leaves_nothing(plane)

    run(main())


def test_a_hold_that_ends_is_told_in_the_stream(tmp_path: Path) -> None:
    async def main() -> None:
        keys = {"sk-brief": replace(KEYS["sk-realtime"], cold_start_hold_s=0.3)}
        hope, line = Hope(), Line()
        async with running(tmp_path, OFTEN, keys=keys, prospects=hope, progress_of=line) as plane:
            wire = await plane.connect()
            await wire.send(request(body=STREAM, key="sk-brief", headers=PROGRESS))
            await wire.head()
            *_, last = [piece async for piece in wire.chunks()]
            assert event(last)["error"]["code"] == "model_loading"
            await leaves_nothing(plane)

    run(main())


TOO_LONG = b'{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}'


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (answer(TOO_LONG, status=b"400 Bad Request"), "too long"),
        (answer(b"no words", status=b"500 Oops"), "The engine answered 500 and no stream"),
        (answer(b'{"choices":[]}'), "The engine answered 200 and no stream"),
        (answer(b"x" * 200_000, status=b"500 Oops"), "The engine answered 500 and no stream"),
    ],
)
def test_an_engine_that_refuses_is_heard_in_the_stream(tmp_path: Path, answers: bytes, message: str) -> None:
    async def main() -> None:
        async def refusing(visit: Visit) -> None:
            await visit.send(answers[:150])
            await asyncio.sleep(0.02)
            await visit.send(answers[150:])

        upstream = RawUpstream(tmp_path / "e", refusing)
        async with cold(tmp_path, progress_of=Line()) as (plane, _), upstream.running() as engine:
            wire = await plane.connect()
            await first(wire)
            chunks = wire.chunks()
            await comments(chunks, 1)
            plane.announce(instance(engine.endpoint))
            (last,) = [piece async for piece in chunks]
            assert event(last)["error"]["message"] == message
            await leaves_nothing(plane)

    run(main())


@pytest.mark.parametrize("when", ["before its head", "after its head", "in the middle"])
def test_an_engine_that_breaks_ends_the_stream_with_an_error_event(tmp_path: Path, when: str) -> None:
    async def main() -> None:
        async def breaking(visit: Visit) -> None:
            if when != "before its head":
                await visit.send(EVENTS)
            if when == "in the middle":
                await visit.send(chunk(TOKEN))
                await asyncio.sleep(0.02)
            visit.cut()

        upstream = RawUpstream(tmp_path / "e", breaking)
        async with cold(tmp_path, progress_of=Line()) as (plane, _), upstream.running() as engine:
            wire = await plane.connect()
            await first(wire)
            chunks = wire.chunks()
            await comments(chunks, 1)
            plane.announce(instance(engine.endpoint))
            *before, last = [piece async for piece in chunks]
            assert b"".join(before) == (TOKEN if when == "in the middle" else b"")
            assert event(last)["error"]["code"] == "upstream_error"
            assert DONE not in last
            await leaves_nothing(plane)

    run(main())


def test_an_engine_that_is_not_there_is_waited_for_again(tmp_path: Path) -> None:
    """What has been said does not bind the request to the first engine."""

    async def main() -> None:
        upstream = RawUpstream(tmp_path / "e", streaming)
        async with cold(tmp_path, progress_of=Line()) as (plane, _), upstream.running() as engine:
            wire = await plane.connect()
            await first(wire)
            gone = replace(engine.endpoint, uds=str(tmp_path / "gone"))
            plane.announce(instance(gone, "l00000000000000000002"), instance(engine.endpoint))
            pieces = [piece async for piece in wire.chunks()]
            assert b"".join(pieces).endswith(TOKEN + TOKEN + DONE)
            await leaves_nothing(plane)

    run(main())


@pytest.mark.parametrize("how", ["client", "revoked", "drain", "close", "cancel"])
def test_whatever_ends_it_while_it_waits_leaves_nothing(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        async with cold(tmp_path, progress_of=Line()) as (plane, _):
            wire = await plane.connect()
            await first(wire)
            chunks = wire.chunks()
            await comments(chunks, 1)
            code = {"revoked": "invalid_api_key", "cancel": "cancelled"}.get(how, "draining")
            if how == "client":
                wire.close()
                code = "client_cancelled"
            elif how == "revoked":
                plane.gateway.guard._keys._shared = ()
                plane.gateway.guard._keys.reload()
            elif how == "cancel":
                assert plane.gateway.inflight.cancel(plane.gateway.inflight.list()[0].id)
            else:
                getattr(plane.gateway, how)()
            if how != "client":
                (last,) = [piece async for piece in chunks]
                assert event(last)["error"]["code"] == code
            await eventually(lambda: bool(plane.records))
            assert plane.records[0].code == code
            assert plane.records[0].status == (499 if how == "client" else 200)
            await leaves_nothing(plane)

    run(main())


def test_a_client_that_does_not_read_is_told_no_more(tmp_path: Path) -> None:
    async def main() -> None:
        line = Line()
        async with cold(tmp_path, progress_of=line) as (plane, _):
            wire = await plane.connect()
            await first(wire)
            (connection,) = plane.gateway.connections
            connection.pause_writing()  # type: ignore[attr-defined]
            await asyncio.sleep(0.05)
            line.text = "loading model: 2 %"
            chunks = wire.chunks()
            await comments(chunks, 1)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(chunks), 0.2)

    run(main())


# Real engines


def test_a_simulator_that_comes_up_while_streams_wait(tmp_path: Path) -> None:
    async def main() -> None:
        line = Line()
        chat = {"model": "model", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "stream": True}
        bodies = {
            "/v1/chat/completions": chat,
            "/v1/completions": {"model": "model", "prompt": "a", "max_tokens": 5, "stream": True},
            "/v1/responses": {"model": "model", "input": "hello", "stream": True},
            "/v1/messages": chat,
        }
        async with cold(tmp_path, progress_of=line) as (plane, _):
            wires = {path: await plane.connect() for path in bodies}
            for path, body in bodies.items():
                await first(wires[path], body, path=path)
            async with simulating(tmp_path) as endpoint:
                line.text = None
                plane.announce(instance(endpoint, routes=vllm_routes()))
                for path, wire in wires.items():
                    said = b"".join([piece async for piece in wire.chunks()])
                    assert said.startswith(b": loading model: 1 %\n\n"), path
                    events = [one for one in said.split(b"\n\n") if not one.startswith(b":")]
                    assert len(events) >= 3, path
                    assert b'"error"' not in said, path
                await leaves_nothing(plane)
                assert all(record.status == 200 and record.completion_tokens for record in plane.records)

    run(main())
