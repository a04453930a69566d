"""Bytes that are no honest requests, limits of size and time, and connections that are used in unusual ways."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.aio import eventually
from tests.support.data_plane import LAUNCH, Plane, instance, request, run, running
from tests.support.malformed import BODY, HONEST, SMUGGLING, chunked, data
from tests.support.raw_upstream import RawUpstream, Visit, answer
from vllm_bootstrap.gateway import GatewayLimits, entry
from vllm_bootstrap.gateway.head import Head, HeadLimits, parse_head


@pytest.mark.parametrize("name", SMUGGLING)
def test_ambiguous_requests_are_refused_and_reach_nobody(tmp_path: Path, name: str) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                await wire.send(SMUGGLING[name] + request("GET", "/smuggled"))
                reply = await wire.reply()
                assert reply.status == 400
                assert reply.json["src"] == "vllm-bootstrap"
                assert reply.json["error"]["type"] == "invalid_request_error"
                assert reply.header("connection") == "close"
                assert reply.header("x-request-id")
                assert await wire.at_end() == b""
            assert engine.requests == []
            assert plane.in_use() == 0

    run(main())


@pytest.mark.parametrize("raw", HONEST)
def test_one_meaning_on_both_sides(tmp_path: Path, raw: bytes) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            for step in (len(raw), 7, 1):
                async with plane.wire() as wire:
                    for at in range(0, len(raw), step):
                        await wire.send(raw[at : at + step])
                        if step == 1 and at % 16 == 0:
                            await asyncio.sleep(0)
                    assert (await wire.reply()).status == 200
                visit = engine.requests[-1]
                assert visit.body == BODY
                assert visit.header(b"content-length") == [b"%d" % len(BODY)]
                assert visit.header(b"transfer-encoding") == visit.header(b"trailer") == []
                assert visit.header(b"x-vllm-priority") == [b"0"]
            assert len(engine.requests) == 3

    run(main())


def test_requests_sent_ahead_are_served_in_order(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                await wire.send(b"".join([
                    request(headers=[("X-Request-Id", "1")]), request("GET", "/page?2"),
                    request(headers=[("X-Request-Id", "3")]), request("POST", "/control", {"a": 4}),
                    request("POST", "/v1/nope", headers=[("X-Request-Id", "5")]),
                    request(headers=[("X-Request-Id", "6")]),
                ]))  # fmt: skip
                replies = [await wire.reply() for _ in range(6)]
            assert [reply.status for reply in replies] == [200, 200, 200, 200, 404, 200]
            assert [reply.header("x-request-id") for reply in replies] == ["1", None, "3", None, "5", "6"]
            assert replies[3].json["path"] == "/control"

    run(main())


@pytest.mark.parametrize("cut", ["nowhere", "in heads", "in bodies", "everywhere"])
def test_heads_that_come_again_frame_their_bodies_all_the_same(tmp_path: Path, cut: str) -> None:
    """From its third time on a head is known by heart, and a body that came with it is not read by llhttp any more."""
    inner = request("POST", "/v1/completions", {"model": "model", "prompt": "smuggled"}).decode()
    bodies = [
        json.dumps({"model": "model", "prompt": n * (inner + "\r\n\r\n")}).encode() for n in (0, 1, 0, 2, 3, 1, 9, 0)
    ]
    raw = b"".join(request(raw_body=body) for body in bodies)
    first = len(request(raw_body=bodies[0]))
    cuts = {
        "nowhere": [len(raw)],
        "in heads": [first + 20, 2 * first, len(raw)],
        "in bodies": [first - 3, raw.rindex(b"smuggled"), len(raw)],
        "everywhere": [*range(0, len(raw), 7), len(raw)],
    }[cut]

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                for start, end in zip([0, *cuts], cuts, strict=False):
                    await wire.send(raw[start:end])
                replies = [await wire.reply() for _ in bodies]
                assert [reply.status for reply in replies] == [200] * len(bodies)
                await wire.send(request(raw_body=bodies[1]) + b"X")
                assert (await wire.reply()).status == 200
            assert [visit.body for visit in engine.requests] == [*bodies, bodies[1]]
            assert plane.in_use() == 0
            assert plane.gateway.body_bytes == 0

    run(main())


@pytest.mark.interpreted
def test_a_head_that_comes_again_after_keys_were_changed_is_read_anew_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bytes] = []

    def parse(raw: bytes, limits: HeadLimits) -> Head:
        read.append(raw)
        return parse_head(raw, limits)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                for times in range(6):
                    if times == 3:
                        monkeypatch.setattr(entry, "parse_head", parse)
                        plane.gateway.guard._keys.reload()
                    await wire.send(request())
                    assert (await wire.reply()).status == 200
            assert len(read) == 1

    run(main())


@pytest.mark.parametrize("known", [0, 2])
@pytest.mark.parametrize("how", ["length", "chunks"])
def test_a_refusal_at_the_end_of_a_body_does_not_disturb_what_was_sent_ahead(
    tmp_path: Path, known: int, how: str
) -> None:
    """The answer is given from within the parser, which must not be called for the next request until it returns."""
    body = b'{"model": "nope", "prompt": "x"}'
    bad = request(raw_body=body) if how == "length" else data(chunked(body))
    good = [request(headers=[("X-Request-Id", str(number))]) for number in range(3)]

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                for _ in range(known):
                    await wire.send(request())
                    assert (await wire.reply()).status == 200
                await wire.send(bad[:-10])
                await eventually(lambda: len(plane.gateway.inflight) == 1)
                await wire.send(bad[-10:] + (b"".join(good) if how == "length" else b""))
                assert (await wire.reply()).code == "model_not_found"
                if how == "chunks":  # what comes behind chunks in one piece costs the connection (see below)
                    await wire.send(b"".join(good))
                replies = [await wire.reply() for _ in good]
            assert [(reply.status, reply.header("x-request-id")) for reply in replies] == [
                (200, "0"), (200, "1"), (200, "2"),
            ]  # fmt: skip
            assert len(engine.requests) == known + len(good)
            assert plane.in_use() == plane.gateway.body_bytes == 0

    run(main())


def test_a_bad_head_behind_a_head_request_is_refused_in_full(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, plane.wire() as wire:
            await wire.send(request("HEAD", "/control"))
            assert (await wire.reply(head_only=True)).status == 200
            await wire.send(b"no request\r\n\r\n")
            assert (await wire.reply()).code == "bad_request"
            assert await wire.at_end() == b""

    run(main())


def test_too_much_sent_ahead_closes_after_the_answer(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def script(visit: Visit) -> None:
        await release.wait()
        await visit.send(answer())

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                await wire.send(request())
                await eventually(lambda: engine.requests)
                await wire.send(b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000)
                wire.writer.write(b"x" * 10)
                await asyncio.sleep(0.05)  # nothing observable happens: it is dropped
                release.set()
                reply = await wire.reply()
                assert (reply.status, reply.header("connection")) == (200, "close")
                assert await wire.at_end() == b""

    run(main())


def test_a_request_behind_a_chunked_one_costs_the_connection(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            for raw in (data(chunked(BODY)), data(chunked(b"{}"), path="/control")):
                async with plane.wire() as wire:
                    await wire.send(raw + request("GET", "/second"))
                    assert (await wire.reply()).status == 200
                    assert await wire.at_end() == b""
            assert len(engine.requests) == 1

    run(main())


def test_a_client_that_asks_first_whether_to_send(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            raw = request(headers=[("Expect", "100-continue")])
            head, _, body = raw.partition(b"\r\n\r\n")
            async with plane.wire() as wire:
                await wire.send(head + b"\r\n\r\n")
                status, _, _ = await wire.head()
                assert status == 100
                await wire.send(body)
                assert (await wire.reply()).status == 200
                assert engine.requests[-1].header(b"expect") == []
            async with plane.wire() as wire:  # refused: the body never comes, and none is waited for
                await wire.send(head.replace(b"sk-realtime", b"sk-wrong") + b"\r\n\r\n")
                reply = await wire.reply()
                assert (reply.status, reply.header("connection")) == (401, "close")
            async with plane.wire() as wire:
                await wire.send(request("POST", "/control", {}, headers=[("Expect", "100-continue")]))
                assert (await wire.reply()).json["control"] is True

    run(main())


def test_an_early_refusal_keeps_the_connection_where_little_is_unread(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, plane.wire() as wire:
            raw = request(key="sk-wrong", raw_body=b"x" * 1000)
            for _ in range(2):
                await wire.send(raw[:200])
                reply = await wire.reply()
                assert (reply.status, reply.header("connection")) == (401, None)
                await wire.send(raw[200:])

    run(main())


@pytest.mark.parametrize("size", [2000, 10_000_000])
def test_bodies_that_are_too_large(tmp_path: Path, size: int) -> None:
    async def main() -> None:
        limits = GatewayLimits(max_body_bytes=1024, max_control_body_bytes=1024)
        async with running(tmp_path, limits) as plane:
            for path in ("/v1/completions", "/control"):
                for raw in (request(path=path, raw_body=b"x" * size), data(chunked(b"x" * size), path=path)):
                    async with plane.wire() as wire:
                        sending = asyncio.create_task(_send_anyway(wire, raw))
                        reply = await wire.reply()
                        assert (reply.status, reply.code) == (413, "request_too_large")
                        sending.cancel()
                        await asyncio.gather(sending, return_exceptions=True)
            assert plane.gateway.body_bytes == 0

    run(main())


async def _send_anyway(wire: Any, raw: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        await wire.send(raw)


@pytest.mark.parametrize("path", ["/v1/completions", "/control"])
def test_heads_that_are_too_large(tmp_path: Path, path: str) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane:
            for raw in (
                request(path=path, headers=[("X-Large", "x" * 1_000_000)]),
                request(path=path, headers=[(f"X-{n}", "y") for n in range(300)]),
                request("GET", path + "?" + "q" * 20_000),
                b"GET /" + b"x" * 100_000,
            ):
                async with plane.wire() as wire:
                    sending = asyncio.create_task(_send_anyway(wire, raw))
                    reply = await wire.reply()
                    assert (reply.status, reply.code) == (431, "headers_too_large")
                    await sending
            assert (await plane.ask("GET", "/healthz")).status == 200

    run(main())


def test_slow_clients_are_shut_out_and_nobody_else(tmp_path: Path) -> None:
    async def main() -> None:
        limits = GatewayLimits(header_timeout_s=0.3, body_timeout_s=0.3, keep_alive_s=0.5)
        async with running(tmp_path, limits) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            bodies = [request()[:-5], request("POST", "/control", {"a": 1})[:-3]]
            starts = [b"G", request()[:60], request(path="/control")[:60], *bodies]
            drips = [asyncio.create_task(_drip(plane, start)) for start in starts]
            silent = await plane.connect()
            idle = await plane.connect()
            await idle.send(request())
            assert (await idle.reply()).status == 200
            for _ in range(5):
                assert (await plane.ask()).status == 200
                assert (await plane.ask("GET", "/healthz")).status == 200
            assert await asyncio.gather(*drips) == [408] * len(starts)
            assert await silent.at_end() == b""  # said nothing: closed without a word
            assert await idle.at_end() == b""
            assert not plane.gateway.connections
            assert not plane.gateway.idle
            assert plane.gateway.body_bytes == 0

    run(main())


async def _drip(plane: Plane, start: bytes) -> int:
    """Send byte after byte and never finish. The status of the refusal."""
    async with plane.wire() as wire:
        await wire.send(start)

        async def more() -> None:
            while True:
                await asyncio.sleep(0.02)
                await wire.send(b"x" if b"\r\n\r\n" not in start else b"")

        drip = asyncio.create_task(more())
        reply = await wire.reply()
        drip.cancel()
        await asyncio.gather(drip, return_exceptions=True)
        assert reply.code == "request_timeout"
        assert reply.header("connection") == "close"
        return reply.status


def test_a_body_that_keeps_coming_is_not_cut(tmp_path: Path) -> None:
    async def main() -> None:
        limits = GatewayLimits(body_timeout_s=0.5)
        async with running(tmp_path, limits) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            raw = request(body={"model": "model", "prompt": "x" * 60_000})
            async with plane.wire() as wire:
                for at in range(0, len(raw), 4000):
                    await wire.send(raw[at : at + 4000])
                    await asyncio.sleep(0.05)  # the pace is the point: 0.8 s in all
                assert (await wire.reply()).status == 200

    run(main())


def test_idle_connections_make_room_and_busy_ones_do_not(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        await visit.gone()

    async def main() -> None:
        limits = GatewayLimits(max_connections=4)
        async with running(tmp_path, limits) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            idle = [await plane.connect() for _ in range(4)]
            await eventually(lambda: len(plane.gateway.idle) == 4)
            assert (await plane.ask("GET", "/healthz")).status == 200
            assert await idle[0].at_end() == b""  # the oldest had to go
            busy = [await plane.connect() for _ in range(4)]
            for wire in busy:
                await wire.send(request())
            await eventually(lambda: len(engine.requests) == 4)
            reply = await plane.ask("GET", "/healthz")
            assert (reply.status, reply.code, reply.header("retry-after")) == (503, "overloaded", "1")
            for wire in busy:
                wire.close()
            await eventually(lambda: plane.in_use() == 0)
            assert (await plane.ask("GET", "/healthz")).status == 200

    run(main())


def test_upgrades_nobody_speaks_are_ignored(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            upgrade = [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAA")]
            async with plane.wire() as wire:
                for _ in range(2):
                    await wire.send(request(headers=upgrade))
                    assert (await wire.reply()).status == 200
                    await wire.send(request("GET", f"/proxy/{LAUNCH}/health", headers=upgrade))
                    assert (await wire.reply()).status == 200
                    await wire.send(request("GET", "/control", headers=upgrade))
                    assert (await wire.reply()).status == 200
            assert all(visit.header(b"upgrade") == visit.header(b"http2-settings") == [] for visit in engine.requests)

    run(main())


def test_head_requests_and_http_1_0(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        if visit.head.startswith(b"HEAD"):
            await visit.send(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\nx-a: b\r\n\r\n")
        else:
            await visit.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                for path in (f"/proxy/{LAUNCH}/health", "/control", f"/proxy/{LAUNCH}/nope", f"/proxy/{LAUNCH}/health"):
                    await wire.send(request("HEAD", path))
                    reply = await wire.reply(head_only=True)
                    assert reply.status == (404 if "nope" in path else 200)
                    assert reply.header("content-length") not in (None, "0")
            async with plane.wire() as wire:
                await wire.send(request().replace(b"HTTP/1.1", b"HTTP/1.0"))
                reply = await wire.reply()
                assert reply.body == b"hello"
                assert reply.header("transfer-encoding") is None
                assert reply.header("connection") == "close"

    run(main())


def test_an_app_that_fails_or_is_slow_to_read(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        if scope["path"] == "/early":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})
            return
        raise RuntimeError("the app is broken")

    async def main() -> None:
        async with running(tmp_path, GatewayLimits(max_control_body_bytes=100_000), app=app) as plane:
            async with plane.wire() as wire:
                await wire.send(request("POST", "/early", raw_body=b"", headers=[("Content-Length", "50000")]))
                assert (await wire.reply()).body == b"ok"
                await wire.send(b"x" * 50_000 + request("POST", "/early", {}))
                assert (await wire.reply()).body == b"ok"
                await wire.send(data(b"1\r\na\r\n", path="/early"))
                assert (await wire.reply()).body == b"ok"
                assert await wire.at_end() == b""  # where the rest ends is not known
            async with plane.wire() as wire:
                await wire.send(data(b"1\r\na\r\n5\r\n", path="/late"))
                assert (await wire.head())[0] == 200
                await wire.send(b"hello, nonsense\r\n")
                assert await wire.at_end() == b""  # cut: the answer had begun
            assert (await plane.ask("GET", "/broken")).status == 500
            async with plane.wire() as wire:
                await wire.send(request("GET", "/late", headers=[("Connection", "close")]))
                assert (await wire.head())[0] == 200
                plane.gateway.close()
                assert await wire.at_end() == b""

    run(main())


def test_control_requests_in_pieces(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane:
            raw = request("POST", "/control?a", {"some": "body" * 100})
            async with plane.wire() as wire:
                for at in range(0, len(raw), 11):
                    await wire.send(raw[at : at + 11])
                assert (await wire.reply()).json["size"] == len(json.dumps({"some": "body" * 100}))

    run(main())
