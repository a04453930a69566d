"""The control plane behind our own protocol, asked over raw sockets: what a header or a spelling cannot change."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.aio import run
from tests.support.control_plane import launch_id, make, one_key_each, view
from tests.support.data_plane import Plane, running
from vllm_bootstrap.api.app import build_api
from vllm_bootstrap.auth.scopes import ALL
from vllm_bootstrap.auth.types import Principal

KEYS = {scope: Principal(scope, frozenset({scope})) for scope in sorted(ALL)}


async def statuses(plane: Plane, requests: list[bytes]) -> list[int]:
    found = []
    for sent in requests:
        async with plane.wire() as wire:
            await wire.send(sent)
            found.append((await wire.reply(head_only=sent.startswith(b"HEAD"))).status)
    return found


def raw(line: str, *headers: str) -> bytes:
    return "\r\n".join([line, *headers, "", ""]).encode("latin-1")


def ask(tmp_path: Path, requests: list[bytes]) -> list[int]:
    async def main() -> list[int]:
        services = make(one_key_each())
        services.supervisor.add(view(1))  # type: ignore[attr-defined]
        async with running(tmp_path, keys=KEYS, app=build_api(services)) as plane:
            return await statuses(plane, requests)

    return run(asyncio.wait_for(main(), 30))


TRICKS = [
    ("GET /launches HTTP/1.1", "Host: a/#@b"),
    ("GET /launches HTTP/1.1", "Host:"),
    ("GET /launches HTTP/1.1", "Host: localhost", "Host: localhost"),
    ("GET /launches HTTP/1.1",),
    ("GET /launches HTTP/1.1", "Host: evil.example"),
    ("GET launches HTTP/1.1", "Host: localhost"),
    ("GET http://localhost/livez HTTP/1.1", "Host: localhost"),
    ("GET //launches HTTP/1.1", "Host: localhost"),
    ("GET /launches/ HTTP/1.1", "Host: localhost"),
    ("GET /livez/../launches HTTP/1.1", "Host: localhost"),
    ("GET /livez/%2e%2e/launches HTTP/1.1", "Host: localhost"),
    ("GET /livez%2f..%2flaunches HTTP/1.1", "Host: localhost"),
    ("GET /livez;/launches HTTP/1.1", "Host: localhost"),
    ("GET /LAUNCHES HTTP/1.1", "Host: localhost"),
    ("GET /launches%00 HTTP/1.1", "Host: localhost"),
    ("GET /livez%23/launches HTTP/1.1", "Host: localhost"),
]


@pytest.mark.parametrize("key", [None, "Authorization: Bearer admin"])
def test_no_spelling_of_host_or_target_reaches_a_route(tmp_path: Path, key: str | None) -> None:
    more = [key] if key else []
    found = ask(tmp_path, [raw(line, *headers, *more) for line, *headers in TRICKS])
    refusals = {400, 404, 421} if key else {400, 401, 421}
    assert [(trick, status) for trick, status in zip(TRICKS, found, strict=True) if status not in refusals] == []


def test_an_honest_request_gets_the_honest_answer(tmp_path: Path) -> None:
    host = "Host: localhost"
    assert ask(
        tmp_path,
        [
            raw("GET /livez HTTP/1.1", host),
            raw("HEAD /livez HTTP/1.1", host),
            raw("GET /launches HTTP/1.1", host),
            raw("GET /launches HTTP/1.1", host, "x-api-key: monitor"),
            raw("GET /laun%63hes HTTP/1.1", host, "x-api-key: monitor"),
            raw("GET /launches?all=true HTTP/1.1", host, "x-api-key: monitor"),
            raw("OPTIONS /launches HTTP/1.1", host, "x-api-key: logs"),
            raw(f"GET /status/{launch_id(1)} HTTP/1.1", host, "x-api-key: logs"),
            raw("GET /launches?key=monitor HTTP/1.1", host),
        ],
    ) == [200, 200, 401, 200, 200, 200, 204, 403, 401]


def test_a_websocket_handshake_to_the_control_plane_never_switches(tmp_path: Path) -> None:
    upgrade = ("Host: localhost", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
               "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")  # fmt: skip
    found = ask(
        tmp_path,
        [
            raw("GET /launches HTTP/1.1", *upgrade),
            raw("GET /launches HTTP/1.1", *upgrade, "x-api-key: monitor", "Origin: http://evil.example"),
        ],
    )
    # No websocket lives here: the offer is ignored, as HTTP allows, and the plain request is judged like any other.
    assert found == [401, 200]
