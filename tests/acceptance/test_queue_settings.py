"""What an operator says about queues, and about realtime beside batch on one engine, against a running daemon: each
setting is seen in what clients get."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.support.aio import run
from tests.support.daemon import DaemonProcess
from tests.support.data_plane import Reply, Wire, ask_on, request, wire_to
from tests.support.waiting import wait_for

MIB = 1024 * 1024
WAITS, TIMEOUT_S = 2, 2
LONG = {"model": "sim", "prompt": "a", "max_tokens": 5000, "ignore_eos": True, "stream": True}
SHORT = {"model": "sim", "prompt": "a", "max_tokens": 1}
BATCH = [("X-Priority", "batch")]
OTHERWISE = {
    "queue_timeout_s": TIMEOUT_S,
    "max_queued_bytes": MIB,
    "realtime_reserve": 0.5,
    "env": {"MAX_CONCURRENT_REQUESTS": str(WAITS)},
}


class Box:
    """A daemon with one launch."""

    def __init__(self, daemon: DaemonProcess, slots: int) -> None:
        self.daemon = daemon
        self.launch_id = str(daemon.ready(max_num_seqs=slots)["launch_id"])

    async def load(self) -> dict[str, Any]:
        status = await asyncio.to_thread(self.daemon.status, self.launch_id)
        found: dict[str, Any] = status["load"]
        return found

    async def until(self, part: str, cls: str, count: int) -> None:
        """Wait until so many are ``in_flight`` or ``queued``."""
        status = self.daemon.status
        await asyncio.to_thread(wait_for, lambda: status(self.launch_id)["load"][part][cls] == count)

    @contextlib.asynccontextmanager
    async def occupied(self) -> AsyncIterator[Wire]:
        """One realtime stream that goes on and has begun."""
        async with wire_to(self.daemon.address) as wire:
            await wire.send(request(body=LONG, key=None))
            assert (await wire.head())[0] == 200
            await anext(wire.chunks())
            yield wire

    async def ask(self, **kwargs: Any) -> Reply:
        return await ask_on(wire_to(self.daemon.address), **{"body": SHORT, "key": None, **kwargs})


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(**OTHERWISE) as made:
        yield made


@contextlib.contextmanager
def launched(daemon: DaemonProcess, slots: int) -> Iterator[Box]:
    box = Box(daemon, slots)
    yield box
    daemon.stop_launch(box.launch_id, force="true")


def test_only_so_many_may_wait_and_only_for_so_long(daemon: DaemonProcess) -> None:
    async def main(box: Box) -> None:
        async with box.occupied():
            replies = await asyncio.gather(*(box.ask(headers=BATCH) for _ in range(WAITS + 3)))
        ends = Counter((reply.status, reply.code) for reply in replies)
        assert ends == {(429, "queue_full"): 3, (503, "overloaded"): WAITS}
        for reply in replies:
            assert 1 <= int(reply.header("retry-after") or 0) <= 60
            said = reply.json["error"]["message"]
            if reply.status == 503:
                assert f"came free for it within {TIMEOUT_S} s" in said
            else:
                assert f"full: {WAITS} requests are waiting" in said

    with launched(daemon, slots=1) as box:
        run(main(box))


def test_bodies_that_wait_may_have_only_so_many_bytes_together(daemon: DaemonProcess) -> None:
    async def main(box: Box) -> None:
        large = {**SHORT, "prompt": "x" * (MIB * 2 // 3)}
        async with box.occupied():
            replies = await asyncio.gather(*(box.ask(body=large, headers=BATCH) for _ in range(2)))
        ends = {reply.code: reply.json["error"]["message"] for reply in replies}
        assert ends.keys() == {"queue_full", "overloaded"}
        assert "more than the 1.0 MiB" in ends["queue_full"]

    with launched(daemon, slots=1) as box:
        run(main(box))


def test_the_reserve_is_left_free_by_batch(daemon: DaemonProcess) -> None:
    async def main(box: Box) -> None:
        assert ((await box.load())["batch"]["reserve"], (await box.load())["batch"]["allowance"]) == (2, 2)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                wire = await stack.enter_async_context(wire_to(box.daemon.address))
                await wire.send(request(body=LONG, key=None, headers=BATCH))
            await box.until("queued", "batch", 2)
            assert (await box.load())["in_flight"]["batch"] == 2
        await box.until("in_flight", "batch", 0)

    with launched(daemon, slots=4) as box:
        run(main(box))
