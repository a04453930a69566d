"""What a request meets: keys, routes, models, classes, limits, and what of it reaches the engine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.aio import eventually
from tests.support.data_plane import KEYS, LAUNCH, ROUTES, advert, instance, request, run, running
from tests.support.raw_upstream import RawUpstream, Visit, answer
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.gateway import GatewayLimits
from vllm_bootstrap.serving import Endpoint


def test_a_request_by_model_and_one_by_launch(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            for path in ("/v1/completions", f"/proxy/{LAUNCH}/v1/completions"):
                reply = await plane.ask("POST", path, headers=[("X-Request-Id", "mine")])
                assert reply.status == 200
                assert reply.body == b"{}"
                assert reply.header("x-request-id") == "mine"
                assert reply.header("x-launch-id") == LAUNCH
                assert reply.header("x-queue-ms") == "0"
                visit = engine.requests[-1]
                assert visit.lines[0] == b"POST /v1/completions HTTP/1.1"
                assert visit.header(b"x-request-id") == [b"mine"]
                assert json.loads(visit.body) == {"model": "model", "prompt": "x"}
            assert engine.connections == 1
            assert plane.in_use() == 0
            record = plane.records[-1]
            assert (record.status, record.owner, record.launch_id, record.model, record.cls) == (
                200, "rt", LAUNCH, "model", "realtime",
            )  # fmt: skip
            assert record.first_byte_s is not None
            assert record.duration_s >= record.first_byte_s >= 0
            assert (record.bytes_in, record.bytes_out) == (len(visit.body), 2)

    run(main())


def test_the_control_plane_gets_everything_else(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane:
            for method, path in (
                ("GET", "/healthz"),
                ("GET", "/v1/models"),
                ("GET", "/v1/models/org%2Fm"),
                ("POST", "/launch"),
            ):
                reply = await plane.ask(method, path, key=None)
                assert reply.json["control"] is True
                assert reply.json["method"] == method

    run(main())


def test_the_app_and_engines_take_turns_on_one_connection(tmp_path: Path) -> None:
    """What uvicorn keeps of a connection is made when the app is first asked on it: later than the connection itself,
    and perhaps while the answer of an engine before it has not left yet."""
    large = b"x" * 8_000_000

    async def script(visit: Visit) -> None:
        await visit.send(answer(large if b"large" in visit.body else b"{}"))

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            wire = await plane.connect()
            control = request("GET", "/control")
            for _ in range(2):
                await wire.send(request())
                assert (await wire.reply()).body == b"{}"
                await wire.send(control)
                assert (await wire.reply()).json["control"] is True
            other = await plane.connect()
            await other.send(request(body={"model": "model", "prompt": "large"}) + control + request() + control)
            await eventually(lambda: any(one.write_paused for one in plane.gateway.connections))  # type: ignore[attr-defined]
            assert (await other.reply()).body == large
            assert (await other.reply()).json["path"] == "/control"
            assert (await other.reply()).body == b"{}"
            assert (await other.reply()).json["path"] == "/control"

    run(main())


NOBODY = [None, "sk-wrong"]


@pytest.mark.parametrize("key", NOBODY)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/completions"), ("GET", "/v1/completions"), ("POST", "/v1/unknown"), ("POST", "/proxy/nope/x"),
     ("POST", f"/proxy/{LAUNCH}/v1/completions"), ("POST", f"/proxy/{LAUNCH}/unknown"), ("GET", "/v1/realtime")],
)  # fmt: skip
def test_without_a_key_nothing_is_told(tmp_path: Path, key: str | None, method: str, path: str) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            reply = await plane.ask(method, path, key=key)
            assert reply.status == 401
            assert reply.code == "invalid_api_key"
            assert (reply.header("www-authenticate") or "").startswith("Basic")
            assert reply.header("x-request-id")
            assert engine.requests == []
            assert plane.records[-1].owner is None

    run(main())


@pytest.mark.parametrize(
    ("key", "method", "path", "status"),
    [
        ("sk-realtime", "POST", "/v1/completions", 200),
        ("sk-batch", "POST", "/v1/completions", 200),
        ("sk-admin", "POST", "/v1/completions", 200),
        ("sk-monitor", "POST", "/v1/completions", 403),
        ("sk-monitor", "GET", f"/proxy/{LAUNCH}/metrics", 200),
        ("sk-realtime", "GET", f"/proxy/{LAUNCH}/metrics", 403),
        ("sk-realtime", "POST", f"/proxy/{LAUNCH}/v1/load_lora_adapter", 403),
        ("sk-admin", "POST", f"/proxy/{LAUNCH}/v1/load_lora_adapter", 200),
        ("sk-realtime", "GET", f"/proxy/{LAUNCH}/health", 200),
        ("sk-realtime", "GET", f"/proxy/{LAUNCH}/v1/models", 200),
        ("sk-realtime", "POST", f"/proxy/{LAUNCH}/tokenize", 200),
        # Everything else an engine may have is not there.
        ("sk-admin", "POST", f"/proxy/{LAUNCH}/invocations", 404),
        ("sk-admin", "POST", f"/proxy/{LAUNCH}/collective_rpc", 404),
        ("sk-admin", "POST", f"/proxy/{LAUNCH}/sleep", 404),
        ("sk-admin", "POST", f"/proxy/{LAUNCH}/pause", 404),
        ("sk-admin", "GET", f"/proxy/{LAUNCH}/docs", 404),
        ("sk-admin", "GET", f"/proxy/{LAUNCH}/openapi.json", 404),
        ("sk-admin", "POST", f"/proxy/{LAUNCH}/V1/completions", 404),
        ("sk-admin", "POST", f"/proxy/{LAUNCH}/v1/completions/", 404),
        ("sk-admin", "GET", f"/proxy/{LAUNCH}/v1/completions", 404),
        ("sk-admin", "OPTIONS", f"/proxy/{LAUNCH}/v1/completions", 404),
        ("sk-admin", "GET", f"/proxy/{LAUNCH}", 404),
        ("sk-admin", "GET", "/proxy/nope/health", 404),
        ("sk-admin", "POST", "/v1/load_lora_adapter", 404),
        ("sk-admin", "POST", "/v1/chat/completions/render", 404),
        ("sk-admin", "GET", "/v1/completions", 405),
        ("sk-admin", "OPTIONS", "/v1/completions", 405),
        ("sk-admin", "POST", f"/proxy/{LAUNCH}/v1/chat%2fcompletions", 400),
        ("sk-admin", "POST", f"/proxy/{LAUNCH}/../{LAUNCH}/v1/completions", 400),
        ("sk-admin", "POST", f"/proxy/{LAUNCH}//v1/completions", 400),
    ],
)
def test_who_may_ask_an_engine_for_what(tmp_path: Path, key: str, method: str, path: str, status: int) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            reply = await plane.ask(method, path, key=key)
            assert reply.status == status
            assert len(engine.requests) == (status == 200)
            if status != 200:
                assert reply.json["src"] == "vllm-bootstrap"
            if status == 403:
                assert reply.code == "insufficient_scope"

    run(main())


def test_states_of_launches(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane:
            for state, by_launch, by_model in (
                ("bootstrapping", (409, "launch_not_ready"), (503, "model_loading")),
                ("stopping", (409, "launch_not_ready"), (503, "draining")),
                ("ready", (503, "overloaded"), (503, "overloaded")),
                ("failed", (409, "launch_not_ready"), (404, "model_not_found")),
            ):
                plane.gate.update(advert(state=state, retry_after_s=7))
                reply = await plane.ask("GET", f"/proxy/{LAUNCH}/health")
                assert (reply.status, reply.code) == by_launch
                assert reply.header("retry-after") == (None if state == "failed" else "7")
                assert reply.header("x-should-retry") == {"failed": "false", "ready": None}.get(state, "true")
                reply = await plane.ask()
                assert (reply.status, reply.code) == by_model
                assert reply.header("retry-after") == (None if state == "failed" else "7")
            reply = await plane.ask("GET", "/proxy/ended-before/health")
            assert (reply.status, reply.header("x-should-retry")) == (409, "false")

    run(main())


@pytest.mark.parametrize("path", ["/v1/completions", f"/proxy/{LAUNCH}/v1/completions"])
@pytest.mark.parametrize(
    ("globs", "model", "status"),
    [
        (("model", "org/*"), "model", 200),
        (("model",), "model", 404),
        (("org/*",), "model", 404),
        (("other",), "model", 404),
        (("model", "org/*"), "lora-of-somebody", 404),
    ],
)
def test_a_keys_models_hold_on_every_path(
    tmp_path: Path, path: str, globs: tuple[str, ...], model: str, status: int
) -> None:
    async def main() -> None:
        keys = {"sk-x": Principal("x", frozenset({"realtime"}), models=globs)}
        async with running(tmp_path, keys=keys) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            reply = await plane.ask("POST", path, {"model": model, "prompt": "x"}, key="sk-x")
            assert reply.status == status
            assert len(engine.requests) == (status == 200)

    run(main())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None), (b"[]", None), (b"", None), (b'{"prompt":"x"}', "model"), (b'{"model":null}', "model"),
        (b'{"model":5}', "model"), (b'{"model":"model","model":"model"}', "model"),
        (b'{"model":"other","mod\\u0065l":"model"}', "model"),
        (b'{"model":"model","kv_transfer_params":{}}', "kv_transfer_params"),
        (b'{"model":"model","chat_template":"{{x}}"}', "chat_template"),
        (b'{"model":"model","chat_template_kwargs":{"chat_template":"x"}}', "chat_template_kwargs.chat_template"),
        (b'{"model":"model","prompt_embeds":"AA"}', "prompt_embeds"),
    ],
)  # fmt: skip
def test_bodies_that_are_refused(tmp_path: Path, body: bytes, param: str | None) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            reply = await plane.ask(raw_body=body)
            assert reply.status == 400
            assert reply.json["error"]["param"] == param
            assert engine.requests == []
            assert plane.in_use() == plane.gateway.body_bytes == 0

    run(main())


def test_unknown_models(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane:
            reply = await plane.ask(body={"model": "nope"})
            assert (reply.status, reply.code, reply.json["error"]["param"]) == (404, "model_not_found", "model")
            assert plane.records[-1].model is None, "nobody gets names of their own into the history"

    run(main())


def test_other_bodies_and_versions(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            reply = await plane.ask(headers=[("Content-Type", "text/plain")])
            assert reply.status == 415
            reply = await plane.ask(headers=[("Content-Encoding", "gzip")])
            assert reply.status == 415
            reply = await plane.ask(headers=[("Content-Encoding", "identity")])
            assert reply.status == 200
            reply = await plane.ask(headers=[("X-Api-Version", "v2")])
            assert (reply.status, reply.json["error"]["param"]) == (400, "x-api-version")
            reply = await plane.ask(headers=[("X-Api-Version", "v1")])
            assert reply.status == 200
            reply = await plane.ask("GET", f"/proxy/{LAUNCH}/health", raw_body=b"{}")
            assert reply.status == 400

    run(main())


def test_pages_of_others_are_kept_out(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, keys={}) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            assert (await plane.ask(key=None)).status == 200
            for header in (("Origin", "http://evil.example"), ("Sec-Fetch-Site", "cross-site")):
                reply = await plane.ask(key=None, headers=[header])
                assert (reply.status, reply.code) == (403, "forbidden_origin")
            async with plane.wire() as wire:
                await wire.send(request(key=None).replace(b"127.0.0.1", b"rebound.example"))
                assert (await wire.reply()).status == 421

    run(main())


@pytest.mark.parametrize(
    ("key", "headers", "fields", "priority"),
    [
        ("sk-realtime", [], {}, b"0"),
        ("sk-batch", [], {}, b"100"),
        ("sk-realtime", [("X-Priority", "batch")], {}, b"100"),
        ("sk-realtime", [], {"service_tier": "flex"}, b"100"),
        ("sk-batch", [("X-Priority", "realtime"), ("X-Vllm-Priority", "-999999")], {"priority": -999999}, b"100"),
        ("sk-realtime", [("x-data-parallel-rank", "1"), ("x-session-id", "a")], {"priority": 5}, b"0"),
    ],
)
def test_priority_is_ours(
    tmp_path: Path, key: str, headers: list[tuple[str, str]], fields: dict[str, Any], priority: bytes
) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            body = {"model": "model", "prompt": "x", **fields}
            assert (await plane.ask(body=body, key=key, headers=headers)).status == 200
            visit = engine.requests[-1]
            assert visit.header(b"x-vllm-priority") == [priority]
            assert visit.header(b"x-data-parallel-rank") == visit.header(b"x-session-id") == []
            assert "priority" not in json.loads(visit.body)
            plane.announce(instance(engine.endpoint, priority_header=False, priority_field=True))
            assert (await plane.ask(body=body, key=key, headers=headers)).status == 200
            visit = engine.requests[-1]
            assert visit.header(b"x-vllm-priority") == []
            assert json.loads(visit.body)["priority"] == int(priority)

    run(main())


def test_a_body_passes_byte_for_byte(tmp_path: Path) -> None:
    raw = b' {\n"model" : "m\\u006fdel",\t"prompt":"\xc3\xa9\\u00e9 \\/", "temperature":1.0e0,"x":[ NaN , 1E2 ]}\r\n'

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            assert (await plane.ask(raw_body=raw)).status == 200
            assert engine.requests[-1].body == raw

    run(main())


def test_limits_of_keys(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def script(visit: Visit) -> None:
        await release.wait()
        await visit.send(answer())

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            first = asyncio.create_task(plane.ask(key="sk-one"))
            await eventually(lambda: engine.requests)
            reply = await plane.ask(key="sk-one")
            assert (reply.status, reply.code, reply.header("retry-after")) == (429, "concurrency_limit", "1")
            release.set()
            assert (await first).status == 200
            assert (await plane.ask(key="sk-one")).status == 200
            seen = [await plane.ask(key="sk-slow") for _ in range(3)]
            assert [one.status for one in seen] == [200, 200, 429]
            assert [one.header("x-ratelimit-remaining-requests") for one in seen] == ["1", "0", "0"]
            assert seen[2].code == "rate_limit_exceeded"
            assert 1 <= int(seen[2].header("retry-after") or "") <= 60
            reply = await plane.ask(key="sk-small", body={"model": "model", "prompt": ["a", "b"], "n": 3})
            assert (reply.status, reply.json["error"]["param"]) == (400, "n")

    run(main())


def test_a_full_queue_a_deadline_and_a_drain(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def script(visit: Visit) -> None:
        await release.wait()
        await visit.send(answer())

    async def main() -> None:
        async with (
            running(tmp_path, max_queued=1, queue_timeout_s=0.8) as plane,
            RawUpstream(tmp_path / "e", script).running() as engine,
        ):
            plane.announce(instance(engine.endpoint, slots=1))
            first = asyncio.create_task(plane.ask())
            await eventually(lambda: engine.requests)
            second = asyncio.create_task(plane.ask())
            await eventually(lambda: plane.queued() == 1)
            reply = await plane.ask()
            assert (reply.status, reply.code) == (429, "queue_full")
            assert reply.header("retry-after")
            reply = await second
            assert (reply.status, reply.code) == (503, "overloaded")
            third = asyncio.create_task(plane.ask())
            await eventually(lambda: plane.queued() == 1)
            plane.gateway.drain()
            reply = await third
            assert (reply.status, reply.code) == (503, "draining")
            record = plane.records[-1]
            assert (record.code, record.model) == ("draining", "model"), "it waited, so that name is known"
            reply = await plane.ask()
            assert (reply.status, reply.code) == (503, "draining")
            assert reply.header("connection") == "close"
            release.set()
            assert (await first).status == 200
            assert plane.in_use() == 0

    run(main())


def test_media_from_elsewhere_where_the_engine_cannot_be_trusted_with_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            body = {"model": "model", "messages": [{"content": [{"image_url": {"url": "http://169.254.169.254/x"}}]}]}
            plane.announce(instance(engine.endpoint, refuses_http_media=True))
            assert (await plane.ask("POST", "/v1/chat/completions", body)).status == 400
            assert engine.requests == []
            assert plane.in_use() == 0
            plane.announce(instance(engine.endpoint))
            assert (await plane.ask("POST", "/v1/chat/completions", body)).status == 200

    run(main())


def test_a_route_the_engine_lacks(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            routes = tuple(route for route in ROUTES if route.path != "/v1/embeddings")
            plane.announce(instance(engine.endpoint, routes=routes))
            for path in ("/v1/embeddings", f"/proxy/{LAUNCH}/v1/embeddings"):
                assert (await plane.ask("POST", path, {"model": "model", "input": "x"})).status == 404
            assert (await plane.ask()).status == 200

    run(main())


def test_a_route_that_is_gone_when_its_turn_comes(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def script(visit: Visit) -> None:
        await release.wait()
        await visit.send(answer())

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            first = asyncio.create_task(plane.ask())
            await eventually(lambda: engine.requests)
            second = asyncio.create_task(plane.ask("POST", f"/proxy/{LAUNCH}/v1/completions"))
            await eventually(lambda: plane.queued() == 1)
            plane.announce(instance(engine.endpoint, slots=1, routes=()))  # restarted as something else
            release.set()
            assert (await first).status == 200
            assert (await second).status == 404
            assert plane.in_use() == 0

    run(main())


def test_each_request_keeps_the_ids_by_which_it_is_traced(tmp_path: Path) -> None:
    """Also when its head is otherwise one that was read before."""

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            for number in range(5):
                name, trace = f"mine-{number}", f"00-{number:032x}-b7ad6b7169203331-01"
                headers = [("X-Request-Id", name), ("traceparent", trace), ("tracestate", f"n={number}"), ("X-A", "b")]
                reply = await plane.ask(headers=headers, body={"model": "model", "prompt": "x" * number})
                assert (reply.status, reply.header("x-request-id")) == (200, name)
                visit = engine.requests[-1]
                assert visit.header(b"x-request-id") == [name.encode()]
                assert visit.header(b"traceparent") == [trace.encode()]
                assert visit.header(b"tracestate") == [b"n=%d" % number]
                assert visit.header(b"x-a") == [b"b"]
                assert json.loads(visit.body)["prompt"] == "x" * number

    run(main())


def test_an_engine_is_never_told_the_same_id_twice_at_once(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def script(visit: Visit) -> None:
        await release.wait()
        await visit.send(answer())

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            tasks = [asyncio.create_task(plane.ask(headers=[("X-Request-Id", "same")])) for _ in range(3)]
            await eventually(lambda: len(engine.requests) == 3)
            told = {visit.header(b"x-request-id")[0] for visit in engine.requests}
            assert len(told) == 3
            assert all(one.startswith(b"same") for one in told)
            release.set()
            assert {(await task).header("x-request-id") for task in tasks} == {"same"}
            await plane.ask(headers=[("X-Request-Id", "same")])
            assert engine.requests[-1].header(b"x-request-id") == [b"same"]
            reply = await plane.ask(headers=[("X-Request-Id", "bad id\x7e/")])
            assert (reply.header("x-request-id") or "").startswith("req_")

    run(main())


def test_a_launch_that_came_back_elsewhere(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            running(tmp_path) as plane,
            RawUpstream(tmp_path / "one").running() as one,
            RawUpstream(tmp_path / "two").running() as two,
        ):
            plane.announce(instance(one.endpoint))
            await plane.ask()
            plane.announce(instance(two.endpoint))
            await plane.ask()
            assert (len(one.requests), len(two.requests)) == (1, 1)
            await eventually(lambda: one.open == 0)
            plane.gate.update(advert(state="stopping"))
            await eventually(lambda: two.open == 0)

    run(main())


def test_tcp_and_a_base_path(tmp_path: Path) -> None:
    async def main() -> None:
        seen: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer(keep=False))
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with running(tmp_path) as plane, server:
            plane.announce(instance(Endpoint(host="127.0.0.1", port=port, base_path="/base")))
            assert (await plane.ask("POST", "/v1/completions?x=1")).status == 200
            assert seen[0].startswith(b"POST /base/v1/completions?x=1 HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n" % port)
            assert b"internal" not in seen[0]

    run(main())


def test_too_many_large_bodies_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        limits = GatewayLimits(body_budget_bytes=1000)
        async with running(tmp_path, limits) as plane, plane.wire() as wire:
            await wire.send(request(raw_body=b"", headers=[("Content-Length", "900")]) + b"x" * 800)
            await eventually(lambda: plane.gateway.body_bytes == 800)
            reply = await plane.ask(raw_body=b"y" * 300)
            assert (reply.status, reply.code) == (503, "overloaded")
            assert plane.gateway.body_bytes == 800
            wire.close()
            await eventually(lambda: plane.gateway.body_bytes == 0)

    run(main())


def test_every_example_key_has_its_own_owner() -> None:
    assert len({principal.name for principal in KEYS.values()}) == len(KEYS)
