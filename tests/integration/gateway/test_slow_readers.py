"""Two hundred clients that hardly read: memory stays bounded, engines wait, others notice nothing, and they are cut."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from pathlib import Path

from tests.support.aio import eventually
from tests.support.data_plane import Plane, instance, request, run, running
from tests.support.raw_upstream import EVENTS, RawUpstream, Visit, answer, chunk
from vllm_bootstrap.gateway import GatewayLimits

CLIENTS = 200
PIECE = b"data: " + b"x" * 65_000 + b"\n\n"
STREAM_BYTES = 8 * 1024 * 1024
STREAM = {"model": "model", "prompt": "slow", "stream": True}
PER_CLIENT = 512 * 1024
"""A write buffer and one read of the engine, with room to spare."""


async def slow_client(plane: Plane) -> socket.socket:
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await loop.sock_connect(sock, ("127.0.0.1", plane.port))
    return sock


def buffered(plane: Plane) -> int:
    return sum(one.transport.get_write_buffer_size() for one in plane.gateway.connections)  # type: ignore[attr-defined]


def test_slow_readers_cost_little_and_are_cut(tmp_path: Path) -> None:
    sent = [0]

    async def script(visit: Visit) -> None:
        if b'"slow"' not in visit.body:
            await visit.send(answer())
            return
        await visit.send(EVENTS)
        for _ in range(STREAM_BYTES // len(PIECE)):
            await visit.send(chunk(PIECE))
            sent[0] += len(PIECE)

    async def main() -> None:
        limits = GatewayLimits(write_stall_timeout_s=3)
        async with running(tmp_path, limits) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            clients = [await slow_client(plane) for _ in range(CLIENTS)]
            try:
                await eventually(lambda: len(plane.gateway.connections) == CLIENTS)
                for connection in plane.gateway.connections:  # what the kernel holds is not what is looked at here
                    accepted = connection.transport.get_extra_info("socket")  # type: ignore[attr-defined]
                    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
                for one in clients:
                    await asyncio.get_running_loop().sock_sendall(one, request(body=STREAM))
                paused = lambda: sum(one.write_paused for one in plane.gateway.connections)  # type: ignore[attr-defined]  # noqa: E731
                await eventually(lambda: paused() == CLIENTS, 40)
                assert buffered(plane) < CLIENTS * PER_CLIENT
                stood = sent[0]
                took = []
                for number in range(20):  # one reads a byte now and then; others ask and are answered
                    with contextlib.suppress(BlockingIOError):
                        clients[number].recv(1)
                    began = time.monotonic()
                    assert (await plane.ask()).status == 200
                    took.append(time.monotonic() - began)
                assert sorted(took)[10] < 0.25, "others wait for slow readers"
                assert sent[0] - stood < STREAM_BYTES, "the engine is not held back"
                assert sent[0] < CLIENTS * PER_CLIENT * 4  # with what kernels hold on both legs
                await eventually(lambda: not plane.in_use() and not plane.gateway.inflight.list(), timeout=20)
                await eventually(lambda: engine.open <= 1)  # one kept for the next request
                assert {record.status for record in plane.records if record.stream} == {499}
                assert sum(record.stream is True for record in plane.records) == CLIENTS
                assert buffered(plane) == 0
            finally:
                for one in clients:
                    one.close()

    run(main())
