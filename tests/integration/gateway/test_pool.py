"""Connections to one engine: when they are used again, when not, and what happens to those nobody wants any more."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.aio import eventually
from tests.support.data_plane import run
from tests.support.raw_upstream import RawUpstream
from vllm_bootstrap.errors import ApiError, UpstreamError, UpstreamTimeout
from vllm_bootstrap.gateway.pool import Dial, Pool
from vllm_bootstrap.gateway.upstream import UpstreamConnection
from vllm_bootstrap.serving import Endpoint

ASK = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"


class Waiter:
    """A receiver that waits for the whole answer."""

    def __init__(self) -> None:
        self.answered = asyncio.Event()
        self.broken = ""

    def on_received(self, connection: UpstreamConnection) -> None:
        if connection.complete:
            self.answered.set()

    def on_broken(self, connection: UpstreamConnection, reason: str) -> None:
        self.broken = reason
        self.answered.set()

    def on_upstream_writable(self) -> None:
        """Nothing large is written here."""


def pool_of(endpoint: Endpoint) -> Pool:
    return Pool(endpoint, connect_timeout_s=5, keep_alive_s=4)


@pytest.mark.parametrize(("engine_closes_after_s", "used_until_s"), [(None, 4), (120, 90), (5, 3.75), (0.1, 0.075)])
def test_idle_connections_are_used_until_well_before_the_engine_closes_them(
    tmp_path: Path, engine_closes_after_s: float | None, used_until_s: float
) -> None:
    async def main() -> None:
        async with RawUpstream(tmp_path / "e").running() as engine:
            pool = pool_of(replace(engine.endpoint, keep_alive_s=engine_closes_after_s))
            first = await used(pool, 100.0)
            pool.sweep(100.0 + used_until_s * 0.99)
            assert pool.take(100.0 + used_until_s * 0.99) is first
            first.abort()
            await used(pool, 100.0)
            assert pool.take(100.0 + used_until_s * 1.01) is None
            await used(pool, 100.0)
            pool.sweep(100.0 + used_until_s * 1.01)
            assert pool.idle == 0
            await eventually(lambda: engine.open == 0)

    run(main())


async def dialled(pool: Pool) -> UpstreamConnection | ApiError:
    outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    pool.dial(outcome.set_result)
    return await outcome  # type: ignore[no-any-return]


async def used(pool: Pool, now: float) -> UpstreamConnection:
    """A connection that has carried one request and was given back at ``now``."""
    connection = await dialled(pool)
    assert isinstance(connection, UpstreamConnection)
    waiter = Waiter()
    connection.start(waiter, ASK, now=now)
    await waiter.answered.wait()
    connection.release(now)
    return connection


def test_the_last_used_comes_first_and_old_ones_are_dropped(tmp_path: Path) -> None:
    async def main() -> None:
        async with RawUpstream(tmp_path / "e").running() as engine:
            pool = pool_of(engine.endpoint)
            first = await used(pool, 100.0)
            second = await used(pool, 102.0)
            assert pool.idle == 2
            assert pool.take(103.0) is second
            assert second.used_before
            second.abort()
            assert pool.take(103.5) is first
            first.abort()
            third = await used(pool, 104.0)
            assert pool.take(108.0) is None  # too old by now
            assert third.transport is None
            await eventually(lambda: engine.open == 0)

    run(main())


def test_a_closed_pool_keeps_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with RawUpstream(tmp_path / "e").running() as engine:
            pool = pool_of(engine.endpoint)
            await used(pool, 1.0)
            pool.close()
            pool.close()
            await eventually(lambda: engine.open == 0)
            await used(pool, 1.0)
            assert pool.idle == 0
            await eventually(lambda: engine.open == 0)

    run(main())


def test_a_connection_without_an_owner_hears_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        async with RawUpstream(tmp_path / "e").running() as engine:
            connection = await used(pool_of(engine.endpoint), 1.0)
            connection.abort()
            connection.abort()
            connection.pause()
            connection.resume()
            connection.write(b"into the void")
            connection.close_gently(1)

    run(main())


def test_an_address_that_is_none(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        outcome = await dialled(pool_of(Endpoint(host="a" * 300, port=1)))
        assert isinstance(outcome, UpstreamError)

    run(main())
    assert "connecting to an engine failed" in caplog.text


@pytest.mark.interpreted
def test_a_dial_that_is_given_up_too_late_closes_what_it_made() -> None:
    class Made:
        aborted = False

        def abort(self) -> None:
            self.aborted = True

    made = Made()

    async def connecting() -> Any:
        return made

    async def main() -> None:
        told: list[Any] = []
        dial = Dial(connecting(), told.append, 30.0)
        asyncio.get_running_loop().call_soon(dial.cancel)  # after it has connected, before anybody was told
        await eventually(lambda: made.aborted)
        assert told == []

    run(main())


def test_a_full_queue_of_connections_is_waited_for(tmp_path: Path) -> None:
    """A busy engine on a Unix socket refuses at once what a port would let wait: it is not down for that."""

    async def main() -> None:
        path = str(tmp_path / "busy")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(0)
        fillers = [socket.socket(socket.AF_UNIX) for _ in range(4)]
        for one in fillers:
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(path)
        got: list[UpstreamConnection | ApiError] = []
        dial = Pool(Endpoint(uds=path), connect_timeout_s=5, keep_alive_s=1).dial(got.append)
        late: list[UpstreamConnection | ApiError] = []
        Pool(Endpoint(uds=path), connect_timeout_s=0.1, keep_alive_s=1).dial(late.append)
        await eventually(lambda: late)
        assert isinstance(late[0], UpstreamTimeout)
        assert not got
        accepted, _ = listener.accept()
        await eventually(lambda: got)
        assert isinstance(got[0], UpstreamConnection)
        got[0].abort()
        dial.cancel()
        for one in (*fillers, accepted, listener):
            one.close()

    run(main())


def test_a_connection_that_is_lost_before_it_is_handed_over_is_none() -> None:
    """A process that dies resets what waited in its queue, perhaps between the connection and whoever asked for it."""

    async def main() -> None:
        pool = pool_of(Endpoint(uds="/nowhere"))

        async def lost() -> UpstreamConnection:
            return UpstreamConnection(pool)

        outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        Dial(lost(), outcome.set_result, 30.0)
        told = await asyncio.wait_for(outcome, 5)
        assert isinstance(told, UpstreamError)
        assert "at once" in told.message

    asyncio.run(main())
