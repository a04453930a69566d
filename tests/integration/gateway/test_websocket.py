"""Websockets to ``/v1/realtime``: a real client and a real server with the gateway between them."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, unix_serve

from tests.support.aio import eventually
from tests.support.data_plane import LAUNCH, Plane, Wire, instance, request, run, running
from tests.support.raw_upstream import RawUpstream, Visit, answer
from vllm_bootstrap.gateway import GatewayLimits
from vllm_bootstrap.gateway.headers import websocket_accept
from vllm_bootstrap.serving import Endpoint

KEY = {"Authorization": "Bearer sk-realtime"}
PATHS = ["/v1/realtime?model=model", f"/proxy/{LAUNCH}/v1/realtime"]


@contextlib.asynccontextmanager
async def speaking(tmp: Path, handler: Any) -> AsyncIterator[tuple[Endpoint, list[ServerConnection]]]:
    seen: list[ServerConnection] = []

    async def handle(connection: ServerConnection) -> None:
        seen.append(connection)
        await handler(connection)

    async with unix_serve(handle, str(tmp / "ws"), max_size=None, ping_interval=None, compression=None):
        yield Endpoint(uds=str(tmp / "ws"), credential="internal-key"), seen


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        if message == "close":
            await connection.close(4321, "as asked")
        else:
            await connection.send(message)


def dial(plane: Plane, path: str, headers: dict[str, str] | None = None, **options: Any) -> Any:
    url = f"ws://127.0.0.1:{plane.port}{path}"
    return connect(url, additional_headers=KEY if headers is None else headers, max_size=None, proxy=None, **options)


@pytest.mark.parametrize("path", PATHS)
def test_frames_pass_both_ways(tmp_path: Path, path: str) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, speaking(tmp_path, echo) as (endpoint, seen):
            plane.announce(instance(endpoint))
            async with dial(plane, path) as client:
                for message in ("text é", b"\x00\xff binary", "", "x" * 3_000_000):
                    await client.send(message)
                    assert await client.recv() == message
                await client.send(["in ", "pieces"])
                assert await client.recv() == "in pieces"
                await (await client.ping())
                assert plane.in_use() == 1
                assert seen[0].request is not None
                told = seen[0].request.headers
                assert told["Authorization"] == "Bearer internal-key"
                assert told["X-Vllm-Priority"] == "0"
                assert client.response is not None
                assert client.response.headers["x-launch-id"] == LAUNCH
                await client.send("close")
                with pytest.raises(websockets.ConnectionClosed) as closed:
                    await client.recv()
                assert closed.value.rcvd is not None
                assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4321, "as asked")
            await eventually(lambda: plane.in_use() == 0 and not plane.gateway.connections)
            record = plane.records[-1]
            assert record.status == 101
            assert record.bytes_in > 3_000_000
            assert record.bytes_out > 3_000_000

    run(main())


def test_the_clients_close_code_reaches_the_engine(tmp_path: Path) -> None:
    codes: list[int | None] = []

    async def handler(connection: ServerConnection) -> None:
        await connection.wait_closed()
        codes.append(connection.close_code)

    async def main() -> None:
        async with running(tmp_path) as plane, speaking(tmp_path, handler) as (endpoint, _):
            plane.announce(instance(endpoint))
            async with dial(plane, PATHS[0]) as client:
                await client.close(4000, "bye")
            await eventually(lambda: codes == [4000])

    run(main())


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        (PATHS[0], {}, 401),
        (PATHS[1], {}, 401),
        (PATHS[0], {"Authorization": "Bearer sk-monitor"}, 403),
        (PATHS[0], {**KEY, "Origin": "http://evil.example"}, 403),
        (PATHS[1], {**KEY, "Origin": "http://evil.example"}, 403),
        ("/v1/realtime", KEY, 400),
        ("/v1/realtime?model=a&model=model", KEY, 400),
        ("/v1/realtime?model=other", KEY, 404),
        ("/v1/completions", KEY, 405),
        (f"/proxy/{LAUNCH}/v1/nope", KEY, 404),
    ],
)
def test_handshakes_that_are_refused(tmp_path: Path, path: str, headers: dict[str, str], status: int) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, speaking(tmp_path, echo) as (endpoint, seen):
            plane.announce(instance(endpoint))
            with pytest.raises(websockets.InvalidStatus) as refused:
                async with dial(plane, path, headers):
                    pass
            assert refused.value.response.status_code == status
            assert b'"src": "vllm-bootstrap"' in refused.value.response.body
            assert seen == []
            assert plane.in_use() == 0

    run(main())


def test_a_plain_request_to_a_websocket_route(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            for path in PATHS:
                assert (await plane.ask("GET", path)).status == 400
            assert engine.requests == []

    run(main())


HANDSHAKE = [
    ("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
]  # fmt: skip


SWITCH = b"HTTP/1.1 101 S\r\nconnection: upgrade\r\nupgrade: %b\r\nsec-websocket-accept: %b\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (answer(b"no", status=b"426 Upgrade Required"), 426),
        (SWITCH % (b"websocket", b"wrong"), 502),
        (SWITCH % (b"h2c", b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), 502),
        (b"HTTP/1.1 101 S\r\n\r\n", 502),
    ],
)  # fmt: skip
def test_engines_that_do_not_accept(tmp_path: Path, raw: bytes, status: int) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(raw)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                # What follows a refused handshake is never tunnelled to the engine.
                await wire.send(request("GET", PATHS[0], headers=HANDSHAKE) + request("GET", "/second"))
                assert (await wire.reply()).status == status
                assert (await wire.reply()).json["path"] == "/second"
            assert len(engine.requests) == 1
            assert plane.in_use() == 0

    run(main())


def accepting(then: Any) -> Any:
    async def script(visit: Visit) -> None:
        accept = websocket_accept(visit.header(b"sec-websocket-key")[0])
        await visit.send(
            b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            b"sec-websocket-accept: %b\r\n\r\nearly" % accept
        )
        await then(visit)

    return script


def test_bytes_sent_early_by_either_side(tmp_path: Path) -> None:
    async def then(visit: Visit) -> None:
        got = await visit.reader.readexactly(10)
        await visit.send(b"<" + got + b">")
        visit.writer.close()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", accepting(then)).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                await wire.send(request("GET", PATHS[0], headers=HANDSHAKE) + b"01234")
                assert (await wire.head())[0] == 101
                await wire.send(b"56789")
                assert await wire.at_end() == b"early<0123456789>"

    run(main())


def test_neither_side_is_flooded(tmp_path: Path) -> None:
    counts = {"in": 0, "out": 0}
    reading = asyncio.Event()

    async def then(visit: Visit) -> None:
        async def flood() -> None:
            for _ in range(200):
                await visit.send(b"x" * 100_000)
                counts["out"] += 100_000

        flooding = asyncio.create_task(flood())
        await reading.wait()
        while counts["in"] < 20_000_000:
            counts["in"] += len(await visit.reader.read(65536))
        await flooding
        visit.writer.close()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", accepting(then)).running() as engine:
            plane.announce(instance(engine.endpoint))
            wire = await plane.connect()
            await wire.send(request("GET", PATHS[0], headers=HANDSHAKE))
            await wire.head()
            wire.writer.transport.pause_reading()
            sending = asyncio.create_task(wire.send(b"y" * 20_000_000))
            seen = -1
            while seen != counts["out"]:
                seen = counts["out"]
                await asyncio.sleep(0.05)  # until nothing moves any more
            assert counts["out"] < 15_000_000
            assert not sending.done()
            reading.set()
            wire.writer.transport.resume_reading()
            assert len(await wire.at_end()) == 20_000_000 + len(b"early")
            await sending
            assert counts == {"in": 20_000_000, "out": 20_000_000}

    run(main())


def test_a_client_that_has_not_read_the_answer_before_is_not_flooded(tmp_path: Path) -> None:
    """Its connection is full before the tunnel begins, so that no event tells so any more."""
    counts = {"out": 0}
    full = asyncio.Event()

    async def flood(visit: Visit) -> None:
        for _ in range(300):
            await visit.send(b"x" * 100_000)
            counts["out"] += 100_000
        visit.writer.close()

    async def script(visit: Visit) -> None:
        if visit.lines[0].startswith(b"POST"):
            await visit.send(answer(b"z" * 180_000))
        else:
            await full.wait()
            await accepting(flood)(visit)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", plane.port))
            await eventually(lambda: len(plane.gateway.connections) == 1)
            (connection,) = plane.gateway.connections
            transport = connection.transport  # type: ignore[attr-defined]
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)
            reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
            wire = Wire(reader, writer)
            await wire.send(request() + request("GET", PATHS[0], headers=HANDSHAKE))
            await eventually(lambda: connection.write_paused)  # type: ignore[attr-defined]
            full.set()
            await eventually(lambda: counts["out"] > 0)
            seen = -1
            while seen != counts["out"]:
                seen = counts["out"]
                await asyncio.sleep(0.05)  # until nothing moves any more
            assert transport.get_write_buffer_size() < 1_000_000
            assert counts["out"] < 15_000_000
            assert len((await wire.reply()).body) == 180_000
            assert (await wire.head())[0] == 101
            assert len(await wire.at_end(30)) == 30_000_000 + len(b"early")
            wire.close()

    run(main())


@pytest.mark.parametrize("who", ["client", "engine", "daemon"])
def test_when_one_side_goes_the_other_hears_of_it(tmp_path: Path, who: str) -> None:
    async def then(visit: Visit) -> None:
        if who == "engine":
            visit.cut()
        else:
            await visit.gone()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", accepting(then)).running() as engine:
            plane.announce(instance(engine.endpoint))
            wire = await plane.connect()
            await wire.send(request("GET", PATHS[0], headers=HANDSHAKE))
            await wire.head()
            if who == "client":
                wire.close()
            elif who == "daemon":
                plane.gateway.close()
            await eventually(lambda: engine.open == 0 and plane.in_use() == 0 and not plane.gateway.connections, 1)

    run(main())


def closed_by_us(visit: Visit) -> bool:
    """As the engine's kernel knows it, whether or not the engine reads."""
    poll = select.poll()
    poll.register(visit.writer.get_extra_info("socket").fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))


@pytest.mark.parametrize("how", ["reset", "closed"])
@pytest.mark.parametrize("much", [True, False])
def test_a_client_that_leaves_an_engine_that_does_not_read(tmp_path: Path, how: str, *, much: bool) -> None:
    """``much``: so much is on its way that we do not read the client any more."""
    end = asyncio.Event()

    async def then(_: Visit) -> None:
        await end.wait()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", accepting(then)).running() as engine:
            plane.announce(instance(engine.endpoint))
            wire = await plane.connect()
            await wire.send(request("GET", PATHS[0], headers=HANDSHAKE))
            await wire.head()
            (connection,) = plane.gateway.connections
            (visit,) = engine.requests
            visit.writer.transport.pause_reading()  # type: ignore[attr-defined]
            stopped = lambda: connection.flow.read_paused  # type: ignore[attr-defined]  # noqa: E731
            exchange = connection._exchange  # type: ignore[attr-defined]
            engines = exchange._connection.transport.inner
            while not (stopped() if much else engines.get_write_buffer_size()):
                await wire.send(b"y" * 10_000)
                await asyncio.sleep(0)
            if how == "reset":
                linger = struct.pack("ii", 1, 0)
                wire.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            left_at = time.monotonic()
            wire.close()
            while plane.in_use():
                await asyncio.sleep(0.005)
                if not plane.in_use():
                    await asyncio.sleep(0)  # what is closed in this turn of the loop is closed at its end
                    assert closed_by_us(visit), "the place is free, and the engine still works for nobody"
                assert time.monotonic() - left_at < 1.5
            assert not plane.gateway.connections
            assert [record.status for record in plane.records] == [101]
            end.set()

    run(main())


def test_what_a_client_has_said_last_reaches_an_engine_that_reads_on_in_time(tmp_path: Path) -> None:
    go, counts = asyncio.Event(), {"in": 0, "out": 0}

    async def then(visit: Visit) -> None:
        visit.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await go.wait()
        visit.writer.transport.resume_reading()  # type: ignore[attr-defined]
        while piece := await visit.reader.read(65536):
            counts["in"] += len(piece)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", accepting(then)).running() as engine:
            plane.announce(instance(engine.endpoint))
            wire = await plane.connect()
            await wire.send(request("GET", PATHS[0], headers=HANDSHAKE))
            await wire.head()
            await wire.reader.readexactly(5)  # else its system resets the connection when it closes
            (connection,) = plane.gateway.connections
            while not connection.flow.read_paused:  # type: ignore[attr-defined]
                await wire.send(b"y" * 10_000)
                counts["out"] += 10_000
                await asyncio.sleep(0)
            wire.writer.close()
            go.set()
            await eventually(lambda: plane.in_use() == 0)
            await eventually(lambda: engine.open == 0)
            assert counts["in"] == counts["out"]

    run(main())


def test_an_open_websocket_outlives_the_limits_for_requests(tmp_path: Path) -> None:
    async def main() -> None:
        limits = GatewayLimits(
            header_timeout_s=0.4, body_timeout_s=0.4, keep_alive_s=0.4, upstream_first_byte_timeout_s=0.4,
            upstream_idle_timeout_s=0.4,
        )  # fmt: skip
        async with running(tmp_path, limits) as plane, speaking(tmp_path, echo) as (endpoint, _):
            plane.announce(instance(endpoint))
            async with dial(plane, PATHS[0]) as client:
                await asyncio.sleep(0.9)  # silence is the point
                await client.send("still there")
                assert await client.recv() == "still there"

    run(main())
