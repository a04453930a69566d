"""The gateway in front of the simulator: another implementation of everything an engine does on its side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from websockets.asyncio.client import connect

from tests.support.aio import eventually
from tests.support.data_plane import LAUNCH, Plane, advert, instance, request, run, running
from vllm_bootstrap.engines.routes import vllm_routes
from vllm_bootstrap.serving import Endpoint

HELLO = {"model": "model", "messages": [{"role": "user", "content": "hello"}]}

LONG = {**HELLO, "max_tokens": 5000, "ignore_eos": True}


@contextlib.asynccontextmanager
async def simulating(tmp: Path, *options: str) -> AsyncIterator[Endpoint]:
    path = tmp / "sim"
    command = ["-m", "vllm_bootstrap.engines.simulator", "--model", "model", "--uds", str(path), *options]
    environment = {**os.environ, "VLLM_API_KEY": "internal-key"}
    with (tmp / "log").open("wb") as log:
        child = await asyncio.create_subprocess_exec(sys.executable, *command, env=environment, stdout=log, stderr=log)
    try:
        await eventually(lambda: b"startup complete" in (tmp / "log").read_bytes(), 30)
        yield Endpoint(uds=str(path), credential="internal-key")
    finally:
        child.terminate()
        await child.wait()


async def engine_counts(plane: Plane) -> dict[str, float]:
    reply = await plane.ask("GET", f"/proxy/{LAUNCH}/metrics", key="sk-monitor")
    lines = [line.rpartition(" ") for line in reply.body.decode().splitlines() if not line.startswith("#")]
    return {name.partition("{")[0]: float(value) for name, _, value in lines}


async def until_running(plane: Plane, number: int, within_s: float) -> None:
    """Until the engine itself says that it works on so many requests."""
    deadline = asyncio.get_running_loop().time() + within_s
    while (await engine_counts(plane))["vllm:num_requests_running"] != number:
        assert asyncio.get_running_loop().time() < deadline, f"not {number} running within {within_s} s"


def test_everything_an_engine_offers(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            simulating(tmp_path, "--tokens-per-second", "2000") as endpoint,
            running(tmp_path) as plane,
        ):
            plane.announce(instance(endpoint, routes=vllm_routes()))
            await _plain_answers(plane)
            await _streams(plane)
            await _audio(plane)
            await _realtime(plane)
            await eventually(lambda: plane.in_use() == 0)

    run(main())


async def _plain_answers(plane: Plane) -> None:
    for path, body in {
        "/v1/chat/completions": HELLO,
        "/v1/completions": {"model": "model", "prompt": ["a", "b"], "max_tokens": 3, "priority": -5},
        "/v1/responses": {"model": "model", "input": "hello"},
        "/v1/messages": {**HELLO, "max_tokens": 5},
        "/v1/embeddings": {"model": "model", "input": ["a", "b"]},
        "/v1/rerank": {"model": "model", "query": "a", "documents": ["b", "c"]},
        "/v1/score": {"model": "model", "text_1": "a", "text_2": ["b", "c"]},
    }.items():
        for prefix in ("", f"/proxy/{LAUNCH}"):
            reply = await plane.ask("POST", prefix + path, body)
            assert reply.status == 200, (path, reply.body)
            assert reply.header("x-launch-id") == LAUNCH
    refused = await plane.ask("POST", "/v1/chat/completions", {"model": "model", "messages": "nonsense"})
    assert refused.status == 400
    assert "src" not in refused.json  # the engine's own words
    assert (await plane.ask("GET", f"/proxy/{LAUNCH}/v1/models")).json["data"][0]["id"] == "model"
    assert (await plane.ask("POST", f"/proxy/{LAUNCH}/collective_rpc", {}, key="sk-admin")).status == 404


async def _streams(plane: Plane) -> None:
    for path, ending in {"/v1/chat/completions": b"data: [DONE]\n\n", "/v1/messages": b"message_stop"}.items():
        reply = await plane.ask("POST", path, {**HELLO, "stream": True, "max_tokens": 20})
        assert (reply.header("content-type") or "").startswith("text/event-stream")
        assert ending in reply.body[-200:]


async def _audio(plane: Plane) -> None:
    parts = [("model", b"", b"model"), ("file", b'; filename="a.wav"', b"RIFF" + bytes(100_000))]
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (name.encode(), extra, data)
        for name, extra, data in parts
    )
    kind = [("Content-Type", "multipart/form-data; boundary=b")]
    reply = await plane.ask("POST", "/v1/audio/transcriptions", raw_body=body + b"--b--\r\n", headers=kind)
    assert reply.status == 200, reply.body
    assert "text" in reply.json


async def _realtime(plane: Plane) -> None:
    url = f"ws://127.0.0.1:{plane.port}/v1/realtime?model=model"
    headers = {"Authorization": "Bearer sk-realtime"}
    async with connect(url, additional_headers=headers, proxy=None) as socket:
        first: Any = json.loads(await socket.recv())
        assert first["type"] == "session.created"


def test_a_client_that_goes_away_stops_the_engines_work(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            simulating(tmp_path, "--tokens-per-second", "20") as endpoint,
            running(tmp_path) as plane,
        ):
            plane.announce(instance(endpoint, routes=vllm_routes()))
            for stream in (True, False):
                wire = await plane.connect()
                body = {**LONG, "stream": stream}
                await wire.send(request("POST", "/v1/chat/completions", body))
                await until_running(plane, 1, 10)
                wire.close()
                await until_running(plane, 0, 1)
                assert plane.in_use() == 0

    run(main())


def test_idle_connections_the_engine_closes_are_no_trouble(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            simulating(tmp_path, "--tokens-per-second", "0", "--keep-alive-timeout", "0.05") as endpoint,
            running(tmp_path) as plane,
        ):
            plane.announce(instance(endpoint, routes=vllm_routes()))
            for pause in (0, 0.03, 0.045, 0.05, 0.055, 0.1) * 3:
                assert (await plane.ask(body={"model": "model", "prompt": "x"})).status == 200
                await asyncio.sleep(pause)  # around the moment at which the engine gives up an idle connection

    run(main())


def test_an_engine_killed_while_it_streams(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane:
            async with simulating(tmp_path, "--tokens-per-second", "50") as endpoint:
                plane.announce(instance(endpoint, routes=vllm_routes()))
                wire = await plane.connect()
                body = {**LONG, "stream": True}
                await wire.send(request("POST", "/v1/chat/completions", body))
                assert (await wire.head())[0] == 200
                chunks = wire.chunks()
                assert (await anext(chunks)).startswith(b"data: ")
            told = b"".join([piece async for piece in chunks])
            assert b'"code": "upstream_error"' in told or b'"error"' in told
            assert b"[DONE]" not in told
            plane.gate.update(advert(state="failed"))
            assert (await plane.ask(body=HELLO)).status == 404
            assert plane.in_use() == 0

    run(main())
