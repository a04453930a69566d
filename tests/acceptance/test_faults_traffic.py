"""What clients and engines can do to a daemon that carries traffic, against real processes: clients that leave at any
moment, do not read, do not write or come in thousands; engines that die with everything they had."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.aio import eventually
from tests.support.daemon import DaemonProcess
from tests.support.data_plane import Reply, Wire, ask_on, request
from tests.support.raw_upstream import EVENTS, chunk
from tests.support.waiting import wait_for
from vllm_bootstrap.client import Client

FREE_WITHIN_S = 1.0
ROUNDS = 1000
AT_ONCE = 50
SLOTS = 20
LONG = {"model": "sim", "prompt": "a", "max_tokens": 5000, "ignore_eos": True}
HANDSHAKE = [
    ("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
]  # fmt: skip


class Box:
    """A daemon as asyncio tests want it: raw connections, and what kernel, engine and daemon say is in use."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon

    @contextlib.asynccontextmanager
    async def wire(self, receive_buffer: int | None = None) -> AsyncIterator[Wire]:
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            # Segments as on a network: for those of the loopback device the kernel keeps megabytes of each stream.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, self.daemon.address)
        except BaseException:
            connection.close()
            raise
        reader, writer = await asyncio.open_connection(sock=connection, limit=2**16)
        wire = Wire(reader, writer)
        try:
            yield wire
        finally:
            wire.close()

    async def ask(self, *args: Any, **kwargs: Any) -> Reply:
        return await ask_on(self.wire(), *args, **{"key": None, **kwargs})

    def load(self, launch_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.daemon.status(launch_id)["load"]
        return found

    def at_rest(self, launch_id: str) -> bool:
        """By the engine's own count and by ours."""
        text = self.daemon.request("GET", f"/proxy/{launch_id}/metrics").body.decode()
        counts = re.findall(r"(?m)^vllm:num_requests_(?:running|waiting)(?:\{.*\})? (\S+)$", text)
        load = self.load(launch_id)
        return len(counts) == 2 and not any(
            [*map(float, counts), *load["in_flight"].values(), *load["queued"].values()]
        )

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.pid}/fd"))  # noqa: PTH208 - only counted

    def rss_mb(self) -> float:
        text = Path(f"/proc/{self.daemon.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with DaemonProcess(max_in_flight_requests=200, devices="mock:4") as daemon:
        yield Box(daemon)


async def in_thread(condition: Callable[[], Any], within_s: float = 10.0) -> None:
    await asyncio.to_thread(wait_for, condition, within_s)


# -- clients -----------------------------------------------------------------------------------------------------------


async def leave_in_the_head(wire: Wire) -> None:
    await wire.send(request(body=LONG, key=None)[:40])


async def leave_in_the_body(wire: Wire) -> None:
    await wire.send(request(body=LONG, key=None)[:-5])


async def leave_at_once(wire: Wire) -> None:
    await wire.send(request(body={**LONG, "stream": True}, key=None))


async def leave_before_the_answer(wire: Wire) -> None:
    await wire.send(request(body=LONG, key=None))
    await asyncio.sleep(0.01)


async def leave_after_the_head(wire: Wire) -> None:
    await wire.send(request(body={**LONG, "stream": True}, key=None))
    await wire.head()


async def leave_midstream(wire: Wire) -> None:
    await wire.send(request(body={**LONG, "stream": True}, key=None))
    await wire.head()
    await anext(wire.chunks())


async def leave_a_websocket(wire: Wire) -> None:
    await wire.send(request("GET", "/v1/realtime?model=sim", key=None, headers=HANDSHAKE))
    assert (await wire.head())[0] == 101


async def stay(wire: Wire) -> None:
    await wire.send(request(body={"model": "sim", "prompt": "a", "max_tokens": 1}, key=None))
    assert (await wire.reply()).status == 200


LEAVING = (
    leave_in_the_head, leave_in_the_body, leave_at_once, leave_before_the_answer, leave_after_the_head,
    leave_midstream, leave_a_websocket, stay,
)  # fmt: skip


def test_fault_18_clients_that_leave_at_any_moment_leave_nothing(box: Box) -> None:
    """A thousand, 50 at a time on 20 slots, so that many of them leave the queue."""

    async def one(act: Callable[[Wire], Coroutine[Any, Any, None]]) -> None:
        async with box.wire() as wire:
            await act(wire)

    async def main(launch_id: str) -> None:
        for act in LEAVING:  # once each, so that whatever is made once has been made
            await one(act)
        await in_thread(lambda: box.at_rest(launch_id))
        files = box.files()
        for start in range(0, ROUNDS, AT_ONCE):
            await asyncio.gather(*(one(LEAVING[(start + n) % len(LEAVING)]) for n in range(AT_ONCE)))
        await in_thread(lambda: box.at_rest(launch_id), FREE_WITHIN_S)
        # Kept connections to the engine, one for each that ran at once, are not leaked ones.
        await in_thread(lambda: box.files() <= files + SLOTS)
        assert (await box.ask(body={"model": "sim", "prompt": "a", "max_tokens": 1})).status == 200

    launch_id = box.daemon.ready(max_num_seqs=SLOTS)["launch_id"]
    asyncio.run(main(launch_id))
    box.daemon.stop_launch(launch_id)
    assert "Traceback" not in box.daemon.log


@contextlib.asynccontextmanager
async def flooding(path: Path) -> AsyncIterator[Counter[str]]:
    """An engine elsewhere that streams 20 MB to whoever asks for a flood. Yields what it has sent."""
    told: Counter[str] = Counter()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.findall(rb"(?i)content-length: (\d+)", head)
                body = await reader.readexactly(int(length[0])) if length else b""
                if b"flood" not in body:
                    listed = b'{"object":"list","data":[{"id":"tap","object":"model"}]}'
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(listed), listed))
                    continue
                told["open"] += 1
                writer.write(EVENTS)
                for _ in range(200):
                    writer.write(chunk(b"x" * 100_000))
                    await writer.drain()
                    told["bytes"] += 100_000
        except (asyncio.IncompleteReadError, ConnectionError):
            told["cut"] += 1
        finally:
            writers.discard(writer)
            writer.transport.abort()  # a mere close would wait for a reader of what is still to be sent

    writers: set[asyncio.StreamWriter] = set()
    server = await asyncio.start_unix_server(serve, path)
    try:
        yield told
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await eventually(lambda: not writers)


def test_fault_19_two_hundred_slow_readers_cost_little_memory_and_are_cut(tmp_path: Path) -> None:
    readers = 200

    async def main() -> None:
        engine = tmp_path / "e"
        async with flooding(engine) as told, contextlib.AsyncExitStack() as stack:
            entry = {"kind": "external", "uds": str(engine), "served_names": ["tap"], "slots": 300}
            (tmp_path / "engines.json").write_text(json.dumps({"engines": {"flood": entry}}))
            settings = {"engines_file": tmp_path / "engines.json", "write_stall_timeout_s": 2, "devices": "mock:1"}
            daemon = DaemonProcess(**settings)
            stack.callback(daemon.close)
            box = Box(await asyncio.to_thread(daemon.start))
            await asyncio.to_thread(daemon.ready, "tap", engine="flood")
            plain = {"model": "tap", "prompt": "a"}
            assert (await box.ask(body=plain)).status == 200
            before = box.rss_mb()
            wires = [await stack.enter_async_context(box.wire(4096)) for _ in range(readers)]
            for wire in wires:
                wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
                await wire.send(request(body={**plain, "prompt": "flood", "stream": True}, key=None))
            await eventually(lambda: told["open"] == readers)
            sent = -1
            while sent != told["bytes"]:  # until all engines are held up
                sent = told["bytes"]
                for _ in range(10):
                    assert (await box.ask(body=plain)).status == 200
            assert told["bytes"] < readers * 2_000_000  # in the kernel's buffers, mostly
            assert box.rss_mb() < before + 100
            for wire in wires[-5:]:  # these read on, slowly: none of their bytes is lost, and they are not cut
                wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert [len(await wire.reader.readexactly(300_000)) for wire in wires[-5:]] == [300_000] * 5
            await eventually(lambda: told["cut"] >= readers - 5, 20)
            assert (await box.ask(body=plain)).status == 200

    asyncio.run(main())


def test_fault_20_ten_thousand_idle_connections_and_slow_ones_stop_nobody(box: Box) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    number = min(10_000, hard - 500)
    launch_id = box.daemon.ready()["launch_id"]
    files = box.files()
    sockets: list[socket.socket] = []
    try:
        for index in range(number):
            one = socket.create_connection(box.daemon.address, 10)
            sockets.append(one)
            if index % 10 == 0:  # every tenth has begun to say something
                one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")
        wait_for(lambda: box.files() >= min(files + number, 10_000), 20)
        asked = {"model": "sim", "prompt": "a", "max_tokens": 1}
        for _ in range(5):
            assert box.daemon.request("POST", "/v1/completions", asked).status == 200
            assert box.daemon.request("GET", f"/status/{launch_id}").status == 200
            assert box.daemon.request("GET", "/healthz").status == 200
    finally:
        for one in sockets:
            one.close()
    wait_for(lambda: box.files() <= files + 5, 20)
    box.daemon.stop_launch(launch_id)


# -- engines -----------------------------------------------------------------------------------------------------------


def test_fault_30_a_launch_that_dies_with_a_hundred_running_and_a_hundred_queued(box: Box) -> None:
    async def main(status: dict[str, Any]) -> None:
        launch_id = status["launch_id"]
        bodies = [{**LONG, "model": "frail", "stream": number % 2 == 0} for number in range(200)]
        tasks = [asyncio.create_task(box.ask(body=body)) for body in bodies]
        wanted = {"in_flight": {"realtime": 100}, "queued": {"realtime": 100}}

        def full() -> bool:
            load = box.load(launch_id)
            return all(load[kind]["realtime"] == count["realtime"] for kind, count in wanted.items())

        await in_thread(full)
        os.kill(status["pid"], signal.SIGKILL)
        replies = await asyncio.wait_for(asyncio.gather(*tasks), 10)
        ends = Counter(kind_of(reply) for reply in replies)
        assert set(ends) <= {
            "stream broken",
            "502 upstream_error",
            "503 draining",
            "503 model_loading",
            "503 overloaded",
        }
        assert ends["stream broken"] + ends["502 upstream_error"] >= 100
        for reply in replies:
            if reply.status == 503:
                assert 1 <= int(reply.header("retry-after") or 0) <= 60
        await in_thread(lambda: box.daemon.status(launch_id)["attempt"] == 2)
        await asyncio.to_thread(box.daemon.wait_state, launch_id, "ready")
        again = await asyncio.gather(*(box.ask(body={**body, "max_tokens": 2, "stream": False}) for body in bodies))
        assert Counter(reply.status for reply in again) == {200: 200}
        await in_thread(lambda: box.at_rest(launch_id), FREE_WITHIN_S)

    restart = {"policy": "on-failure", "max_attempts": 2, "backoff_s": 0.1}
    status = box.daemon.ready(served_model_name="frail", max_num_seqs=100, restart=restart)
    asyncio.run(main(status))
    box.daemon.stop_launch(status["launch_id"])


def kind_of(reply: Reply) -> str:
    if reply.status != 200:
        return f"{reply.status} {reply.code}"
    broken = b'"code": "upstream_error"' in reply.body and b"[DONE]" not in reply.body
    return "stream broken" if broken else "200"


# -- more than there is ------------------------------------------------------------------------------------------------


def test_fault_26_realtime_passes_a_batch_that_never_ends_and_the_batch_goes_on(box: Box) -> None:
    """The order of ends, not their times: while a realtime request waits, only batch requests that already run end."""
    slots, clients = 4, 60
    ended: Counter[str] = Counter()
    body = {"model": "busy", "prompt": "a", "max_tokens": 10, "ignore_eos": True}

    async def batch() -> None:
        while True:
            async with box.wire() as wire:
                await wire.send(request(body=body, key=None, headers=[("X-Priority", "batch")]))
                # Batch pauses while the daemon learns how long realtime takes by itself.
                status_line = await asyncio.wait_for(wire.reader.readline(), 40)
                ended[status_line.split()[1].decode()] += 1

    async def main(launch_id: str) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(batch()) for _ in range(clients)]
            await in_thread(lambda: box.load(launch_id)["queued"]["batch"] >= clients - slots)
            memory, passed = box.rss_mb(), []
            for _ in range(20):
                before = ended["200"]
                assert (await box.ask(body={"model": "busy", "prompt": "a", "max_tokens": 1})).status == 200
                passed.append(ended["200"] - before)
            # Those that ran when it came, and a few whose answers were on their way.
            assert sorted(passed)[len(passed) // 2] <= slots
            assert max(passed) <= 3 * slots
            goal = ended["200"] + 2 * slots
            await eventually(lambda: ended["200"] >= goal, 40)
            for task in tasks:
                task.cancel()
        assert set(ended) == {"200"}
        assert box.rss_mb() < memory + 20
        await in_thread(lambda: box.at_rest(launch_id), FREE_WITHIN_S)

    launch_id = box.daemon.ready(served_model_name="busy", max_num_seqs=slots)["launch_id"]
    asyncio.run(main(launch_id))
    box.daemon.stop_launch(launch_id)


LINES, A_SECOND, ALONE, MOST_QUEUED = 10_000, 5, 25, 32


def batch_of(client: Client, path: Path) -> str:
    """Start a batch of so many lines and return its id. Chats, because such lines never travel together."""
    body = {"model": "both", "messages": [{"role": "user", "content": "a"}], "max_tokens": 10, "ignore_eos": True}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    path.write_text("".join(json.dumps({"custom_id": str(number), **line}) + "\n" for number in range(LINES)))
    return client.batches.create(client.files.upload(path).id, "/v1/chat/completions").id


def test_fault_26_ten_thousand_lines_go_on_beside_five_realtime_requests_a_second(box: Box, tmp_path: Path) -> None:
    """Counted, not timed: a realtime request that is alone finds its place at once, however long the batch is; of the
    batch as much runs as the reserve leaves and less beside realtime, and little of it waits anywhere but on disk."""
    slots, reserve = 8, 1
    launch_id = box.daemon.ready(served_model_name="both", max_num_seqs=slots)["launch_id"]
    body = {"model": "both", "prompt": "a", "max_tokens": 1}
    told: list[tuple[bool, int, str | None]] = []
    allowances: list[int] = []
    under_way = 0

    async def ask() -> None:
        nonlocal under_way
        alone = under_way == 0
        under_way += 1
        reply = await box.ask(body=body)
        under_way -= 1
        told.append((alone, reply.status, reply.header("x-queue-ms")))

    async def keep_asking() -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(ask())
                await asyncio.sleep(1 / A_SECOND)

    def finished(client: Client, batch_id: str) -> int:
        """How many lines are. Looks at the queue on the way."""
        load = box.load(launch_id)
        assert load["in_flight"]["batch"] <= slots - reserve
        assert load["queued"]["batch"] <= MOST_QUEUED
        allowances.append(load["batch"]["allowance"])
        return client.batches.get(batch_id).request_counts.completed

    async def main(client: Client, batch_id: str) -> None:
        await asyncio.to_thread(wait_for, lambda: finished(client, batch_id) >= 5 * slots, 20, 0.1)
        assert set(allowances) == {slots - reserve}
        allowances.clear()
        memory, before = box.rss_mb(), finished(client, batch_id)
        realtime = asyncio.create_task(keep_asking())
        try:
            await in_thread(lambda: sum(alone for alone, _, _ in told) >= ALONE, 40)
            # What ran when realtime came ends anyway. Batch pauses while it is learnt what realtime is like alone.
            await asyncio.to_thread(wait_for, lambda: finished(client, batch_id) >= before + 3 * slots, 40, 0.1)
        finally:
            realtime.cancel()
            await asyncio.wait([realtime])
        assert realtime.cancelled()
        assert {status for _, status, _ in told} == {200}
        assert {waited for alone, _, waited in told if alone} == {"0"}
        assert min(allowances) < slots - reserve
        assert box.rss_mb() < memory + 20

    with box.daemon.client() as client:
        batch_id = batch_of(client, tmp_path / "lines")
        asyncio.run(main(client, batch_id))
        client.batches.cancel(batch_id)
        assert client.batches.wait(batch_id, timeout_s=20).status == "cancelled"
    wait_for(lambda: box.at_rest(launch_id), FREE_WITHIN_S)
    box.daemon.stop_launch(launch_id)
