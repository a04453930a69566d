"""Uploads through our own protocol: how long they may be, how slow, and who waits for whom. Content over the wire."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.api.test_files import KEYS, Desk, form
from tests.support.aio import eventually
from tests.support.data_plane import Plane, Wire, run, running
from vllm_bootstrap.api.app import build_api
from vllm_bootstrap.batches import blobs
from vllm_bootstrap.gateway import GatewayLimits
from vllm_bootstrap.gateway.limits import FILE_FORM_BYTES

MIB = 1024**2
PRINCIPALS = {one.principal.name: one.principal for one in KEYS}
TYPE = "Content-Type: multipart/form-data; boundary=cut"


@asynccontextmanager
async def serving(folder: Path, **limits: Any) -> AsyncIterator[tuple[Desk, Plane]]:
    desk = Desk(folder)
    try:
        bounds = GatewayLimits(**{"max_file_body_bytes": 2 * MIB + FILE_FORM_BYTES, **limits})
        async with running(folder, bounds, keys=PRINCIPALS, app=build_api(desk.services)) as plane:
            yield desk, plane
    finally:
        desk.close()


def head(line: str, *headers: str) -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", "x-api-key: ann", *headers, "", ""]).encode()


def upload_head(length: int, *more: str) -> bytes:
    return head("POST /v1/files", TYPE, f"Content-Length: {length}", *more)


def blob_names(desk: Desk) -> list[str]:
    return sorted(path.name for path in desk.folder.iterdir())


def test_an_upload_may_be_longer_than_other_bodies_and_the_connection_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (_desk, plane), plane.wire() as wire:
            data = os.urandom(2 * MIB)
            body, _ = form(("file", "in.jsonl", data), purpose="batch")
            await wire.send(upload_head(len(body), "Expect: 100-continue"))
            await wire.send(body)
            made = await wire.reply()
            assert (made.status, made.json["bytes"]) == (200, len(data))
            await wire.send(head(f"GET /v1/files/{made.json['id']}/content"))
            assert (await wire.reply()).body == data
            await wire.send(head(f"HEAD /v1/files/{made.json['id']}/content"))
            assert (await wire.reply(head_only=True)).header("content-length") == str(len(data))
            await wire.send(head(f"GET /v1/files/{made.json['id']}/content", "Range: bytes=5-9"))
            part = await wire.reply()
            assert (part.status, part.body) == (206, data[5:10])

    run(main())


def test_only_the_route_that_takes_files_takes_long_bodies(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (desk, plane):
            for path in ("/v1/batches", "/v1/files/x", "/launch", "/v1/batch/completions"):
                async with plane.wire() as wire:
                    await wire.send(
                        head(f"POST {path}", "Content-Type: application/json", f"Content-Length: {2 * MIB}")
                    )
                    assert (await wire.reply()).status == 413, path
            async with plane.wire() as wire:
                await wire.send(upload_head(3 * MIB + 1))
                assert (await wire.reply()).status == 413
            assert blob_names(desk) == []

    run(main())


def test_what_turns_out_too_long_is_refused_on_the_way_and_leaves_nothing(tmp_path: Path) -> None:
    body, _ = form(("file", "in.jsonl", b"x" * (6 * MIB)), purpose="batch")

    async def send(wire: Wire) -> None:
        try:
            for start in range(0, len(body), 65536):
                piece = body[start : start + 65536]
                await wire.send(b"%x\r\n" % len(piece) + piece + b"\r\n")
        except ConnectionError:
            return

    async def main() -> None:
        async with serving(tmp_path) as (desk, plane), plane.wire() as wire:
            await wire.send(head("POST /v1/files", TYPE, "Transfer-Encoding: chunked"))
            sending = asyncio.create_task(send(wire))
            refusal = await wire.reply()
            assert (refusal.status, refusal.code) == (413, "request_too_large")
            await eventually(lambda: blob_names(desk) == [])
            sending.cancel()

    run(main())


@pytest.mark.parametrize("sent", [200, 500_000])
def test_a_client_that_goes_away_leaves_nothing(tmp_path: Path, sent: int) -> None:
    body, _ = form(("file", "in.jsonl", b"x" * MIB), purpose="batch")

    async def main() -> None:
        async with serving(tmp_path) as (desk, plane):
            async with plane.wire() as wire:
                await wire.send(upload_head(len(body)) + body[:sent])
                if sent > 300_000:
                    await eventually(lambda: blob_names(desk) != [])
            await eventually(lambda: blob_names(desk) == [] and not plane.gateway.connections)
            assert await desk.store.list(None, purpose=None, after=None, limit=9, ascending=True) == ([], False)

    run(main())


def test_a_client_that_stalls_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    body, _ = form(("file", "in.jsonl", b"x" * MIB), purpose="batch")

    async def main() -> None:
        async with serving(tmp_path, body_timeout_s=0.3) as (desk, plane), plane.wire() as wire:
            await wire.send(upload_head(len(body)) + body[:1000])
            refusal = await wire.reply()
            assert (refusal.status, refusal.code) == (408, "request_timeout")
            await eventually(lambda: blob_names(desk) == [])

    run(main())


class SlowDisk:
    """``os.write`` that waits until told."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self._real: Callable[..., int] = os.write

    def __call__(self, fd: int, data: Any) -> int:
        self.entered.set()
        assert self.open.wait(20)
        return self._real(fd, data)


def test_while_the_disk_is_slow_the_client_waits_and_nothing_piles_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk()
    monkeypatch.setattr(blobs.os, "write", disk)
    body, _ = form(("file", "in.jsonl", b"x" * (2 * MIB)), purpose="batch")

    async def main() -> None:
        timeout_s = 0.4
        async with serving(tmp_path, body_timeout_s=timeout_s) as (_desk, plane), plane.wire() as wire:
            await wire.send(upload_head(len(body)) + body[: MIB // 2])
            await eventually(disk.entered.is_set)
            (connection,) = plane.gateway.connections
            wire.writer.write(body[MIB // 2 :])
            await eventually(lambda: connection.flow.read_paused)
            assert len(connection.cycle.body) < MIB
            await asyncio.sleep(3 * timeout_s)  # longer than a client may stall: here it is the disk that does
            assert connection.flow.read_paused
            disk.open.set()
            assert (await wire.reply()).json["bytes"] == 2 * MIB

    run(main())


def test_a_reader_that_does_not_read_holds_little_memory(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (desk, plane):
            data = os.urandom(2 * MIB)
            incoming = desk.store.receive("ann", "batch_output", "out.jsonl", None)
            for _ in range(20):
                await incoming.write(data)
            row = await incoming.commit()
            wire = await plane.connect()
            await wire.send(head(f"GET /v1/files/{row.id}/content"))
            (connection,) = plane.gateway.connections
            await eventually(lambda: connection.write_paused)
            await asyncio.sleep(0.2)
            assert connection.transport.get_write_buffer_size() < 2 * MIB
            status, headers, _ = await wire.head()
            assert (status, dict(headers)[b"content-length"]) == (200, str(40 * MIB).encode())
            for _ in range(20):
                assert await wire.reader.readexactly(2 * MIB) == data

    run(main())
