"""Multipart uploads: judged whole, kept in a bounded file, sent on byte for byte."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from tests.support.aio import eventually
from tests.support.data_plane import LAUNCH, instance, request, run, running
from tests.support.raw_upstream import RawUpstream, Visit, answer
from vllm_bootstrap.gateway import GatewayLimits
from vllm_bootstrap.gateway.multipart import SLICE_BYTES
from vllm_bootstrap.gateway.uploads import Spool, Upload

PATH = "/v1/audio/transcriptions"
TYPE = ("Content-Type", 'multipart/form-data; boundary="b-1"')


def part(name: str, data: bytes, *, file: bool = False) -> bytes:
    filename = '; filename="a.wav"' if file else ""
    return b'--b-1\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (
        name.encode(),
        filename.encode(),
        data,
    )


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b-1--\r\n"


MODEL = part("model", b"model")
FILE = part("file", b"\x00\r\n--b-\xff" * 50, file=True)


@pytest.mark.parametrize("path", [PATH, f"/proxy/{LAUNCH}{PATH}"])
@pytest.mark.parametrize(
    "body", [form(MODEL, FILE), form(FILE, part("language", b"de"), MODEL), form(MODEL, FILE) + b"\r\n"]
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_form_passes_byte_for_byte(tmp_path: Path, path: str, body: bytes, chunked: bool) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            raw = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
            headers = [TYPE, ("Transfer-Encoding", "chunked")] if chunked else [TYPE]
            reply = await plane.ask("POST", path, raw_body=raw, headers=headers)
            assert reply.status == 200
            visit = engine.requests[-1]
            assert visit.body == body
            assert visit.header(b"content-type") == [TYPE[1].encode()]
            assert visit.header(b"content-length") == [str(len(body)).encode()]

    run(main())


def test_a_large_upload_goes_through_a_file_and_little_memory(tmp_path: Path) -> None:
    size = 60_000_000
    digest, seen = hashlib.sha256(), 0

    async def script(visit: Visit) -> None:
        nonlocal seen
        left = int(visit.header(b"content-length")[0])
        while left:
            piece = await visit.reader.read(min(left, 1 << 20))
            digest.update(piece)
            seen += len(piece)
            left -= len(piece)
        await visit.send(answer())

    async def main() -> None:
        spool = tmp_path / "spool"
        spool.mkdir()
        engine = RawUpstream(tmp_path / "e", script, reads_bodies=False)
        async with running(spool) as plane, engine.running():
            plane.announce(instance(engine.endpoint))
            body = form(MODEL, part("file", b"\r\n--b-" * (size // 6), file=True))
            reply = await plane.ask("POST", PATH, raw_body=body, headers=[TYPE])
            assert reply.status == 200
            assert seen == len(body)
            assert digest.digest() == hashlib.sha256(body).digest()
            assert list(spool.iterdir()) == []

    run(main())


def test_others_go_on_while_a_body_full_of_near_boundaries_is_read() -> None:
    """Such a body is read a thousand times slower than others: 60 ms for what one read of a socket may bring."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> None:
        piece = b"\r\n--b-\x00" * 37_000
        upload = Upload(b"multipart/form-data; boundary=b", max_bytes=1 << 20, spool=Spool(Path(), 1 << 20))
        upload.feed(b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n')
        assert not upload.has_backlog  # what is small is read at once
        upload.feed(piece)
        upload.feed(b'\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b--')  # and waits its turn
        task = asyncio.create_task(others())
        await upload.digest()
        task.cancel()
        assert turns >= len(piece) // SLICE_BYTES
        assert not upload.has_backlog
        upload.finish()
        assert upload.fields == {"model": "m"}

    run(main())


def test_a_slow_upload_holds_no_slot(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            raw = request("POST", PATH, raw_body=form(MODEL, FILE), headers=[TYPE])
            async with plane.wire() as wire:
                await wire.send(raw[:-20])
                await eventually(lambda: len(plane.gateway.connections) - len(plane.gateway.idle) == 1)
                assert (await plane.ask()).status == 200
                await wire.send(raw[-20:])
                assert (await wire.reply()).status == 200

    run(main())


def test_an_upload_is_sent_again_when_a_connection_was_stale(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        if visit.connection == 1 and b"multipart" in visit.head:
            visit.cut()
        else:
            await visit.send(answer())

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint))
            await plane.ask()
            body = form(MODEL, part("file", b"x" * 3_000_000, file=True))
            reply = await plane.ask("POST", PATH, raw_body=body, headers=[TYPE])
            assert reply.status == 200
            assert [visit.connection for visit in engine.requests] == [1, 1, 2]
            assert engine.requests[-1].body == body

    run(main())


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (form(FILE), 400, "model"),
        (form(part("model", b"other"), FILE), 404, "model"),
        (form(MODEL, FILE, part("model", b"other")), 400, "model"),
        (form(part("model", b"model", file=True), FILE), 400, "model"),
        (form(part("model", b"\xff"), FILE), 400, "model"),
        (form(part("model", b"m" * 70_000), FILE), 400, "model"),
        (form(MODEL, FILE, part("vllm_xargs", b"{}")), 400, "vllm_xargs"),
        (form(MODEL, FILE).replace(b'name="file"', b"name*=utf-8''model"), 400, None),
        (form(MODEL, FILE).replace(b'name="file"', b'name="x"; name="model"'), 400, None),
        (form(MODEL, FILE).replace(b'form-data; name="file"; ', b""), 400, None),
        (form(MODEL, FILE).replace(b"\r\n\r\nmodel", b"\r\nContent-Disposition: x; name=x\r\n\r\nmodel"), 400, None),
        (form(MODEL, *[part(f"p{n}", b"") for n in range(120)]), 400, None),
        (form(MODEL, FILE)[:-4], 400, None),
        (b"no form at all", 400, None),
        (b"", 400, None),
        (form(MODEL, part("file", b"x" * 300_000, file=True)), 413, None),
    ],
)  # fmt: skip
def test_forms_that_are_refused(tmp_path: Path, body: bytes, status: int, param: str | None) -> None:
    async def main() -> None:
        limits = GatewayLimits(max_upload_bytes=200_000)
        async with running(tmp_path, limits) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            reply = await plane.ask("POST", PATH, raw_body=body, headers=[TYPE])
            assert (reply.status, reply.json["error"]["param"]) == (status, param)
            assert engine.requests == []
            assert plane.in_use() == 0

    run(main())


@pytest.mark.parametrize(
    "content_type",
    ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=b; charset=utf-7",
     "multipart/form-data; boundary=" + "b" * 300],
)  # fmt: skip
def test_forms_that_cannot_be_read(tmp_path: Path, content_type: str) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane:
            reply = await plane.ask("POST", PATH, raw_body=form(MODEL), headers=[("Content-Type", content_type)])
            assert reply.status == 400

    run(main())


def test_json_where_a_form_is_wanted_and_the_other_way_round(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane:
            assert (await plane.ask("POST", PATH, {"model": "model"})).status == 415
            assert (await plane.ask(raw_body=form(MODEL), headers=[TYPE])).status == 415

    run(main())


def test_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            running(tmp_path / "there is no such folder") as plane,
            RawUpstream(tmp_path / "e").running() as engine,
        ):
            plane.announce(instance(engine.endpoint))
            body = form(MODEL, part("file", b"x" * 5_000_000, file=True))
            reply = await plane.ask("POST", PATH, raw_body=body, headers=[TYPE])
            assert (reply.status, reply.code) == (507, "storage_full")
            assert plane.in_use() == 0
            small = await plane.ask("POST", PATH, raw_body=form(MODEL, FILE), headers=[TYPE])
            assert small.status == 200  # it needs no disk

    run(main())


def test_all_uploads_together_are_bounded(tmp_path: Path) -> None:
    """In memory or on disk; room that was taken is free again however an upload ends."""
    large = request("POST", PATH, raw_body=form(MODEL, part("file", b"x" * 3_000_000, file=True)), headers=[TYPE])

    async def main() -> None:
        limits = GatewayLimits(spool_budget_bytes=4_000_000)
        spool = tmp_path / "spool"
        spool.mkdir()
        async with running(spool, limits) as plane, RawUpstream(tmp_path / "e").running() as engine:
            plane.announce(instance(engine.endpoint))
            held = plane.gateway.spool
            async with plane.wire() as slow, plane.wire() as other:
                await slow.send(large[:-20])
                await eventually(lambda: held.held > 2_900_000)
                await other.send(large[:1_500_000])
                reply = await other.reply()
                assert (reply.status, reply.code) == (503, "overloaded")
                assert reply.header("retry-after") == "1"
                await eventually(lambda: held.held < 3_100_000)
                small = await plane.ask("POST", PATH, raw_body=form(MODEL, FILE), headers=[TYPE])
                assert small.status == 200
                await slow.send(large[-20:])
                assert (await slow.reply()).status == 200
            await eventually(lambda: held.held == 0)
            async with plane.wire() as leaver:
                await leaver.send(large[:-20])
                await eventually(lambda: held.held > 2_900_000)
            await eventually(lambda: held.held == 0 and not plane.gateway.connections)
            async with plane.wire() as wire:
                await wire.send(large)
                assert (await wire.reply()).status == 200
            assert held.held == 0
            assert len(engine.requests) == 3

    run(main())


def test_a_file_that_is_made_while_its_upload_is_given_up_is_closed(tmp_path: Path) -> None:
    """A thread makes it, and the client may be gone by then."""
    spool = Spool(tmp_path, 1 << 30)
    upload = Upload(b"multipart/form-data; boundary=b", max_bytes=1 << 30, spool=spool)
    upload.feed(b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + b"x" * 2_000_000)
    upload.close()
    upload._write([b"x"])
    assert upload._file is not None
    assert upload._file.closed
    assert spool.held == 0
    upload.close()
    assert spool.held == 0


def test_an_engine_that_answers_before_it_has_the_whole_upload(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        await visit.send(answer(b"enough", status=b"400 Bad"))
        await visit.gone()

    async def main() -> None:
        engine = RawUpstream(tmp_path / "e", script, reads_bodies=False)
        async with running(tmp_path) as plane, engine.running():
            plane.announce(instance(engine.endpoint))
            body = form(MODEL, part("file", b"x" * 30_000_000, file=True))
            for _ in range(2):
                reply = await plane.ask("POST", PATH, raw_body=body, headers=[TYPE])
                assert (reply.status, reply.body) == (400, b"enough")
            assert engine.connections == 2
            await eventually(lambda: engine.open == 0 and len(asyncio.all_tasks()) <= 2)

    run(main())
