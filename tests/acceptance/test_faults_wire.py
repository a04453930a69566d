"""Bytes on the wire of a running daemon, on both sides: raw clients before it, and behind it an engine whose every byte
is the test's. One meaning or none, nothing changed on the way, and nobody else disturbed."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import openai
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import Event
from websockets.server import ServerProtocol

from tests.support.aio import eventually
from tests.support.daemon import DaemonProcess
from tests.support.data_plane import Reply, Wire, ask_on, request, wire_to
from tests.support.malformed import AFTER_HEADERS, BEFORE_HEADERS, BODY, BROKEN, HONEST, SMUGGLING
from tests.support.raw_upstream import EVENTS, LAST_CHUNK, RawUpstream, Script, Visit, answer, chunk

SLOTS, QUEUED, PARALLEL, CROWD = 300, 100, 50, 500
MIB = 1024 * 1024
KEYS = {"keys": [
    {"name": "root", "token": "sk-admin", "scopes": ["admin", "monitor", "realtime"]},
    {"name": "rt", "token": "sk-realtime", "scopes": ["realtime"]},
    {"name": "bulk", "token": "sk-batch", "scopes": ["batch"]},
    {"name": "fifty", "token": "sk-fifty", "scopes": ["realtime"], "max_parallel": PARALLEL},
]}  # fmt: skip
LISTED = b'{"object":"list","data":[{"id":"model","object":"model"}]}'
ROUTES = [
    "GET /health", "GET /v1/models", "POST /v1/completions", "POST /v1/chat/completions", "POST /v1/messages",
    "POST /v1/audio/transcriptions", "GET /v1/realtime",
    {"method": "HEAD", "path": "/v1/models", "scopes": ["realtime"]},
]  # fmt: skip
UPLOADED_MB = 200
LARGE_EVENT = b"data: " + b"x" * 5_000_000 + b"\n\n"
EVENT_STREAM = 'data: {"é": "日本"}\r\n\r\ndata: x\n\n: comment\n\ndata: [DONE]\n\n'.encode()


def closing(raw: bytes) -> Script:
    """Send this and close."""

    async def script(visit: Visit) -> None:
        with contextlib.suppress(ConnectionError):
            await visit.send(raw)
        visit.writer.close()

    return script


async def packing(visit: Visit) -> None:
    """An answer as an engine behind a compressing proxy would give it: whole, or as events."""
    choice = {"index": 0, "text": "packed", "finish_reason": "stop", "logprobs": None}
    told = {"id": "c", "object": "text_completion", "created": 1, "model": "model", "choices": [choice]}
    text, packed = json.dumps(told).encode(), b"content-encoding: gzip\r\n"
    if not json.loads(visit.body).get("stream"):
        await visit.send(answer(gzip.compress(text), headers=packed))
        return
    await visit.send(EVENTS[:-2] + packed + b"\r\n")
    events = gzip.compress(b"data: " + text + b"\n\ndata: [DONE]\n\n")
    await visit.send(*(chunk(events[at : at + 20]) for at in range(0, len(events), 20)), LAST_CHUNK)


class Box:
    """``script`` is what the engine does with whatever is no probe of the daemon's."""

    def __init__(self, daemon: DaemonProcess, engine: RawUpstream, runner: asyncio.Runner) -> None:
        self.daemon, self.engine, self.runner = daemon, engine, runner
        self.script: Script | None = None
        engine.script = self._play
        self.launch_id = ""

    async def _play(self, visit: Visit) -> None:
        if visit.head.startswith(b"GET /health"):
            self.engine.requests.remove(visit)
            await visit.send(answer())
        elif self.script is None:
            await visit.send(answer(LISTED))
        else:
            await self.script(visit)

    def run(self, main: Any, script: Script | None = None) -> None:
        """Run a test with an engine that has seen nothing yet."""
        self.script = script
        self.engine.requests.clear()
        self.runner.run(asyncio.wait_for(main, 60))
        self.engine.abort_all()
        self.script = closing(answer(LISTED, keep=False))  # the next test begins without kept connections
        assert self.runner.run(self.ask()).body == LISTED  # whatever that was, nobody else suffers from it
        self.script = None

    def wire(self) -> AbstractAsyncContextManager[Wire]:
        return wire_to(self.daemon.address, 8 * MIB)

    async def ask(self, *args: Any, **kwargs: Any) -> Reply:
        return await ask_on(self.wire(), *args, **kwargs)

    def rss_mb(self) -> float:
        lines = Path(f"/proc/{self.daemon.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@contextlib.contextmanager
def boxed(folder: Path, **settings: Any) -> Iterator[Box]:
    engine = RawUpstream(folder / "e")
    daemon = DaemonProcess(
        key="sk-admin", devices="mock:1", auth_keys_file=folder / "keys.json", engines_file=folder / "engines.json",
        **settings,
    )  # fmt: skip
    (folder / "keys.json").write_text(json.dumps(KEYS))
    entry = {
        "kind": "external", "uds": str(engine.path), "served_names": ["model"], "slots": SLOTS, "priority": "header",
        "routes": ROUTES,
    }  # fmt: skip
    (folder / "engines.json").write_text(json.dumps({"engines": {"raw": entry}}))
    with asyncio.Runner() as runner, daemon:
        running = engine.running()
        runner.run(running.__aenter__())
        try:
            box = Box(daemon, engine, runner)
            ready = asyncio.to_thread(daemon.ready, "model", engine="raw")
            box.launch_id = runner.run(ready)["launch_id"]
            yield box
        finally:
            runner.run(running.__aexit__(None, None, None))
        assert "Traceback" not in daemon.log


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with boxed(tmp_path_factory.mktemp("e"), max_in_flight_requests=QUEUED) as box:
        yield box


# -- what clients send -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMUGGLING)
def test_fault_21_a_request_with_two_meanings_reaches_nobody(box: Box, name: str) -> None:
    async def main() -> None:
        async with box.wire() as wire:
            await wire.send(SMUGGLING[name] + request("GET", "/v1/models"))
            reply = await wire.reply()
            assert (reply.status, reply.header("connection")) == (400, "close")
            assert reply.json["src"] == "vllm-bootstrap"
            assert await wire.at_end() == b""
        assert box.engine.requests == []

    box.run(main())


def test_fault_21_one_meaning_on_both_sides_however_it_is_cut(box: Box) -> None:
    async def main() -> None:
        for raw in HONEST:
            for step in (len(raw), 7, 1):
                async with box.wire() as wire:
                    for at in range(0, len(raw), step):
                        await wire.send(raw[at : at + step])
                    assert (await wire.reply()).status == 200
                (visit,) = box.engine.requests
                assert visit.body == BODY
                assert visit.header(b"content-length") == [b"%d" % len(BODY)]
                assert visit.header(b"transfer-encoding") == []
                box.engine.requests.clear()

    box.run(main())


def test_fault_21_requests_sent_ahead_are_answered_in_order(box: Box) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(answer(json.dumps(json.loads(visit.body)["prompt"]).encode()))

    async def main() -> None:
        bodies = [{"model": "model", "prompt": number} for number in range(50)]
        async with box.wire() as wire:
            await wire.send(b"".join(request(body=body) for body in bodies))
            assert [(await wire.reply()).json for _ in bodies] == list(range(50))
        assert [json.loads(visit.body) for visit in box.engine.requests] == bodies

    box.run(main(), script)


def test_fault_20_slow_and_oversized_requests_are_refused_and_stop_nobody(tmp_path: Path) -> None:
    """At once: heads and bodies that never end, too large heads, too many headers, too long bodies; and meanwhile the
    honest."""

    async def one(raw: bytes) -> tuple[int, str]:
        async with mine.wire() as wire:
            with contextlib.suppress(ConnectionError):
                await wire.send(raw)
            reply = await wire.reply()
            return reply.status, reply.code

    async def honest() -> None:
        for _ in range(5):
            assert (await mine.ask()).status == 200
            assert (await mine.ask("GET", f"/status/{mine.launch_id}", key="sk-admin")).status == 200
            assert (await mine.ask("GET", "/healthz")).status == 200

    async def main() -> None:
        declared = request(raw_body=b"", headers=[("Content-Length", str(MIB + 1))])
        refused: list[tuple[bytes, tuple[int, str]]] = [
            *[(request()[:60], (408, "request_timeout"))] * 20,
            *[(request()[:-5], (408, "request_timeout"))] * 20,
            *[(request("POST", "/launch", {"model": "a"}, key="sk-admin")[:-3], (408, "request_timeout"))] * 20,
            (request(headers=[("X-Large", "x" * 1_000_000)]), (431, "headers_too_large")),
            (request(headers=[(f"X-{n}", "y") for n in range(300)]), (431, "headers_too_large")),
            (request("GET", "/healthz", headers=[(f"X-{n}", "y") for n in range(300)]), (431, "headers_too_large")),
            (declared, (413, "request_too_large")),
            (request(raw_body=b"x" * (MIB + 1)), (413, "request_too_large")),
            (
                request(raw_body=chunk(b"x" * (MIB + 1)), headers=[("Transfer-Encoding", "chunked")]),
                (413, "request_too_large"),
            ),
        ]
        ends = asyncio.gather(*(one(raw) for raw, _ in refused))
        await honest()
        assert await ends == [wanted for _, wanted in refused]

    with boxed(tmp_path, header_timeout_s=1, body_timeout_s=1, max_body_bytes=MIB) as mine:
        mine.run(main())


def test_fault_22_what_a_client_says_to_the_daemon_does_not_reach_the_engine(box: Box) -> None:
    forged = [
        ("Connection", "x-vllm-priority, authorization, x-mine"), ("X-Mine", "forged"), ("TE", "trailers, forged"),
        ("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "forged"),
        ("Proxy-Authorization", "Basic forged"), ("Cookie", "a=forged"), ("Referer", "http://127.0.0.1/forged"),
        ("X-Forwarded-For", "forged"), ("X-Forwarded-Host", "forged"), ("X-Forwarded-Proto", "forged"),
        ("Forwarded", "for=forged"), ("X-Real-IP", "forged"), ("Via", "forged"), ("Keep-Alive", "forged"),
        ("X-Kept", "kept"),
    ]  # fmt: skip

    async def main() -> None:
        assert (await box.ask(headers=forged)).status == 200
        (visit,) = box.engine.requests
        assert b"forged" not in visit.head
        assert b"sk-" not in visit.head
        assert not visit.header(b"connection")
        assert not visit.header(b"upgrade")
        assert visit.header(b"x-vllm-priority") == [b"0"]
        assert visit.header(b"x-kept") == [b"kept"]

    box.run(main())


@pytest.mark.parametrize("name", ["no host", "two hosts", "empty host", "host with path", "target without slash"])
def test_fault_25_a_strange_host_or_target_opens_nothing(box: Box, name: str) -> None:
    async def main() -> None:
        keyed = SMUGGLING[name]
        for raw, allowed in ((keyed, {400}), (keyed.replace(b"Authorization", b"X-Nothing"), {400, 401})):
            for path in (b"/v1/completions", b"/launches", b"/healthz/../launches"):
                async with box.wire() as wire:
                    await wire.send(raw.replace(b"v1/completions", path[1:]))
                    assert (await wire.reply()).status in allowed
        assert box.engine.requests == []

    box.run(main())


def test_fault_27_priority_is_the_scopes_and_not_the_clients(box: Box) -> None:
    wishes: list[tuple[str, list[tuple[str, str]], dict[str, Any], bytes]] = [
        ("sk-realtime", [("X-Vllm-Priority", "-999999"), ("X-data-parallel-rank", "1")], {"priority": -999999}, b"0"),
        ("sk-batch", [("X-Vllm-Priority", "-999999"), ("X-Priority", "realtime")], {"priority": -999999}, b"100"),
        ("sk-realtime", [("X-Priority", "batch"), ("x_vllm_priority", "-5")], {}, b"100"),
    ]

    async def main() -> None:
        for key, headers, fields, priority in wishes:
            body = {"model": "model", "prompt": "x", **fields}
            assert (await box.ask(body=body, key=key, headers=headers)).status == 200
            visit = box.engine.requests[-1]
            assert visit.header(b"x-vllm-priority") == [priority]
            assert not visit.header(b"x-data-parallel-rank")
            assert b"priority" not in visit.body
            assert b"-999999" not in visit.head

    box.run(main())


def stock_client(box: Box, key: str = "sk-realtime") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{box.daemon.url}/v1", api_key=key, max_retries=0, timeout=20)


def test_fault_27_nor_can_the_stock_client_choose_its_priority(box: Box) -> None:
    wishes: Any = {
        "extra_headers": {"X-Vllm-Priority": "-999999", "X-data-parallel-rank": "1", "X-Kept": "kept"},
        "extra_body": {"priority": -999999, "ignore_eos": True},
    }

    async def main() -> None:
        for key, priority in (("sk-realtime", b"0"), ("sk-batch", b"100")):
            async with stock_client(box, key) as client:
                assert (await client.completions.create(model="model", prompt="x", **wishes)).choices[
                    0
                ].text == "packed"
            visit = box.engine.requests[-1]
            assert visit.header(b"x-vllm-priority") == [priority]
            assert not visit.header(b"x-data-parallel-rank")
            assert visit.header(b"x-kept") == [b"kept"]
            assert json.loads(visit.body) == {"model": "model", "prompt": "x", "ignore_eos": True}

    box.run(main(), packing)


def test_fault_28_five_hundred_at_once_meet_exact_limits(box: Box) -> None:
    release = asyncio.Event()

    async def script(visit: Visit) -> None:
        await release.wait()
        await visit.send(answer(LISTED))

    async def crowd(key: str, running: int, refused: int, code: str) -> None:
        release.clear()
        box.engine.requests.clear()
        tasks = [asyncio.create_task(box.ask(key=key)) for _ in range(CROWD)]
        await eventually(lambda: len(box.engine.requests) == running and sum(t.done() for t in tasks) == refused, 30)
        early = [task.result() for task in tasks if task.done()]
        assert Counter((reply.status, reply.code) for reply in early) == {(429, code): refused}
        assert all(1 <= int(reply.header("retry-after") or 0) <= 60 for reply in early)
        assert {reply.json["error"]["type"] for reply in early} == {"rate_limit_error"}
        release.set()
        ends = Counter(reply.status for reply in await asyncio.gather(*tasks))
        assert ends == {200: CROWD - refused, 429: refused}
        assert len(box.engine.requests) == CROWD - refused

    async def main() -> None:
        for _ in range(2):  # a limit that is reached once is there again
            await crowd("sk-fifty", PARALLEL, CROWD - PARALLEL, "concurrency_limit")
            await crowd("sk-realtime", SLOTS, CROWD - SLOTS - QUEUED, "queue_full")

    box.run(main(), script)


# -- what engines send -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BEFORE_HEADERS)
def test_fault_23_what_is_no_answer_is_a_502_and_is_asked_once(box: Box, name: str) -> None:
    async def main() -> None:
        async with box.wire() as wire:
            await wire.send(request())
            reply = await wire.reply()
            assert (reply.status, reply.code) == (502, "upstream_error")
            assert len(box.engine.requests) == 1

    box.run(main(), closing(BEFORE_HEADERS[name]))


def test_fault_23_answers_that_break_are_told_from_whole_ones(box: Box) -> None:
    async def events(raw: bytes) -> None:
        box.script = closing(raw)
        reply = await box.ask()
        assert reply.status == 200
        assert b"[DONE]" not in reply.body
        told = json.loads(reply.body.rstrip(b"\n").rpartition(b"data: ")[2])
        assert told["error"]["code"] == "upstream_error"

    async def cut(raw: bytes) -> None:
        box.script = closing(raw)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await box.ask()

    async def main() -> None:
        for raw in AFTER_HEADERS.values():
            await events(raw)
        for raw in BROKEN:
            await cut(raw)
        assert len(box.engine.requests) == len(AFTER_HEADERS) + len(BROKEN)

    box.run(main())


@pytest.mark.parametrize("extra", [b"more", b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbad"])
def test_fault_21_what_follows_an_answer_is_never_read_as_another(box: Box, extra: bytes) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(answer(b"good") + extra)

    async def main() -> None:
        async with box.wire() as wire:
            for _ in range(3):
                await wire.send(request())
                assert (await wire.reply()).body == b"good"
        assert len({visit.connection for visit in box.engine.requests}) == 3

    box.run(main(), script)


def test_fault_23_an_engine_that_closes_idle_connections_is_asked_once_for_each_answer(box: Box) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(answer(LISTED))
        visit.writer.close()

    async def main() -> None:
        assert {(await box.ask()).status for _ in range(50)} == {200}
        assert len(box.engine.requests) == 50

    box.run(main(), script)


@pytest.mark.parametrize(
    ("raw", "status", "body"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 50\r\n\r\n", 304, b""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nlink: x\r\n\r\n" + answer(b"late"), 200, b"late"),
        (answer(b"no", status=b"400 Bad"), 400, b"no"),
        (answer(gzip.compress(b"packed"), headers=b"content-encoding: gzip\r\n"), 200, gzip.compress(b"packed")),
        (EVENTS + chunk(LARGE_EVENT) + LAST_CHUNK, 200, LARGE_EVENT),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 200, b""),
    ],
    ids=["204", "304", "1xx", "400", "gzip", "5 MB event", "no chunks"],
)  # fmt: skip
def test_fault_24_answers_of_every_shape_pass_as_they_are(box: Box, raw: bytes, status: int, body: bytes) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(raw)

    async def main() -> None:
        async with box.wire() as wire:
            for _ in range(2):  # and the connection is as good as before
                await wire.send(request(headers=[("Accept-Encoding", "gzip")]))
                reply = await wire.reply()
                assert (reply.status, reply.body) == (status, body)

    box.run(main(), script)


def test_fault_24_the_stock_client_reads_packed_answers_and_streams(box: Box) -> None:
    async def main() -> None:
        async with stock_client(box) as client:
            whole = await client.completions.create(model="model", prompt="x")
            assert whole.choices[0].text == "packed"
            stream = await client.completions.create(model="model", prompt="x", stream=True)
            assert [event.choices[0].text async for event in stream] == ["packed"]
        assert [b"gzip" in visit.header(b"accept-encoding")[0] for visit in box.engine.requests] == [True, True]

    box.run(main(), packing)


def test_fault_24_head_and_trailers(box: Box) -> None:
    async def script(visit: Visit) -> None:
        if visit.head.startswith(b"HEAD"):
            await visit.send(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n")
        else:
            await visit.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n")

    async def main() -> None:
        async with box.wire() as wire:
            await wire.send(request("HEAD", f"/proxy/{box.launch_id}/v1/models"))
            reply = await wire.reply(head_only=True)
            assert (reply.status, reply.header("content-length")) == (200, "500")
            await wire.send(request(headers=[("Connection", "close")]))
            assert (await wire.at_end()).endswith(b"\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n")

    box.run(main(), script)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_fault_24_a_stream_is_the_same_wherever_it_is_cut(box: Box, size: int) -> None:
    pieces = [EVENT_STREAM[at : at + size] for at in range(0, len(EVENT_STREAM), size)]

    async def script(visit: Visit) -> None:
        raw = EVENTS + b"".join(map(chunk, pieces)) + LAST_CHUNK
        await visit.send(*(raw[at : at + size] for at in range(0, len(raw), size)))

    async def main() -> None:
        reply = await box.ask()
        assert (reply.body, reply.header("x-accel-buffering")) == (EVENT_STREAM, "no")

    box.run(main(), script)


def test_fault_24_no_event_waits_for_the_next(box: Box) -> None:
    steps: asyncio.Queue[bytes] = asyncio.Queue()

    async def script(visit: Visit) -> None:
        await visit.send(EVENTS)
        while event := await steps.get():
            await visit.send(chunk(event))
        await visit.send(LAST_CHUNK)

    async def main() -> None:
        async with box.wire() as wire:
            await wire.send(request(body={"model": "model", "prompt": "x", "stream": True}))
            assert (await wire.head())[0] == 200
            chunks = wire.chunks()
            for number in range(20):
                event = b'data: {"choices":[{"index":0}],"n":%d}\n\n' % number
                steps.put_nowait(event)
                assert await anext(chunks) == event
            steps.put_nowait(b"")
            assert [one async for one in chunks] == []

    box.run(main(), script)


def test_fault_24_an_upload_of_200_mb_passes_through_little_memory(box: Box) -> None:
    seen, sent, peaks = hashlib.sha256(), hashlib.sha256(), [box.rss_mb()]
    head = (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nmodel\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    )
    piece, end = random.Random(1).randbytes(MIB), b"\r\n--b--\r\n"
    size = len(head) + UPLOADED_MB * MIB + len(end)

    async def script(visit: Visit) -> None:
        left = int(visit.header(b"content-length")[0])
        assert left == size
        while left:
            got = await visit.reader.read(min(left, MIB))
            seen.update(got)
            left -= len(got)
            peaks.append(box.rss_mb())
        await visit.send(answer(LISTED))

    async def main() -> None:
        box.engine.reads_bodies = False
        kind = [("Content-Type", "multipart/form-data; boundary=b"), ("Content-Length", str(size))]
        async with box.wire() as wire:
            await wire.send(request("POST", "/v1/audio/transcriptions", raw_body=b"", headers=kind))
            for part in (head, *[piece] * UPLOADED_MB, end):
                sent.update(part)
                await wire.send(part)
                peaks.append(box.rss_mb())
            assert (await wire.reply()).status == 200
        box.engine.reads_bodies = True
        assert seen.digest() == sent.digest()
        assert max(peaks) < peaks[0] + 30

    box.run(main(), script)


def echo(protocol: ServerProtocol, event: Event, told: list[Close]) -> None:
    """An engine's end of a websocket: the same back, and an end on wish."""
    if isinstance(event, Request):
        protocol.send_response(protocol.accept(event))
    elif not isinstance(event, Frame):
        raise AssertionError(event)
    elif event.opcode is Opcode.CLOSE:
        told.append(Close.parse(event.data))
    elif event.data == b"close":
        protocol.send_close(4321, "as asked")
    elif event.opcode is Opcode.TEXT:
        protocol.send_text(bytes(event.data))
    elif event.opcode is Opcode.BINARY:
        protocol.send_binary(bytes(event.data))


def test_fault_24_a_websocket_carries_text_bytes_pings_and_close_codes(box: Box) -> None:
    told: list[Close] = []

    async def script(visit: Visit) -> None:
        protocol = ServerProtocol(max_size=None)
        data = visit.head
        while data:
            protocol.receive_data(data)
            for event in protocol.events_received():
                echo(protocol, event, told)
            await visit.send(*(one for one in protocol.data_to_send() if one))
            data = b"" if protocol.close_expected() else await visit.reader.read(MIB)
        visit.writer.close()

    def dial() -> Any:
        host, port = box.daemon.address
        url = f"ws://{host}:{port}/v1/realtime?model=model"
        return connect(url, additional_headers={"Authorization": "Bearer sk-realtime"}, max_size=None, proxy=None)

    async def main() -> None:
        async with dial() as client:
            for message in ("text é", b"\x00\xff binary", "", b"x" * 3_000_000):
                await client.send(message)
                assert await client.recv() == message
            await (await client.ping())
            await client.send("close")
            with pytest.raises(ConnectionClosed) as closed:
                await client.recv()
            assert closed.value.rcvd == Close(4321, "as asked")
        async with dial() as client:
            await client.close(4000, "bye")
        await eventually(lambda: Close(4000, "bye") in told)

    box.run(main(), script)
