"""Clients that vanish without a word, as with their power: nothing closes, nothing answers any more."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.aio import eventually
from tests.support.data_plane import Plane, Wire, instance, request, run, running
from tests.support.raw_upstream import EVENTS, RawUpstream, Visit, chunk
from vllm_bootstrap.doors import listen
from vllm_bootstrap.gateway import GatewayLimits
from vllm_bootstrap.settings import Settings

SO_ATTACH_FILTER = 26
STREAM = {"model": "model", "prompt": "stream", "stream": True}
FLOOD = {"model": "model", "prompt": "flood", "stream": True}


def vanish(wire: Wire) -> None:
    """From now on the client's kernel drops every packet that comes for it, unseen, and the client says nothing."""
    drop_all = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))  # BPF: return 0
    program = struct.pack("@HP", 1, ctypes.addressof(drop_all))
    try:
        wire.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    except OSError as exc:
        pytest.skip(f"sockets cannot have filters here: {exc}")


async def small_wire(plane: Plane) -> Wire:
    """A client for which the kernel keeps little."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", plane.port))
    plane.wires.append(Wire(*await asyncio.open_connection(sock=sock, limit=4096)))
    return plane.wires[-1]


@contextlib.asynccontextmanager
async def minding(tmp_path: Path, dead_after_s: float) -> AsyncIterator[Plane]:
    """The data plane behind a port of the daemon's."""
    settings = Settings(host="127.0.0.1", port=0, state_dir=tmp_path, client_dead_after_s=dead_after_s)
    with listen(settings) as listener:
        limits = GatewayLimits(client_dead_after_s=dead_after_s)
        async with running(tmp_path, limits, listener=listener) as plane:
            yield plane


@pytest.mark.parametrize("stage", ["queued", "waiting"])
def test_one_that_waits_is_missed(tmp_path: Path, stage: str) -> None:
    async def script(visit: Visit) -> None:
        await visit.gone()

    async def main() -> None:
        async with minding(tmp_path, 2) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1 if stage == "queued" else 2))
            patient, wire = await plane.connect(), await plane.connect()
            await patient.send(request())
            await eventually(lambda: plane.in_use() == 1)
            await wire.send(request())
            await eventually(lambda: plane.in_use() + plane.queued() == 2)
            vanish(wire)
            await eventually(lambda: plane.in_use() + plane.queued() == 1 and engine.open == 1)
            assert [record.code for record in plane.records] == ["client_cancelled"]
            assert len(plane.gateway.connections) == 1  # who says just as little, but is there

    run(main())


def test_one_that_is_being_sent_to_is_missed_and_one_that_does_not_read_is_not(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        event = chunk(b"data: " + b"x" * (60_000 if b"flood" in visit.body else 1) + b"\n\n")
        await visit.send(EVENTS)
        with contextlib.suppress(ConnectionError):
            while True:
                await visit.send(event)
                await asyncio.sleep(0.02)

    async def main() -> None:
        async with minding(tmp_path, 1) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            idle = await small_wire(plane)
            idle.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await idle.send(request(body=FLOOD))
            await eventually(lambda: any(one.write_paused for one in plane.gateway.connections), 30)  # type: ignore[attr-defined]
            busy, wire = await plane.connect(), await plane.connect()
            for one in (busy, wire):
                await one.send(request(body=STREAM))
                await one.head()
            reading = asyncio.create_task(busy.at_end(60))
            await eventually(lambda: plane.in_use() == 3)
            vanish(wire)
            await eventually(lambda: plane.in_use() == 2)
            assert [record.code for record in plane.records] == ["client_cancelled"]
            assert len(plane.gateway.connections) == 2
            assert not reading.done()
            idle.writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert (await idle.head())[0] == 200
            assert len(await anext(idle.chunks())) == 60_008
            reading.cancel()

    run(main())


def test_nobody_is_missed_where_that_is_turned_off(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(EVENTS)
        with contextlib.suppress(ConnectionError):
            while True:
                await visit.send(chunk(b"data: x\n\n"))
                await asyncio.sleep(0.02)

    async def main() -> None:
        async with (
            minding(tmp_path, 0) as off,
            minding(tmp_path, 1) as on,
            RawUpstream(tmp_path / "e", script).running() as engine,
        ):
            for plane in (off, on):
                plane.announce(instance(engine.endpoint))
                wire = await plane.connect()
                await wire.send(request(body=STREAM))
                await wire.head()
                vanish(wire)
            await eventually(lambda: on.in_use() == 0)
            assert off.in_use() == 1

    run(main())
