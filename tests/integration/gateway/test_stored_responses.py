"""Responses that an engine keeps: back to that engine, for the key that made them, and for nobody else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.data_plane import LAUNCH, ROUTES, Plane, instance, request, run, running
from tests.support.raw_upstream import EVENTS, LAST_CHUNK, RawUpstream, Visit, answer, chunk
from vllm_bootstrap.gateway.targets import STATEFUL

OTHER = "l00000000000000000002"
ASK = {"model": "model", "input": "x"}


async def keeps(visit: Visit) -> None:
    """An engine with a memory of its own: ids tell who made them."""
    name = f"resp_{visit.writer.get_extra_info('sockname')[-1:]}"
    if visit.lines[0].startswith(b"POST /v1/responses HTTP"):
        if b'"stream": true' in visit.body:
            created = {"type": "response.created", "response": {"id": f"{name}_s", "usage": None}}
            await visit.send(EVENTS, chunk(b"event: x\ndata: %b\n\n" % json.dumps(created).encode()), LAST_CHUNK)
        else:
            await visit.send(
                answer(json.dumps({"id": name, "usage": {"input_tokens": 1, "output_tokens": 2}}).encode())
            )
    else:
        await visit.send(answer(json.dumps({"kept_by": name}).encode()))


@contextlib.asynccontextmanager
async def two_engines(tmp: Path) -> AsyncIterator[Plane]:
    async with (
        running(tmp) as plane,
        RawUpstream(tmp / "a", keeps).running() as first,
        RawUpstream(tmp / "b", keeps).running() as second,
    ):
        plane.announce(instance(first.endpoint, routes=(*ROUTES, *STATEFUL)))
        plane.announce(instance(second.endpoint, OTHER, routes=(*ROUTES, *STATEFUL)))
        yield plane


@pytest.mark.parametrize("stream", [False, True])
def test_what_names_a_response_goes_where_it_was_made(tmp_path: Path, stream: bool) -> None:
    async def main() -> None:
        async with two_engines(tmp_path) as plane:
            made = {}
            for _ in range(4):
                reply = await plane.ask("POST", "/v1/responses", {**ASK, "stream": stream})
                name = "_s" if stream else ""
                made["resp_" + ("a" if reply.header("x-launch-id") == LAUNCH else "b") + name] = reply
            assert len(made) == 2, "both engines were asked"
            for response_id, first in made.items():
                home = first.header("x-launch-id")
                for _ in range(3):
                    got = await plane.ask("GET", f"/v1/responses/{response_id}")
                    assert (got.status, got.header("x-launch-id")) == (200, home)
                    assert got.json["kept_by"] == response_id[:6]
                    cancelled = await plane.ask("POST", f"/v1/responses/{response_id}/cancel", raw_body=b"")
                    assert (cancelled.status, cancelled.header("x-launch-id")) == (200, home)
                    for path in ("/v1/responses", f"/proxy/{home}/v1/responses"):
                        on = await plane.ask("POST", path, {**ASK, "previous_response_id": response_id})
                        assert (on.status, on.header("x-launch-id")) == (200, home)
                assert (await plane.ask("GET", f"/proxy/{home}/v1/responses/{response_id}")).status == 200
                elsewhere = OTHER if home == LAUNCH else LAUNCH
                assert (await plane.ask("GET", f"/proxy/{elsewhere}/v1/responses/{response_id}")).code == "not_found"

    run(main())


def test_for_other_keys_it_does_not_exist(tmp_path: Path) -> None:
    async def main() -> None:
        async with two_engines(tmp_path) as plane:
            reply = await plane.ask("POST", "/v1/responses", ASK)
            made, home = reply.json["id"], reply.header("x-launch-id")
            for key in ("sk-admin", "sk-batch"):
                for ask in (
                    ("GET", f"/v1/responses/{made}"),
                    ("POST", f"/v1/responses/{made}/cancel", {}),
                    ("GET", f"/proxy/{home}/v1/responses/{made}"),
                    ("POST", f"/proxy/{home}/v1/responses/{made}/cancel", {}),
                    ("POST", "/v1/responses", {**ASK, "previous_response_id": made}),
                    ("POST", f"/proxy/{home}/v1/responses", {**ASK, "previous_response_id": made}),
                ):
                    refused = await plane.ask(*ask, key=key)
                    assert (refused.status, refused.code) == (404, "not_found"), ask
            assert (await plane.ask("GET", f"/v1/responses/{made}", key=None)).status == 401
            assert (await plane.ask("GET", f"/v1/responses/{made}", key="sk-monitor")).status == 403
            assert (await plane.ask("GET", "/v1/responses/resp_none")).status == 404
            assert (await plane.ask("DELETE", f"/v1/responses/{made}")).status in (404, 405)
            assert (await plane.ask("GET", f"/v1/responses/{made}/cancel")).status == 405
            assert (await plane.ask("GET", f"/v1/responses/{made}/other")).status == 404

    run(main())


def test_what_is_not_stored_is_not_remembered(tmp_path: Path) -> None:
    async def main() -> None:
        async with two_engines(tmp_path) as plane:
            reply = await plane.ask("POST", "/v1/responses", {**ASK, "store": False})
            assert reply.status == 200
            assert not len(plane.gateway.responses)
            refused = await plane.ask("POST", "/v1/responses", {**ASK, "previous_response_id": 5})
            assert refused.json["error"]["param"] == "previous_response_id"

    run(main())


def test_an_engine_without_the_route_is_not_asked(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "a", keeps).running() as engine:
            plane.announce(instance(engine.endpoint))
            made = (await plane.ask("POST", "/v1/responses", ASK)).json["id"]
            reply = await plane.ask("GET", f"/v1/responses/{made}")
            assert (reply.status, reply.code) == (404, "not_found")
            assert len(engine.requests) == 1

    run(main())


def test_a_key_may_not_reach_another_model_by_a_response(tmp_path: Path) -> None:
    async def main() -> None:
        async with two_engines(tmp_path) as plane:
            made = (await plane.ask("POST", "/v1/responses", ASK)).json["id"]
            plane.gateway.responses.remember("resp_z", LAUNCH, "narrow")
            body = {"model": "model", "input": "x", "previous_response_id": "resp_z"}
            assert (await plane.ask("POST", "/v1/responses", body, key="sk-narrow")).status == 404
            assert (await plane.ask("GET", "/v1/responses/resp_z", key="sk-narrow")).status == 404
            assert made
            async with plane.wire() as wire:
                await wire.send(request("GET", f"/v1/responses/{made}"))
                assert (await wire.reply()).status == 200

    run(main())
