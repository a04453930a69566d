"""Adapters through our own protocol: how long they may be, and what is left of those that are cut. Content over the
wire."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.api.test_catalogue import form
from tests.support.aio import eventually
from tests.support.control_plane import key, make
from tests.support.data_plane import Plane, run, running
from tests.support.model_desk import MIB, FakeModels, rich
from vllm_bootstrap.api.app import build_api
from vllm_bootstrap.gateway import GatewayLimits
from vllm_bootstrap.gateway.limits import FILE_FORM_BYTES

ANN = key("ann", "upload")


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[FakeModels, Plane]]:
    services = make([ANN])
    desk = services.models
    assert isinstance(desk, FakeModels)
    desk.put(rich())
    limits = GatewayLimits(max_file_body_bytes=1, max_adapter_body_bytes=3 * MIB + FILE_FORM_BYTES)
    async with running(folder, limits, keys={"ann": ANN.principal}, app=build_api(services)) as plane:
        yield desk, plane


def head(path: str, length: int) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1", "Host: localhost", "x-api-key: ann",
        "Content-Type: multipart/form-data; boundary=cut", f"Content-Length: {length}",
    ]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.mark.parametrize("path", ["/models/org/chat/adapters", "/models/org%2Fchat/adapters"])
def test_an_adapter_may_be_longer_than_other_bodies(tmp_path: Path, path: str) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (desk, plane), plane.wire() as wire:
            data = os.urandom(2 * MIB)
            body, _ = form(("name", None, b"sql-9"), ("file", "lora.zip", data))
            await wire.send(head(path, len(body)) + body)
            made = await wire.reply()
            assert (made.status, made.json["base"], made.json["bytes"]) == (201, "org/chat", len(data))
            assert desk.archives == [data]

    run(main())


def test_an_adapter_beyond_its_limit_is_refused_by_its_length(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (desk, plane), plane.wire() as wire:
            await wire.send(head("/models/chat/adapters", 3 * MIB + FILE_FORM_BYTES + 1))
            assert (await wire.reply()).status == 413
            assert desk.archives == []

    run(main())


def test_an_adapter_that_is_cut_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as (desk, plane):
            ended: list[BaseException | None] = []
            receive = desk.receive_adapter

            async def watched(*args: Any) -> Any:
                try:
                    return await receive(*args)
                except BaseException as exc:
                    ended.append(exc)
                    raise

            desk.receive_adapter = watched  # type: ignore[method-assign]
            body, _ = form(("name", None, b"sql-9"), ("file", "lora.zip", os.urandom(MIB)))
            async with plane.wire() as wire:
                await wire.send(head("/models/chat/adapters", len(body)) + body[: MIB // 2])
                await asyncio.sleep(0)
            await eventually(lambda: len(ended) == 1)
            assert (desk.archives, desk.uploaded) == ([], {})

    run(main())
