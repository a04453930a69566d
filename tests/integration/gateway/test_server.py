"""The protocol class in uvicorn's own server: starting, stopping, access log, many idle connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import ssl
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from tests.support.aio import eventually
from tests.support.data_plane import Wire, certificate, echo_app, instance, request, run, running
from tests.support.raw_upstream import EVENTS, LAST_CHUNK, RawUpstream, Visit, chunk
from vllm_bootstrap.auth.guard import Guard
from vllm_bootstrap.auth.keys import KeyRing
from vllm_bootstrap.auth.sessions import Sessions
from vllm_bootstrap.gateway import Gateway, make_protocol
from vllm_bootstrap.scheduler.gate import Gate
from vllm_bootstrap.serving import Advert


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def test_a_stopping_server_lets_answers_end_and_closes_the_rest(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def script(visit: Visit) -> None:
        await visit.send(EVENTS, chunk(b"data: 1\n\n"))
        await release.wait()
        await visit.send(chunk(b"data: [DONE]\n\n"), LAST_CHUNK)

    async def main() -> None:
        ring = KeyRing()
        gate = Gate()
        gateway = Gateway(Guard(ring, Sessions(ring, lifetime_s=60), open_access=True), gate)
        config = uvicorn.Config(
            echo_app, port=0, http=make_protocol(gateway), ws="none", lifespan="off", log_config=None, access_log=False
        )
        server = Server(config)
        serving = asyncio.create_task(server.serve())
        await eventually(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with RawUpstream(tmp_path / "e", script).running() as engine:
            one = instance(engine.endpoint)
            gate.update(Advert(one.launch_id, one.group_id, one.base_model, one.served_names, "ready", one))
            wires = [Wire(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(3)]
            idle, streaming, later = wires
            await later.send(request("GET", "/control", key=None))
            assert (await later.reply()).status == 200
            await streaming.send(request(key=None))
            assert (await streaming.head())[0] == 200
            server.should_exit = True
            assert await idle.at_end() == b""
            assert await later.at_end() == b""
            release.set()
            assert [piece async for piece in streaming.chunks()][-1] == b"data: [DONE]\n\n"
            assert await streaming.at_end() == b""
            await asyncio.wait_for(serving, 10)
            for wire in wires:
                wire.close()
        gateway.close()

    run(main())


def test_clients_that_speak_tls(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(EVENTS, chunk(b"data: " + b"x" * 3_000_000 + b"\n\n"), LAST_CHUNK)

    async def main() -> None:
        pem = certificate(tmp_path)
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(pem)
        client = ssl.create_default_context(cafile=str(pem))
        async with running(tmp_path, tls=server) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            wire = await plane.connect(client)
            for _ in range(2):
                await wire.send(request())
                assert len((await wire.reply()).body) == 3_000_008
            await wire.send(request("GET", "/control"))
            assert (await wire.reply()).json["control"] is True
            await wire.send(b"nonsense\r\n\r\n" + b"x" * 100_000)
            assert (await wire.reply()).status == 400
            assert await wire.at_end() == b""
            gone = await plane.connect(client)
            await gone.send(request()[:-2])
            await eventually(lambda: plane.gateway.body_bytes)
            gone.close()
            await eventually(lambda: not plane.gateway.connections and plane.gateway.body_bytes == 0)

    run(main())


def test_the_access_log_tells_who_asked_for_what_and_holds_no_secrets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            await plane.ask("POST", "/v1/completions?secret=query", headers=[("X-Request-Id", "r-1")])
            await plane.ask(key="sk-wrong")

    with caplog.at_level(logging.INFO, "vllm_bootstrap.access"):
        run(main())
    first, second = caplog.messages
    assert first.startswith("r-1 POST /v1/completions -> 200 in ")
    assert "owner rt" in first
    assert "-> 401 invalid_api_key in" in second
    assert "sk-" not in first + second
    assert "query" not in first


def test_a_thousand_idle_connections_hurt_nobody(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            for _ in range(10):
                await asyncio.gather(*(plane.connect() for _ in range(100)))
            await eventually(lambda: len(plane.gateway.idle) == 1000)
            assert (await plane.ask()).status == 200
            assert (await plane.ask("GET", "/healthz")).status == 200

    run(main())
