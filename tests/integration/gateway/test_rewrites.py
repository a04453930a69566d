"""What the catalogue does to requests on their way: defaults, stripped members, and a model for those who name none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.gateway.test_calls import Ends
from tests.integration.gateway.test_places import OTHER, leaves_nothing
from tests.integration.gateway.test_uploads import FILE, MODEL, TYPE, form, part
from tests.support.data_plane import KEYS, LAUNCH, Plane, Reply, instance, request, run, running
from tests.support.raw_upstream import RawUpstream
from vllm_bootstrap.gateway import call
from vllm_bootstrap.models.types import Rewrite
from vllm_bootstrap.scheduler.gate import ByLaunch
from vllm_bootstrap.scheduler.tickets import Ticket

REWRITE = Rewrite({"temperature": 0.5, "n": 2}, frozenset({"seed", "user"}))
REWRITES = {"model": REWRITE}
RAW = b'{"seed": 1, "model":"model", "prompt":"\xc3\xbc" , "temperature":null, "user":"u"}'
CHANGED = b'{"n": 2,"model":"model", "prompt":"\xc3\xbc" , "temperature":null}'


def last(engine: RawUpstream) -> bytes:
    return engine.requests[-1].body


async def ask(plane: Plane, raw: bytes, path: str = "/v1/completions", key: str = "sk-realtime") -> Reply:
    return await plane.ask("POST", path, raw_body=raw, key=key)


def test_bodies_are_changed_by_the_model_they_name_and_in_nothing_else(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            running(tmp_path, rewrite_of=REWRITES.get) as plane,
            RawUpstream(tmp_path / "e").running() as engine,
        ):
            plane.announce(instance(engine.endpoint, served_names=("model", "other")))
            for prefix in ("", f"/proxy/{LAUNCH}"):
                assert (await ask(plane, RAW, prefix + "/v1/completions")).status == 200
                assert last(engine) == CHANGED
                assert engine.requests[-1].header(b"content-length") == [b"%d" % len(CHANGED)]
                same = RAW.replace(b'"model":"model"', b'"model":"other"')
                assert (await ask(plane, same, prefix + "/v1/completions")).status == 200
                assert last(engine) == same
            as_it_is = b'{"model":"model","n":1,"temperature":1}'
            await ask(plane, as_it_is)
            assert last(engine) == as_it_is
            await ask(plane, b'{"model":"model","messages":[],"stream":true,"priority":3}', "/v1/chat/completions")
            assert json.loads(last(engine)) == {
                "model": "model", "messages": [], "stream": True, "temperature": 0.5, "n": 2,
                "stream_options": {"include_usage": True},
            }  # fmt: skip
            await leaves_nothing(plane)

    run(main())


def test_a_launch_that_is_asked_without_a_name_is_asked_as_by_its_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            running(tmp_path, rewrite_of=REWRITES.get) as plane,
            RawUpstream(tmp_path / "e").running() as engine,
        ):
            plane.announce(instance(engine.endpoint, served_names=("model", "alias"), group_id="g1"))
            plane.announce(instance(engine.endpoint, OTHER, served_names=("plain",)))
            changed, same = {"prompt": "x", "temperature": 0.5, "n": 2}, {"prompt": "x", "seed": 5}
            for launch, expected in ((LAUNCH, changed), ("g1", changed), (OTHER, same)):
                await ask(plane, b'{"prompt":"x","seed":5}', f"/proxy/{launch}/v1/completions")
                assert json.loads(last(engine)) == expected
            refused = await ask(plane, b'{"prompt":"x","seed":5}')
            assert (refused.status, refused.json["error"]["param"]) == (400, "model")
            # What is no inference is nobody's model.
            await ask(plane, b'{"prompt":"x","seed":5}', f"/proxy/{LAUNCH}/tokenize")
            assert last(engine) == b'{"prompt":"x","seed":5}'

    run(main())


@pytest.mark.interpreted
def test_a_default_counts_like_what_a_client_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        tickets: list[Ticket] = []
        wants = Rewrite({"n": 4, "max_tokens": 100}, frozenset({"suffix"}))
        async with (
            running(tmp_path, rewrite_of={"model": wants}.get) as plane,
            RawUpstream(tmp_path / "e").running() as engine,
        ):
            plane.announce(instance(engine.endpoint))
            ask_gate = plane.gate.request

            def noted(target: Any, ticket: Ticket, *more: Any) -> Any:
                tickets.append(ticket)
                return ask_gate(target, ticket, *more)

            monkeypatch.setattr(plane.gate, "request", noted)
            await ask(plane, json.dumps({"model": "model", "prompt": "x", "suffix": "y" * 4000}).encode())
            (ticket,) = tickets
            assert (ticket.sequences, ticket.output_tokens) == (4, 400)
            assert ticket.prompt_tokens == len(last(engine)) // 4
            assert ticket.body_bytes == len(last(engine))
            refused = await ask(plane, b'{"model":"model","prompt":["x","y"]}', key="sk-small")
            assert (refused.status, refused.json["error"]["param"]) == (400, "n")
            await leaves_nothing(plane)

    run(main())


def test_lines_of_batches_are_changed_too(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            running(tmp_path, rewrite_of=REWRITES.get) as plane,
            RawUpstream(tmp_path / "e").running() as engine,
        ):
            plane.announce(instance(engine.endpoint))
            ends = Ends(plane)
            assert isinstance(await ends.end(RAW), call.Reply)
            assert last(engine) == CHANGED
            unnamed = {"prompt": "x", "user": "u"}
            assert isinstance(await ends.end(unnamed, target=ByLaunch(LAUNCH)), call.Reply)
            assert json.loads(last(engine)) == {"prompt": "x", "temperature": 0.5, "n": 2}
            await leaves_nothing(plane)

    run(main())


def test_forms_pass_as_they_are(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            running(tmp_path, rewrite_of=REWRITES.get, default_model=lambda: "model") as plane,
            RawUpstream(tmp_path / "e").running() as engine,
        ):
            plane.announce(instance(engine.endpoint))
            for body in (form(MODEL, FILE, part("seed", b"1")), form(FILE, part("seed", b"1"))):
                path = "/v1/audio/transcriptions"
                assert (await plane.ask("POST", path, raw_body=body, headers=[TYPE])).status == 200
                assert last(engine) == body

    run(main())


# A model for those who name none


def test_one_model_is_asked_by_who_names_none(tmp_path: Path) -> None:
    async def main() -> None:
        default: list[str | None] = ["model"]
        async with (
            running(tmp_path, default_model=lambda: default[0], rewrite_of={"model": Rewrite({"n": 2})}.get) as plane,
            RawUpstream(tmp_path / "e").running() as engine,
        ):
            plane.announce(instance(engine.endpoint))
            reply = await ask(plane, b'{"prompt":"x"}')
            assert (reply.status, reply.header("x-launch-id")) == (200, LAUNCH)
            assert last(engine) == b'{"n": 2,"prompt":"x"}'
            assert plane.records[-1].model == "model"
            named = await ask(plane, b'{"prompt":"x","model":"unknown"}')
            assert named.code == "model_not_found"
            forbidden = await ask(plane, b'{"prompt":"x"}', key="sk-narrow")
            assert forbidden.code == "model_not_found"
            default[0] = None
            refused = await ask(plane, b'{"prompt":"x"}')
            assert (refused.status, refused.json["error"]["param"]) == (400, "model")

    run(main())


def test_a_websocket_that_names_none(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            running(tmp_path, default_model=lambda: "model", rewrite_of=REWRITES.get) as plane,
            RawUpstream(tmp_path / "e").running() as engine,
        ):
            plane.announce(instance(engine.endpoint))
            headers = [
                ("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
                ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ]  # fmt: skip
            async with plane.wire() as wire:
                await wire.send(request("GET", "/v1/realtime", headers=headers))
                await wire.head()
            assert engine.requests[0].lines[0] == b"GET /v1/realtime HTTP/1.1"
            assert engine.requests[0].header(b"x-request-id") == [plane.records[0].request_id.encode()]

    run(main())


def test_a_line_of_a_batch_still_names_its_model(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            running(tmp_path, default_model=lambda: "model") as plane,
            RawUpstream(tmp_path / "e").running() as engine,
        ):
            plane.announce(instance(engine.endpoint))
            failure = await Ends(plane).failure({"prompt": "x"}, principal=KEYS["sk-batch"])
            assert failure.error.param == "model"
            assert not engine.requests

    run(main())
