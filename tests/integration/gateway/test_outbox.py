"""Writes that leave together at the end of an iteration: in order, whole, before a close, and never lost on the way."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from vllm_bootstrap.gateway.outbox import HELD_BYTES, MOST_HELD, Outbox

LARGE = b"x" * (HELD_BYTES + 1)


class Inner:
    """A transport that notes what is done to it."""

    def __init__(self) -> None:
        self.done: list[bytes | str] = []
        self.closing = self.broken = False

    def write(self, data: bytes) -> None:
        if self.broken:
            raise RuntimeError("injected")
        self.done.append(data)

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return 7

    def close(self) -> None:
        self.done.append("close")

    def abort(self) -> None:
        self.done.append("abort")

    def write_eof(self) -> None:
        self.done.append("eof")


def in_loop(test: Callable[[Outbox], Awaitable[None]]) -> None:
    async def main() -> None:
        await test(Outbox())

    asyncio.run(main())


def wrapped(outbox: Outbox, inner: Inner):  # type: ignore[no-untyped-def] # a transport by what it can, not by name
    return outbox.wrap(inner)  # type: ignore[arg-type]


def test_one_iterations_writes_leave_as_one_and_in_order() -> None:
    async def test(outbox: Outbox) -> None:
        first, second = Inner(), Inner()
        one, two = wrapped(outbox, first), wrapped(outbox, second)
        one.write(b"a")
        two.write(b"b")
        one.writelines([b"c", b"d"])
        assert (first.done, second.done) == ([], [])
        assert one.get_write_buffer_size() == 3 + 7
        await asyncio.sleep(0)
        assert (first.done, second.done) == ([b"acd"], [b"b"])
        one.write(b"e")
        await asyncio.sleep(0)
        assert first.done == [b"acd", b"e"]
        assert one.get_write_buffer_size() == 7

    in_loop(test)


def test_what_is_large_leaves_at_once_behind_what_waits() -> None:
    async def test(outbox: Outbox) -> None:
        inner = Inner()
        transport = wrapped(outbox, inner)
        transport.write(LARGE)
        transport.write(b"a")
        transport.write(LARGE)
        assert inner.done == [LARGE, b"a" + LARGE]
        for _ in range(3):
            transport.write(LARGE[: HELD_BYTES // 2])
        assert inner.done[2:] == [LARGE[: HELD_BYTES // 2] * 3]  # little by little it is large as well
        transport.write(b"b")
        await asyncio.sleep(0)
        assert inner.done[3:] == [b"b"]

    in_loop(test)


def test_a_full_iteration_does_not_wait_for_its_end() -> None:
    async def test(outbox: Outbox) -> None:
        inners = [Inner() for _ in range(MOST_HELD + 1)]
        for inner in inners:
            wrapped(outbox, inner).write(b"a")
        assert [inner.done for inner in inners] == [[b"a"]] * MOST_HELD + [[]]
        await asyncio.sleep(0)
        assert inners[-1].done == [b"a"]

    in_loop(test)


@pytest.mark.parametrize(
    ("end", "left"), [("close", [b"a", "close"]), ("write_eof", [b"a", "eof"]), ("abort", ["abort"])]
)
def test_a_close_lets_what_waits_go_first_and_a_cut_drops_it(end: str, left: list[bytes | str]) -> None:
    async def test(outbox: Outbox) -> None:
        inner = Inner()
        transport = wrapped(outbox, inner)
        transport.write(b"a")
        getattr(transport, end)()
        assert inner.done == left
        await asyncio.sleep(0)
        assert inner.done == left

    in_loop(test)


def test_what_nobody_can_get_any_more_is_dropped() -> None:
    async def test(outbox: Outbox) -> None:
        gone, there = Inner(), Inner()
        wrapped(outbox, gone).write(b"a")
        wrapped(outbox, there).write(b"b")
        gone.closing = True
        await asyncio.sleep(0)
        assert (gone.done, there.done) == ([], [b"b"])

    in_loop(test)


def test_what_does_not_wait_leaves_at_once_behind_what_does() -> None:
    async def test(outbox: Outbox) -> None:
        inner = Inner()
        transport = wrapped(outbox, inner)
        transport.write(b"a")
        transport.write_now(b"b")
        assert inner.done == [b"a", b"b"]
        transport.write_now(b"c")
        inner.closing = True
        transport.write_now(b"d")  # nobody can get that any more
        await asyncio.sleep(0)
        assert inner.done == [b"a", b"b", b"c"]

    in_loop(test)


def test_an_end_that_comes_early_does_not_keep_back_what_is_written_after_it() -> None:
    async def test(outbox: Outbox) -> None:
        inner = Inner()
        transport = wrapped(outbox, inner)
        transport.write(b"a")
        outbox.flush()
        transport.write(b"b")
        assert inner.done == [b"a"]
        await asyncio.sleep(0)
        assert inner.done == [b"a", b"b"]

    in_loop(test)


def test_a_write_that_fails_costs_its_own_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    async def test(outbox: Outbox) -> None:
        broken, sound = Inner(), Inner()
        broken.broken = True
        wrapped(outbox, broken).write(b"a")
        wrapped(outbox, sound).write(b"b")
        await asyncio.sleep(0)
        assert (broken.done, sound.done) == (["abort"], [b"b"])

    with caplog.at_level(logging.ERROR):
        in_loop(test)
    assert "a write failed" in caplog.text


def test_a_write_that_causes_another_one_loses_neither() -> None:
    """A transport may call back while it is written to (``pause_writing``)."""

    async def test(outbox: Outbox) -> None:
        second = Inner()
        other = wrapped(outbox, second)

        class Talkative(Inner):
            def write(self, data: bytes) -> None:
                super().write(data)
                other.write(b"b")

        first = Talkative()
        wrapped(outbox, first).write(b"a")
        await asyncio.sleep(0)
        assert first.done == [b"a"]
        await asyncio.sleep(0)
        assert second.done == [b"b"]

    in_loop(test)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_on_real_sockets_it_is_a_transport_like_any_other(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    paused: list[bool] = []

    class Protocol(asyncio.Protocol):
        def pause_writing(self) -> None:
            paused.append(True)

        def resume_writing(self) -> None:
            paused.append(False)

    async def main() -> None:
        near, far = socket.socketpair()
        far.setblocking(False)
        loop = asyncio.get_running_loop()
        inner, protocol = await loop.create_connection(Protocol, sock=near)
        transport = Outbox().wrap(inner)
        assert transport.get_extra_info("socket") is not None
        assert transport.get_protocol() is protocol
        transport.set_protocol(protocol)
        transport.set_write_buffer_limits(high=HELD_BYTES)
        assert transport.get_write_buffer_limits()[1] == HELD_BYTES
        transport.pause_reading()
        assert not transport.is_reading()
        transport.resume_reading()
        assert transport.is_reading()
        sent = b""
        while not paused:  # a reader that does not read
            piece = b"%d," % len(sent) * 999
            transport.write(piece)
            sent += piece
            await asyncio.sleep(0)
        assert transport.can_write_eof()
        transport.write(b"end")
        transport.write_eof()
        got = b""
        while piece := await loop.sock_recv(far, 65536):
            got += piece
        assert got == sent + b"end"
        assert paused == [True, False]
        transport.close()
        assert transport.is_closing()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        transport.flush()
        far.close()

    loop = new_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(main(), 10))
    finally:
        loop.close()
