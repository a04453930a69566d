"""Engines that refuse, break, lie or vanish: an honest answer at once, and never the same request twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.aio import eventually
from tests.support.data_plane import LAUNCH, Plane, Wire, advert, certificate, instance, request, run, running
from tests.support.malformed import AFTER_HEADERS, BEFORE_HEADERS, BROKEN, PIECES
from tests.support.raw_upstream import EVENTS, LAST_CHUNK, RawUpstream, Visit, answer, chunk
from vllm_bootstrap.gateway import GatewayLimits
from vllm_bootstrap.gateway.upstream import MAX_RESPONSE_HEAD
from vllm_bootstrap.serving import Endpoint


@pytest.mark.parametrize("name", BEFORE_HEADERS)
def test_what_is_no_answer_is_a_502(tmp_path: Path, name: str) -> None:
    async def script(visit: Visit) -> None:
        with contextlib.suppress(ConnectionError):
            await visit.send(BEFORE_HEADERS[name])
        visit.writer.close()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                for number in (1, 2):
                    await wire.send(request())
                    reply = await wire.reply()
                    assert (reply.status, reply.code) == (502, "upstream_error")
                    assert reply.header("connection") is None
                    assert len(engine.requests) == number  # sent once
            await eventually(lambda: engine.open == 0)
            assert plane.in_use() == 0

    run(main())


@pytest.mark.parametrize("name", AFTER_HEADERS)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_a_broken_stream_ends_with_an_error_event(tmp_path: Path, name: str, path: str) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(AFTER_HEADERS[name])
        visit.cut()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                for _ in range(2):
                    await wire.send(request("POST", path))
                    reply = await wire.reply()
                    assert reply.status == 200
                    *_, last, end = reply.body.split(b"\n\n")
                    assert end == b""
                    assert reply.body.startswith(b"data: 1\n\n")
                    assert b"[DONE]" not in reply.body
                    name_line, _, told = last.rpartition(b"data: ")
                    assert name_line == (b"event: error\n" if path == "/v1/messages" else b"")
                    assert json.loads(told)["error"]["code"] == "upstream_error"
                    assert json.loads(told)["src"] == "vllm-bootstrap"
            assert plane.in_use() == 0
            assert (plane.records[-1].status, plane.records[-1].code) == (200, "upstream_error")

    run(main())


@pytest.mark.parametrize("raw", BROKEN)
def test_any_other_broken_answer_is_cut(tmp_path: Path, raw: bytes) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(raw)
        visit.writer.close()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                await wire.send(request())
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await wire.reply()
            assert plane.in_use() == 0

    run(main())


ENDLESS = {
    "trailers": [b"0\r\n", *[b"x-%d: " % number + b"y" * 8000 + b"\r\n" for number in range(500)], b"\r\n"],
    "one trailer": [b"0\r\nx: ", *[b"y" * 8000] * 500, b"\r\n\r\n"],
    "chunk extension": [b"2;x=", *[b"y" * 8000] * 500, b"\r\nok\r\n0\r\n\r\n"],
}
"""What would be valid if it ended where it does here, 4 MB later."""


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("begin", [PIECES, PIECES + chunk(b"ok"), EVENTS, EVENTS + chunk(b"data: 1\n\n")], ids=range(4))
def test_what_an_engine_sends_beside_a_body_is_bounded(tmp_path: Path, name: str, begin: bytes) -> None:
    async def script(visit: Visit) -> None:
        with contextlib.suppress(ConnectionError):
            await visit.send(begin, *ENDLESS[name])
        await visit.gone()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                await wire.send(request(body={"model": "model", "prompt": "x", "stream": begin.startswith(EVENTS)}))
                told = await wire.at_end() if begin.startswith(PIECES) else (await wire.reply()).body
            assert b"x-1" not in told
            assert (f"sent trailers larger than {MAX_RESPONSE_HEAD} bytes".encode() in told) == begin.startswith(EVENTS)
            await eventually(lambda: engine.open == 0 and plane.in_use() == 0)
            assert [record.code for record in plane.records] == ["upstream_error"]

    run(main())


def test_long_trailers_pass(tmp_path: Path) -> None:
    trailers = b"".join(b"x-%d: " % number + b"y" * 1000 + b"\r\n" for number in range(200))
    assert len(trailers) < MAX_RESPONSE_HEAD

    async def script(visit: Visit) -> None:
        await visit.send(EVENTS + chunk(b"a"), b"0\r\n" + trailers + b"\r\n")

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                await wire.send(request(headers=[("Connection", "close")]))
                told = await wire.at_end()
            assert told.endswith(b"1\r\na\r\n0\r\n" + trailers + b"\r\n")
            assert [record.code for record in plane.records] == [None]

    run(main())


NO_BODY = {
    "204 with a length": b"HTTP/1.1 204 No Content\r\ncontent-length: 2\r\n\r\n",
    "204 in chunks": b"HTTP/1.1 204 No Content\r\ntransfer-encoding: chunked\r\n\r\n",
    "304 with a length": b"HTTP/1.1 304 Not Modified\r\ncontent-length: 2\r\n\r\n",
    "304 in chunks": b"HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n",
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", NO_BODY)
def test_a_body_where_there_can_be_none_is_no_part_of_any_answer(tmp_path: Path, name: str, late: bool) -> None:
    """Announced or sent: the client gets the head alone, and what follows is never taken for the next answer."""
    smuggled = answer(b"smuggled")
    go = asyncio.Event()

    async def script(visit: Visit) -> None:
        if visit.connection > 1:
            await visit.send(answer(b"honest"))
            return
        await visit.send(NO_BODY[name] + (b"" if late else smuggled))
        if late:
            await go.wait()
            with contextlib.suppress(ConnectionError):
                await visit.send(smuggled)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                await wire.send(request())
                reply = await wire.reply()
                assert (reply.status, reply.body) == (int(name[:3]), b"")
                assert reply.header("transfer-encoding") is None
                assert reply.header("content-length") == ("2" if name == "304 with a length" else None)
                await wire.send(request())
                go.set()
                assert (await wire.reply()).body == b"honest"
            assert engine.connections == 2

    run(main())


@pytest.mark.parametrize("extra", [b"more", b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbad"])
def test_what_follows_an_answer_is_never_read_as_another(tmp_path: Path, extra: bytes) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(answer(b"good") + extra)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            for number in (1, 2, 3):
                assert (await plane.ask()).body == b"good"
                assert engine.connections == number
            await eventually(lambda: engine.open == 0)

    run(main())


def test_an_idle_connection_that_speaks_is_dropped(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(answer())
        await asyncio.sleep(0.01)
        await visit.send(answer(b"stray"))

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            await plane.ask()
            await eventually(lambda: engine.open == 0)
            assert (await plane.ask()).body == b"{}"

    run(main())


def test_connections_are_reused_and_given_up_in_time(tmp_path: Path) -> None:
    async def main() -> None:
        limits = GatewayLimits(upstream_keep_alive_s=0.15)
        async with running(tmp_path, limits) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            for _ in range(5):
                await plane.ask()
            assert (engine.connections, engine.open) == (1, 1)
            await eventually(lambda: engine.open == 0)
            await plane.ask()
            assert engine.connections == 2

    run(main())


def test_a_stale_connection_is_tried_once_more_on_a_fresh_one(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        """The first connection answers once; its second request meets a closing server."""
        if visit.connection == 1 and len(engine_requests) > 1:
            visit.cut()
        else:
            await visit.send(answer())

    engine_requests: list[Visit] = []

    async def main() -> None:
        engine = RawUpstream(tmp_path / "e", script, requests=engine_requests)
        async with running(tmp_path) as plane, engine.running():
            plane.announce(instance(engine.endpoint))
            assert (await plane.ask()).status == 200
            assert (await plane.ask()).status == 200
            assert [visit.connection for visit in engine.requests] == [1, 1, 2]
            assert engine.requests[1].body == engine.requests[2].body

    run(main())


def test_what_may_have_killed_an_engine_is_sent_to_no_replica(tmp_path: Path) -> None:
    """It meets a connection that was used before and breaks, which may be mere age; but then nobody listens there."""
    engines: list[RawUpstream] = []
    killed: list[int] = []

    def mortal(number: int) -> RawUpstream:
        async def script(visit: Visit) -> None:
            if b"poison" not in visit.body:
                await visit.send(answer())
                return
            killed.append(number)
            engines[number].path.unlink()
            engines[number].abort_all()

        return RawUpstream(tmp_path / f"e{number}", script)

    async def main() -> None:
        async with running(tmp_path) as plane, contextlib.AsyncExitStack() as stack:
            for number in range(2):
                engine = await stack.enter_async_context(mortal(number).running())
                engines.append(engine)
            plane.announce(
                *(
                    instance(engine.endpoint, launch_id=f"l0000000000000000000{number}", group_id="g")
                    for number, engine in enumerate(engines)
                )
            )
            while not all(engine.open for engine in engines):
                await asyncio.gather(*(plane.ask() for _ in range(4)))
            answered = await plane.ask(body={"model": "model", "prompt": "poison"})
            assert (answered.status, len(killed)) == (502, 1)
            assert (await plane.ask()).status == 200, "the replica is there"

    run(main())


def test_a_request_is_not_repeated_when_it_was_answered_in_part_or_twice_in_vain(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        if b"first" in visit.body:
            await visit.send(answer())
        elif b"part" in visit.body:
            await visit.send(b"HTTP/1.1 200")
            visit.writer.close()
        else:
            visit.cut()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            for prompt, sent in (("part", 1), ("cut", 2)):
                assert (await plane.ask(body={"model": "model", "prompt": "first"})).status == 200
                before = len(engine.requests)
                reply = await plane.ask(body={"model": "model", "prompt": prompt})
                assert (reply.status, reply.code) == (502, "upstream_error")
                assert len(engine.requests) - before == sent
            assert plane.in_use() == 0

    run(main())


def test_an_engine_that_breaks_after_working_for_a_while_is_not_asked_again(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        if b"work" in visit.body:
            await asyncio.sleep(1.05)  # longer than a stale connection takes to show
            visit.cut()
        else:
            await visit.send(answer())

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            await plane.ask()
            reply = await plane.ask(body={"model": "model", "prompt": "work"})
            assert reply.status == 502
            assert len(engine.requests) == 2

    run(main())


def test_engines_that_are_not_there(tmp_path: Path) -> None:
    async def main() -> None:
        limits = GatewayLimits(upstream_connect_timeout_s=0.1)
        async with running(tmp_path, limits) as plane:
            plane.announce(instance(Endpoint(uds=str(tmp_path / "nobody"))))
            reply = await plane.ask()
            assert (reply.status, reply.code) == (502, "upstream_error")
            assert str(tmp_path) not in reply.body.decode()
            # A listener whose queue is full never accepts.
            async with _deaf_listener() as port:
                plane.announce(instance(Endpoint(host="127.0.0.1", port=port)))
                reply = await plane.ask()
                assert (reply.status, reply.code) == (504, "upstream_timeout")
            assert plane.in_use() == 0

    run(main())


@contextlib.asynccontextmanager
async def _deaf_listener() -> AsyncIterator[int]:
    """The port of a listener whose queue is full: connections to it hang."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    waiting = []
    for _ in range(4):
        one = socket.socket()
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            one.connect(listener.getsockname())
        waiting.append(one)
    try:
        yield listener.getsockname()[1]
    finally:
        for one in [listener, *waiting]:
            one.close()


STAGES = ["reading", "queued", "waiting", "before the first chunk", "streaming", "paused", "upload"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_goes_away_frees_everything_within_a_second(tmp_path: Path, stage: str) -> None:
    async def script(visit: Visit) -> None:
        if stage == "before the first chunk":
            await visit.send(EVENTS)
        elif stage == "streaming":
            await visit.send(EVENTS, chunk(b"data: 1\n\n"))
        elif stage == "paused":
            await visit.send(EVENTS)
            with contextlib.suppress(ConnectionError):
                while True:
                    await visit.send(chunk(b"x" * 100_000))
        await visit.gone()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            held = 1 if stage == "queued" else 0
            holder = await plane.connect()
            if held:
                await holder.send(request())
                await eventually(lambda: engine.requests)
            wire = await plane.connect()
            await _bring_to(stage, plane, engine, wire)
            wire.close()
            await eventually(lambda: plane.in_use() == engine.open == held and plane.queued() == 0, 1)
            await eventually(lambda: plane.records)
            assert (plane.records[-1].status, plane.records[-1].code) == (499, "client_cancelled")
            holder.close()
            await _at_rest(plane, engine)

    run(main())


def test_a_client_that_goes_away_while_an_engine_is_being_reached(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, _deaf_listener() as port:
            plane.announce(instance(Endpoint(host="127.0.0.1", port=port)))
            wire = await plane.connect()
            await wire.send(request())
            await eventually(lambda: plane.in_use() == 1)
            wire.close()
            await eventually(lambda: plane.in_use() == 0, 1)
            assert plane.records[-1].code == "client_cancelled"

    run(main())


async def _at_rest(plane: Plane, engine: RawUpstream) -> None:
    await eventually(lambda: plane.in_use() == engine.open == plane.queued() == 0 and not plane.gateway.connections)
    assert plane.gateway.body_bytes == 0
    assert not plane.gateway.inflight.list()


async def _bring_to(stage: str, plane: Plane, engine: RawUpstream, wire: Wire) -> None:
    if stage == "reading":
        await wire.send(request()[:-3])
        await eventually(lambda: plane.gateway.body_bytes)
        return
    if stage == "upload":
        head = [("Content-Type", "multipart/form-data; boundary=b"), ("Content-Length", "9000000")]
        await wire.send(request("POST", "/v1/audio/transcriptions", raw_body=b"", headers=head))
        await wire.send(b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + b"x" * 3_000_000)
        return
    if stage == "paused":
        wire.writer.transport.pause_reading()
    await wire.send(request())
    if stage == "queued":
        await eventually(lambda: plane.queued() == 1)
    else:
        await eventually(lambda: engine.requests)
    if stage in ("before the first chunk", "streaming"):
        await wire.head()
    if stage == "streaming":
        await anext(wire.chunks())
    if stage == "paused":
        await eventually(lambda: any(one.write_paused for one in plane.gateway.connections))  # type: ignore[attr-defined]


def test_many_comings_and_goings_leave_nothing(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        if b"stay" in visit.body:
            await visit.send(EVENTS, chunk(b"data: 1\n\n"))
            await visit.gone()
        else:
            await visit.send(answer())

    async def one(plane: Plane, number: int) -> None:
        async with plane.wire() as wire:
            leaves = number % 3
            await wire.send(request(body={"model": "model", "prompt": "stay" if leaves else "go"}))
            if leaves == 0:
                assert (await wire.reply()).status == 200
            elif leaves == 1:
                await wire.head()

    async def main() -> None:
        async with running(tmp_path, max_queued=1000) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=7))
            before = len(asyncio.all_tasks())
            for _ in range(10):
                await asyncio.gather(*(one(plane, number) for number in range(50)))
            await eventually(lambda: plane.in_use() == plane.queued() == 0 and not plane.gateway.connections)
            await eventually(lambda: engine.open <= 7)
            plane.gate.forget(LAUNCH)
            await eventually(lambda: engine.open == 0)
            await eventually(lambda: len(asyncio.all_tasks()) <= before)
            assert len(plane.records) == 500
            assert not plane.gateway.inflight.list()

    run(main())


def test_a_launch_that_dies_with_many_running_and_queued(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        if b"stream" in visit.body:
            await visit.send(EVENTS, chunk(b"data: 1\n\n"))
        await visit.gone()

    async def main() -> None:
        async with running(tmp_path, max_queued=1000) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=40))
            asked = [plane.ask(body={"model": "model", "prompt": "stream" if n % 2 else "x"}) for n in range(80)]
            tasks = [asyncio.create_task(one) for one in asked]
            await eventually(lambda: len(engine.requests) == 40 and plane.queued() == 40)
            for visit in engine.requests:
                visit.cut()
            plane.gate.update(advert(state="stopping"))
            replies = await asyncio.wait_for(asyncio.gather(*tasks), 5)
            kinds = [(reply.status, reply.code if reply.status != 200 else "event") for reply in replies]
            assert set(kinds) <= {(502, "upstream_error"), (503, "draining"), (200, "event")}
            assert all(b'"upstream_error"' in reply.body for reply in replies if reply.status == 200)
            assert plane.in_use() == plane.queued() == 0
            engine.script = None
            plane.announce(instance(engine.endpoint, slots=40))
            assert (await plane.ask()).status == 200

    run(main())


def test_an_engine_that_answers_before_it_has_read_everything(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(answer(b"too large", status=b"413 Too Large"))
        await visit.gone()

    async def main() -> None:
        engine = RawUpstream(tmp_path / "e", script, reads_bodies=False)
        async with running(tmp_path) as plane, engine.running():
            plane.announce(instance(engine.endpoint))
            for _ in range(2):
                reply = await plane.ask(body={"model": "model", "prompt": "x" * 20_000_000})
                assert (reply.status, reply.body) == (413, b"too large")
            assert engine.connections == 2  # neither was used again
            await eventually(lambda: engine.open == 0)

    run(main())


def test_the_daemon_stops(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        if b"stream" in visit.body:
            await visit.send(EVENTS, chunk(b"data: 1\n\n"))
        await visit.gone()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            waiting = asyncio.create_task(plane.ask())
            streaming = asyncio.create_task(plane.ask(body={"model": "model", "prompt": "stream"}))
            reading, idle = await plane.connect(), await plane.connect()
            await reading.send(request()[:-3])
            await eventually(lambda: len(engine.requests) == 2 and plane.gateway.body_bytes)
            plane.gateway.close()
            reply = await waiting
            assert (reply.status, reply.code) == (503, "draining")
            assert b'"draining"' in (await streaming).body
            assert (await reading.reply()).code == "draining"
            assert await idle.at_end() == b""
            await eventually(lambda: engine.open == 0 and plane.in_use() == 0)

    run(main())


def test_engines_that_end_with_the_daemon_are_not_blamed(tmp_path: Path) -> None:
    """They may be gone before the daemon is: what they leave unfinished is told why, and may be sent again."""
    event = b"data: 1\n\n"

    async def script(visit: Visit) -> None:
        if b"stream" in visit.body:
            await visit.send(EVENTS, chunk(event))
        await visit.gone()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as waiting, plane.wire() as streaming:
                await waiting.send(request())
                await streaming.send(request(body={"model": "model", "prompt": "x", "stream": True}))
                await streaming.head()
                await eventually(lambda: len(engine.requests) == 2)
                plane.gateway.drain()
                engine.abort_all()
                reply = await waiting.reply()
                assert (reply.status, reply.code) == (503, "draining")
                assert reply.header("retry-after") is not None
                body = b"".join([piece async for piece in streaming.chunks()])
                assert body.startswith(event)
                assert json.loads(body.rpartition(b"data: ")[2])["error"]["code"] == "draining"
                assert b"[DONE]" not in body
            assert {record.code for record in plane.records} == {"draining"}
            await eventually(lambda: plane.in_use() == 0)

    run(main())


def test_an_engine_that_ends_with_the_daemon_while_it_is_connected_to_is_not_blamed(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane:
            path = tmp_path / "busy"
            with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as filler:
                listener.bind(str(path))
                listener.listen(0)  # with the filler in its queue nobody else gets in
                filler.connect(str(path))
                plane.announce(instance(Endpoint(uds=str(path))))
                async with plane.wire() as wire:
                    await wire.send(request())
                    await eventually(lambda: plane.in_use() == 1)
                    plane.gateway.drain()
                    path.unlink()
                    reply = await wire.reply()
            assert (reply.status, reply.code) == (503, "draining")
            assert plane.in_use() == 0

    run(main())


def test_external_engines_over_tls(tmp_path: Path) -> None:
    pem = certificate(tmp_path)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(EVENTS + chunk(b"data: secret\n\n") + LAST_CHUNK)
        await writer.drain()
        await reader.read()
        writer.close()

    async def main() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        endpoint = Endpoint(host="localhost", port=port, tls=True)
        async with server, running(tmp_path) as plane:
            plane.announce(instance(endpoint))
            reply = await plane.ask()  # a certificate nobody vouches for
            assert (reply.status, reply.code) == (502, "upstream_error")
            plane.gateway._tls = ssl.create_default_context(cafile=str(pem))
            plane.gate.forget(LAUNCH)
            plane.announce(instance(endpoint))
            reply = await plane.ask()
            assert (reply.status, reply.body) == (200, b"data: secret\n\n")

    run(main())


def test_what_was_understood_reaches_the_client_before_the_cut(tmp_path: Path) -> None:
    """Else it would look like a request that nobody had begun to answer."""

    async def script(visit: Visit) -> None:
        await visit.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\nno length\r\n")

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                await wire.send(request())
                status, _, _ = await wire.head()
                assert status == 200
                assert await wire.at_end() == b"5\r\nhello\r\n"
            assert [record.code for record in plane.records] == ["upstream_error"]

    run(main())
