"""Answers on their way to the client: byte for byte, without waiting, no faster than the client reads."""

from __future__ import annotations

import asyncio
import gzip
from dataclasses import fields
from pathlib import Path

import pytest

from tests.support.aio import eventually
from tests.support.data_plane import LAUNCH, instance, request, run, running
from tests.support.raw_upstream import EVENTS, LAST_CHUNK, RawUpstream, Visit, answer, chunk
from vllm_bootstrap.gateway import GatewayLimits

STREAM = 'data: {"é": "日本"}\r\n\r\ndata: x\n\n: comment\n\ndata: [DONE]\n\n'.encode()


def pieces(raw: bytes, size: int) -> list[bytes]:
    return [raw[at : at + size] for at in range(0, len(raw), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_bytes_are_the_same_wherever_they_are_cut(tmp_path: Path, size: int, framing: str) -> None:
    head = {
        "chunked": EVENTS,
        "length": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(STREAM),
        "close": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n",
    }[framing]
    body = b"".join(map(chunk, pieces(STREAM, size))) + LAST_CHUNK if framing == "chunked" else STREAM

    async def script(visit: Visit) -> None:
        for piece in pieces(head + body, size):
            await visit.send(piece)
        if framing == "close":
            visit.writer.close()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            for raw in (request(), request().replace(b"HTTP/1.1", b"HTTP/1.0")):
                async with plane.wire() as wire:
                    await wire.send(raw)
                    reply = await wire.reply()
                    assert reply.body == STREAM
                    assert reply.header("x-accel-buffering") == "no"
                    assert reply.all("content-length") == ([str(len(STREAM))] if framing == "length" else [])
            assert plane.in_use() == 0
            assert plane.records[-1].bytes_out == len(STREAM)

    run(main())


def test_each_answer_has_its_own_date_and_length(tmp_path: Path) -> None:
    """Engines' heads are known by heart but for these."""
    bodies = iter((b"{}", b"[1,2]", b"[]"))
    dates = iter((b"date: Sat\r\n", b"Date: Sun\r\n", b"date: Mon\r\nconnection: date\r\n"))

    async def script(visit: Visit) -> None:
        body = next(bodies)
        head = b"HTTP/1.1 200 OK\r\nserver: x\r\n%bcontent-length: %d\r\n\r\n" % (next(dates), len(body))
        await visit.send(head + body)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            replies = [await plane.ask() for _ in range(3)]
            assert [reply.body for reply in replies] == [b"{}", b"[1,2]", b"[]"]
            assert [reply.all("date") for reply in replies] == [["Sat"], ["Sun"], []]
            assert [reply.all("content-length") for reply in replies] == [["2"], ["5"], ["2"]]
            assert [reply.all("server") for reply in replies] == [["x"]] * 3

    run(main())


def test_each_chunk_goes_on_at_once(tmp_path: Path) -> None:
    steps: asyncio.Queue[bytes] = asyncio.Queue()

    async def script(visit: Visit) -> None:
        await visit.send(EVENTS)
        while piece := await steps.get():
            await visit.send(chunk(piece))
        await visit.send(LAST_CHUNK)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                await wire.send(request())
                assert (await wire.head())[0] == 200  # before there is any event
                chunks = wire.chunks()
                sent = 0
                for number in range(20):
                    event = b"data: %b %d\n\n" % (b"x" * 20 * number, number)
                    sent += len(event)
                    steps.put_nowait(event)
                    assert await anext(chunks) == event
                steps.put_nowait(b"")
                assert [one async for one in chunks] == []
                await eventually(lambda: len(plane.records) == 1)
                assert (plane.records[0].bytes_out, plane.records[0].status) == (sent, 200)
                # and after all that has passed the parser by, it reads the next answer
                steps.put_nowait(b"")
                await wire.send(request())
                assert (await wire.reply()).body == b""
            assert engine.connections == engine.open == 1  # kept

    run(main())


def test_large_events_and_compressed_answers(tmp_path: Path) -> None:
    event = b"data: " + b"x" * 5_000_000 + b"\n\n"
    packed = gzip.compress(b"compressed" * 1000)

    async def script(visit: Visit) -> None:
        if b"big" in visit.body:
            await visit.send(EVENTS, chunk(event), LAST_CHUNK)
        else:
            await visit.send(answer(packed, headers=b"content-encoding: gzip\r\n"))

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            assert (await plane.ask(body={"model": "model", "prompt": "big"})).body == event
            reply = await plane.ask(headers=[("Accept-Encoding", "gzip")])
            assert reply.body == packed
            assert reply.header("content-encoding") == "gzip"
            assert engine.requests[-1].header(b"accept-encoding") == [b"gzip"]

    run(main())


@pytest.mark.parametrize(
    ("raw", "status", "body", "length"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", None),
        (b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n", 204, b"", None),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 50\r\n\r\n", 304, b"", "50"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nlink: x\r\n\r\n" + answer(b"late"), 200, b"late", "4"),
        (b"HTTP/1.1 100 Continue\r\ncontent-length: 0\r\n\r\n" + answer(b"late"), 200, b"late", "4"),
        (answer(b""), 200, b"", "0"),
        (answer(b"no", status=b"400 Bad"), 400, b"no", "2"),
        (answer(b"no", status=b"599 Odd"), 599, b"no", "2"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 200, b"", None),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", 200, b"ok", "2"),
    ],
)
def test_answers_of_every_shape(tmp_path: Path, raw: bytes, status: int, body: bytes, length: str | None) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(raw)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                for _ in range(2):
                    await wire.send(request())
                    reply = await wire.reply()
                    assert (reply.status, reply.body, reply.header("content-length")) == (status, body, length)
                    assert reply.header("link") is None

    run(main())


def test_the_engines_own_errors_pass_unwrapped_and_its_hop_by_hop_headers_do_not(tmp_path: Path) -> None:
    own = b'{"error":{"message":"bad","type":"BadRequestError","code":400}}'
    extra = (
        b"connection: x-secret, keep-alive\r\nx-secret: 1\r\nkeep-alive: timeout=5\r\nset-cookie: a=b\r\n"
        b"access-control-allow-origin: *\r\nx-request-id: engine\r\nx-launch-id: engine\r\nserver: uvicorn\r\n"
    )

    async def script(visit: Visit) -> None:
        await visit.send(answer(own, status=b"400 Bad Request", headers=extra))

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            reply = await plane.ask()
            assert (reply.status, reply.body) == (400, own)
            names = {name for name, _ in reply.headers}
            assert not names & {
                b"x-secret",
                b"keep-alive",
                b"set-cookie",
                b"access-control-allow-origin",
                b"connection",
            }
            assert reply.all("x-launch-id") == [LAUNCH]
            assert len(reply.all("x-request-id")) == 1
            assert reply.header("server") == "uvicorn"

    run(main())


def test_trailers(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\nSet-Cookie: a\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                await wire.send(request() + request(headers=[("Connection", "close")]))
                raw = await wire.at_end()
                assert raw.count(b"2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n") == 2

    run(main())


def test_a_slow_reader_holds_up_only_its_own_engine_connection(tmp_path: Path) -> None:
    sent = 0

    async def script(visit: Visit) -> None:
        nonlocal sent
        if b"flood" not in visit.body:
            await visit.send(answer())
            return
        await visit.send(EVENTS)
        for _ in range(400):
            await visit.send(chunk(b"x" * 100_000))
            sent += 100_000
        await visit.send(LAST_CHUNK)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                wire.writer.transport.pause_reading()
                await wire.send(request(body={"model": "model", "prompt": "flood"}))
                await eventually(lambda: sent > 0)
                before = -1
                while before != sent:  # until the engine is held up
                    before = sent
                    for _ in range(5):
                        assert (await plane.ask()).status == 200
                assert sent < 20_000_000
                wire.writer.transport.resume_reading()
                assert len((await wire.reply()).body) == 40_000_000
            assert sent == 40_000_000

    run(main())


def test_a_client_that_stops_reading_is_cut(tmp_path: Path) -> None:
    gone = asyncio.Event()

    async def script(visit: Visit) -> None:
        await visit.send(EVENTS)
        try:
            while True:
                await visit.send(chunk(b"x" * 100_000))
        except ConnectionError:
            gone.set()

    async def main() -> None:
        limits = GatewayLimits(write_stall_timeout_s=0.2)
        async with running(tmp_path, limits) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            wire = await plane.connect()
            wire.writer.transport.pause_reading()
            await wire.send(request())
            await asyncio.wait_for(gone.wait(), 10)
            assert plane.in_use() == 0
            assert plane.records[-1].code == "client_cancelled"

    run(main())


def test_a_stream_outlasts_every_limit_as_long_as_it_goes_on(tmp_path: Path) -> None:
    """No limit is on the whole of an answer: as here for a few seconds, so with the usual limits for hours."""
    limits = GatewayLimits(
        header_timeout_s=0.3, body_timeout_s=0.3, keep_alive_s=0.3, write_stall_timeout_s=0.3, client_dead_after_s=0.3,
        upstream_connect_timeout_s=0.3, upstream_first_byte_timeout_s=0.3, upstream_idle_timeout_s=0.3,
        upstream_keep_alive_s=0.3,
    )  # fmt: skip
    times = [value for item in fields(limits) if item.name.endswith("_s") for value in [getattr(limits, item.name)]]
    assert max(times) < 1
    lasts_s = 2 * sum(times)
    events: list[bytes] = []

    async def script(visit: Visit) -> None:
        await visit.send(EVENTS)
        loop = asyncio.get_running_loop()
        began = loop.time()
        while loop.time() - began < lasts_s:
            events.append(b"data: %d\n\n" % len(events))
            await visit.send(chunk(events[-1]))
            await asyncio.sleep(0.02)
        events.append(b"data: [DONE]\n\n")
        await visit.send(chunk(events[-1]), LAST_CHUNK)

    async def main() -> None:
        async with (
            running(tmp_path, limits, queue_timeout_s=0.3, hold_s=0.3) as plane,
            RawUpstream(tmp_path / "e", script).running() as engine,
        ):
            plane.announce(instance(engine.endpoint))
            reply = await plane.ask(body={"model": "model", "prompt": "x", "stream": True})
            assert (reply.status, reply.body) == (200, b"".join(events))
            assert [record.code for record in plane.records] == [None]
            assert plane.records[0].duration_s >= lasts_s

    run(main())


def test_a_slow_engine_is_waited_for_and_a_silent_one_is_not(tmp_path: Path) -> None:
    steps = asyncio.Event()

    async def script(visit: Visit) -> None:
        if b"stream" in visit.body:
            await visit.send(EVENTS, chunk(b"data: 1\n\n"))
            if b"slow" in visit.body:
                for number in range(5):
                    await asyncio.sleep(0.15)  # together longer than the limit, never one pause
                    await visit.send(chunk(b"data: %d\n\n" % number))
                await visit.send(LAST_CHUNK)
        await steps.wait()

    async def main() -> None:
        limits = GatewayLimits(upstream_first_byte_timeout_s=0.6, upstream_idle_timeout_s=0.6)
        async with running(tmp_path, limits) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            slow, silent, stalled = await asyncio.gather(
                plane.ask(body={"model": "model", "prompt": "stream slow"}),
                plane.ask(),
                plane.ask(body={"model": "model", "prompt": "stream"}),
            )
            assert slow.body.endswith(b"data: 4\n\n")
            assert (silent.status, silent.code) == (504, "upstream_timeout")
            assert stalled.body.startswith(b'data: 1\n\ndata: {"error": ')
            assert b"upstream_timeout" in stalled.body
            await eventually(lambda: plane.in_use() == 0)
            assert {record.code for record in plane.records} == {None, "upstream_timeout"}
            steps.set()

    run(main())
