"""Batches and items behind our own protocol, over sockets: back-pressure, clients that leave, answers that are cut."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.aio import eventually, run
from tests.support.batch_desks import FakeBatches, FakeItems, batch_id, item_id
from tests.support.control_plane import NOW, make, one_key_each
from tests.support.data_plane import Plane, request, running
from vllm_bootstrap.api.app import build_api
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.batches import jobs
from vllm_bootstrap.batches.types import Counts, TokenUsage

KEYS = {"batch": Principal("batch", frozenset({"batch"}))}
PIECE = b'{"line": "%s"}\n' % (b"x" * 64_000)
ONE = f"/v1/batches/{batch_id(1)}"


@contextlib.asynccontextmanager
async def box(tmp_path: Path) -> AsyncIterator[tuple[Plane, FakeBatches, FakeItems]]:
    batches, items = FakeBatches(), FakeItems()
    batches.put(1, "batch")
    items.put(1, "batch")
    services = make(one_key_each())
    services.batches, services.items = batches, items
    async with running(tmp_path, keys=KEYS, app=build_api(services)) as plane:
        yield plane, batches, items


def get(path: str) -> bytes:
    return request("GET", path, key="batch")


def test_openais_client_reads_every_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            box(tmp_path) as (plane, batches, _),
            openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{plane.port}/v1", api_key="batch", max_retries=0) as client,
        ):
            batches.shelf.add("file-1", "batch")
            made = await client.batches.create(
                input_file_id="file-1", endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
            )
            assert (made.object, made.status, made.metadata, made.usage) == ("batch", "validating", {"a": "b"}, None)
            assert made.request_counts is not None
            assert (made.request_counts.total, made.expires_at) == (0, made.created_at + 86400)
            batches.put(3, "batch", phase=jobs.COMPLETED, counts=Counts(5, 4, 1), usage=TokenUsage(7, 2, 9, 1),
                        models={"m": 5}, stamps={"in_progress": NOW, "completed": NOW + 9})  # fmt: skip
            done = await client.batches.retrieve(batch_id(3))
            assert done.usage is not None
            assert (done.usage.total_tokens, done.model, done.completed_at) == (16, "m", int(NOW) + 9)
            assert (await client.batches.cancel(made.id)).status == "cancelling"
            assert [one.id async for one in client.batches.list(limit=2)] == [batch_id(n) for n in (3, 2, 1)]
            with pytest.raises(openai.NotFoundError):
                await client.batches.retrieve("batch_none")
            with pytest.raises(openai.BadRequestError, match="completion_window"):
                await client.batches.create(
                    input_file_id="file-1",
                    endpoint="/v1/completions",
                    completion_window="tomorrow",  # type: ignore[arg-type]
                )

    run(asyncio.wait_for(main(), 50))


def test_who_reads_slowly_holds_the_records_back_and_gets_all_of_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with box(tmp_path) as (plane, batches, _):
            made = 0

            async def source(*_args: Any, **_kwargs: Any) -> AsyncGenerator[bytes, None]:
                nonlocal made
                while made < 2000:
                    made += 1
                    yield PIECE
                    await asyncio.sleep(0)

            batches.partial = source  # type: ignore[method-assign,assignment]
            async with plane.wire() as wire:
                await wire.send(get(f"{ONE}/output"))
                status, headers, _raw = await wire.head()
                assert (status, dict(headers)[b"content-type"]) == (200, b"application/jsonl")
                before = -1
                while before != made:  # until the sockets are full
                    before = made
                    await asyncio.sleep(0.2)
                assert made < 1000
                assert sum([len(piece) async for piece in wire.chunks()]) == 2000 * len(PIECE)

    run(asyncio.wait_for(main(), 50))


def test_records_that_cannot_be_read_break_the_connection(tmp_path: Path) -> None:
    async def main() -> None:
        async with box(tmp_path) as (plane, batches, _):
            batches.pieces[False] = [b"{}\n", OSError("bad sector")]
            async with plane.wire() as wire:
                await wire.send(get(f"{ONE}/output"))
                assert (await wire.head())[0] == 200
                assert await wire.at_end() == b"3\r\n{}\n\r\n"  # closed without the chunk that ends a body

    run(asyncio.wait_for(main(), 30))


def test_a_client_that_leaves_frees_what_worked_for_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with box(tmp_path) as (plane, batches, items):
            batches.news = asyncio.Queue()
            async with plane.wire() as polling, plane.wire() as watching:
                await polling.send(get(f"/v1/batch/completions/{item_id(1)}?wait=60"))
                events = get(f"{ONE}/events").replace(b"\r\n\r\n", b"\r\nAccept: text/event-stream\r\n\r\n")
                await watching.send(events)
                assert (await watching.head())[0] == 200
                await eventually(lambda: items.waiting)
                assert batches.closed == []
            await eventually(lambda: not items.waiting and batches.closed == [batch_id(1)])

    run(asyncio.wait_for(main(), 30))


def test_a_connection_serves_on_after_a_long_poll(tmp_path: Path) -> None:
    async def main() -> None:
        async with box(tmp_path) as (plane, _, items), plane.wire() as wire:
            await wire.send(get(f"/v1/batch/completions/{item_id(1)}?wait=60"))
            await eventually(lambda: items.waiting)
            items.finish(1)
            assert (await wire.reply()).json["status"] == "completed"
            await wire.send(request("POST", f"{ONE}/pause", key="batch", raw_body=b""))
            assert (await wire.reply()).json["paused"] is True
            await wire.send(get(f"{ONE}/output"))
            assert (await wire.reply()).body == b""
            await wire.send(get("/v1/batches"))
            assert (await wire.reply()).json["data"][0]["id"] == batch_id(1)

    run(asyncio.wait_for(main(), 30))
