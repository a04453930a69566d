"""Token counts out of answers: asked for where clients do not, taken out again, and told to limits and records."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.aio import eventually
from tests.support.data_plane import KEYS, instance, request, run, running
from tests.support.raw_upstream import EVENTS, LAST_CHUNK, RawUpstream, Visit, answer, chunk
from vllm_bootstrap.auth.types import Principal

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
TOKENS = [b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % number for number in range(3)]
COUNTED = b'data: {"id":"c","choices":[],"usage":%b}\n\n' % json.dumps(USAGE).encode()
DONE = b"data: [DONE]\n\n"
STREAM = {"model": "model", "prompt": "x", "stream": True}


def counting(*pieces: bytes, head: bytes = EVENTS) -> Any:
    """An engine that streams ``pieces``, and its counts if it was asked for them."""

    async def script(visit: Visit) -> None:
        options = json.loads(visit.body).get("stream_options") or {}
        asked = [COUNTED] if options.get("include_usage") else []
        await visit.send(head)
        for piece in (*pieces, *asked, DONE):
            await visit.send(chunk(piece))
            await asyncio.sleep(0.002)
        await visit.send(LAST_CHUNK)

    return script


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/proxy/l00000000000000000001/v1/completions"]
)
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
def test_a_stream_is_counted_and_looks_as_if_it_was_not(tmp_path: Path, path: str, version: str) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", counting(*TOKENS)).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                await wire.send(request("POST", path, STREAM).replace(b"HTTP/1.1", version.encode(), 1))
                reply = await wire.reply()
            assert reply.body == b"".join(TOKENS) + DONE
            sent = json.loads(engine.requests[-1].body)
            assert sent == {**STREAM, "stream_options": {"include_usage": True}}
            await eventually(lambda: plane.records)
            record = plane.records[-1]
            assert (record.prompt_tokens, record.completion_tokens, record.stream) == (7, 3, True)
            assert record.inter_token_s is not None
            assert 0 < record.inter_token_s < record.duration_s
            assert record.bytes_out == len(reply.body)

    run(main())


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ("null", '{"include_usage": true}'),
        ("{}", '{"include_usage": true}'),
        ('{ "a" :1.50}', '{"include_usage": true, "a" :1.50}'),
        ('{"include_usage": false ,"b":2}', '{"include_usage": true ,"b":2}'),
        ('{"continuous_usage_stats": true}', '{"include_usage": true,"continuous_usage_stats": false}'),
    ],
)
def test_only_the_one_option_is_changed(tmp_path: Path, options: str, sent: str) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", counting(*TOKENS)).running() as engine:
            plane.announce(instance(engine.endpoint))
            body = '{"model":"model", "prompt" : "\\u00e9", "stream_options": OPTIONS,"stream":true, "x":1e2}'
            reply = await plane.ask(raw_body=body.replace("OPTIONS", options).encode())
            assert reply.body == b"".join(TOKENS) + DONE
            got = engine.requests[-1].body.decode()
            assert json.loads(got) == json.loads(body.replace("OPTIONS", sent))
            assert got.replace(" ", "") == body.replace("OPTIONS", sent).replace(" ", "")

    run(main())


@pytest.mark.parametrize(
    "body",
    [
        {**STREAM, "stream_options": {"include_usage": True}},
        {**STREAM, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {**STREAM, "stream_options": "odd"},
        {**STREAM, "stream": False},
        {**STREAM, "stream": "true"},
    ],
)
def test_who_asks_gets_and_others_are_not_touched(tmp_path: Path, body: dict[str, Any]) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(EVENTS, *map(chunk, (*TOKENS, COUNTED, DONE)), LAST_CHUNK)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            raw = json.dumps(body).encode()
            reply = await plane.ask(raw_body=raw)
            assert reply.body == b"".join(TOKENS) + COUNTED + DONE
            assert engine.requests[-1].body == raw
            assert plane.records[-1].completion_tokens == 3

    run(main())


@pytest.mark.parametrize("step", [1, 2, 7])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_stream_cut_anywhere_loses_the_extra_event_and_nothing_else(tmp_path: Path, step: int, end: bytes) -> None:
    whole = b"".join((*TOKENS[:2], b": ping\n\n", COUNTED, DONE)).replace(b"\n", end)

    async def script(visit: Visit) -> None:
        await visit.send(EVENTS)
        for at in range(0, len(whole), step):
            await visit.send(chunk(whole[at : at + step]))
            await asyncio.sleep(0)
        await visit.send(LAST_CHUNK)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            reply = await plane.ask(body=STREAM)
            assert reply.body == whole.replace(COUNTED.replace(b"\n", end), b"")
            assert plane.records[-1].prompt_tokens == 7

    run(main())


def test_a_stream_with_a_length_gets_chunks_instead(tmp_path: Path) -> None:
    whole = b"".join((*TOKENS, COUNTED, DONE))
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(whole)

    async def script(visit: Visit) -> None:
        await visit.send(head + whole)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            reply = await plane.ask(body=STREAM)
            assert reply.header("content-length") is None
            assert reply.body == b"".join(TOKENS) + DONE

    run(main())


def test_compressed_streams_are_not_looked_into(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join((*TOKENS, COUNTED, DONE)))

    async def script(visit: Visit) -> None:
        await visit.send(EVENTS.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n"), chunk(packed), LAST_CHUNK)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            reply = await plane.ask(body=STREAM)
            assert reply.body == packed
            assert plane.records[-1].completion_tokens is None

    run(main())


def test_whole_answers_are_counted(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(answer(json.dumps({"id": "c", "choices": [], "usage": USAGE}).encode()))

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            await plane.ask()
            record = plane.records[-1]
            assert (record.prompt_tokens, record.completion_tokens) == (7, 3)
            assert (record.inter_token_s, record.stream) == (None, False)

    run(main())


KEY = Principal("paid", frozenset({"realtime"}), requests_per_minute=100, tokens_per_minute=1_000)


def test_limits_settle_on_what_the_engine_counted(tmp_path: Path) -> None:
    async def main() -> None:
        keys = {**KEYS, "sk-paid": KEY}
        async with (
            running(tmp_path, keys=keys) as plane,
            RawUpstream(tmp_path / "e", counting(*TOKENS)).running() as engine,
        ):
            plane.announce(instance(engine.endpoint))
            body = {**STREAM, "max_tokens": 800}
            for number in (1, 2, 3):  # each reserves most of the minute and gives back what it did not use
                reply = await plane.ask(body=body, key="sk-paid")
                assert reply.status == 200, reply.body
                rate = plane.gate.rate(KEY)
                assert rate is not None
                assert rate.tokens is not None
                assert rate.tokens.remaining == 1_000 - 10 * number

    run(main())


def test_all_six_rate_headers_are_on_every_answer(tmp_path: Path) -> None:
    names = [f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")]

    async def main() -> None:
        keys = {**KEYS, "sk-paid": KEY}
        async with running(tmp_path, keys=keys) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            for status, ask in (
                (200, {}),
                (404, {"path": "/v1/nope"}),
                (404, {"body": {"model": "none"}}),
                (400, {"raw_body": b"{"}),
                (415, {"headers": [("Content-Type", "text/plain")]}),
                (429, {"body": {"model": "model", "prompt": "x", "max_tokens": 900}}),
                (405, {"method": "GET", "path": "/v1/completions"}),
            ):
                reply = await plane.ask(key="sk-paid", **ask)
                assert reply.status == status, (ask, reply.body)
                assert [name for name in names if reply.header(name) is None] == [], ask
            reply = await plane.ask(key="sk-wrong")
            assert reply.status == 401
            assert all(reply.header(name) is None for name in names)

    run(main())


def test_a_stream_the_client_left_costs_what_it_brought(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(EVENTS, *map(chunk, TOKENS))
        await visit.gone()

    async def main() -> None:
        keys = {**KEYS, "sk-paid": KEY}
        async with running(tmp_path, keys=keys) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            async with plane.wire() as wire:
                await wire.send(request(body={**STREAM, "max_tokens": 800}, key="sk-paid"))
                await wire.reader.readuntil(b'"2"')
            await eventually(lambda: plane.records)
            assert (plane.records[-1].status, plane.records[-1].completion_tokens) == (499, 3)
            rate = plane.gate.rate(KEY)
            assert rate is not None
            assert rate.tokens is not None
            assert rate.tokens.remaining > 900

    run(main())
