"""Places that are lost, moved, taken back and cancelled: whoever waits hears of it, and nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.aio import eventually
from tests.support.data_plane import KEYS, LAUNCH, Plane, instance, request, run, running
from tests.support.raw_upstream import EVENTS, LAST_CHUNK, RawUpstream, Visit, answer, chunk
from vllm_bootstrap.auth.keys import Key
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.gateway import GatewayLimits, revive
from vllm_bootstrap.gateway.call import Call
from vllm_bootstrap.gateway.entry import REPLAYED_BYTES
from vllm_bootstrap.scheduler.gate import ByLaunch
from vllm_bootstrap.serving import Endpoint

OTHER = "l00000000000000000002"
STREAM = {"model": "model", "prompt": "x", "stream": True}
TOKEN = b'data: {"choices":[{"text":"a"}]}\n\n'


@contextlib.asynccontextmanager
async def two_engines(tmp: Path, slots: int = 1) -> AsyncIterator[tuple[Plane, RawUpstream]]:
    """One that is not there and is asked first, and one that answers."""
    async with running(tmp) as plane, RawUpstream(tmp / "there").running() as engine:
        plane.announce(instance(Endpoint(uds=str(tmp / "gone")), slots=slots))
        plane.announce(instance(engine.endpoint, OTHER, slots=slots))
        yield plane, engine


async def holding(visit: Visit) -> None:
    await visit.gone()


async def stream_once(visit: Visit) -> None:
    await visit.send(EVENTS, chunk(TOKEN))
    await visit.gone()


async def leaves_nothing(plane: Plane) -> None:
    await eventually(lambda: not plane.in_use() and not plane.queued() and not plane.gateway.inflight.list())
    assert plane.gateway.body_bytes == 0


# Engines that cannot be reached


def test_another_engine_gets_what_one_could_not_be_asked(tmp_path: Path) -> None:
    async def main() -> None:
        async with two_engines(tmp_path) as (plane, engine):
            for _ in range(4):
                reply = await plane.ask()
                assert (reply.status, reply.header("x-launch-id")) == (200, OTHER)
            assert len(engine.requests) == 4
            assert plane.gateway.reviver.watched == {LAUNCH}
            await leaves_nothing(plane)

    run(main())


def test_requests_for_one_engine_are_not_sent_to_another(tmp_path: Path) -> None:
    async def main() -> None:
        async with two_engines(tmp_path) as (plane, engine):
            reply = await plane.ask("POST", f"/proxy/{LAUNCH}/v1/completions")
            assert (reply.status, reply.code) == (502, "upstream_error")
            reply = await plane.ask("POST", f"/proxy/{LAUNCH}/v1/completions")
            assert reply.status == 503
            assert reply.header("retry-after") is not None
            assert not engine.requests
            await leaves_nothing(plane)

    run(main())


def test_an_engine_that_comes_back_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revive, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(revive, "LONGEST_PAUSE_S", 0.02)

    async def main() -> None:
        async with running(tmp_path) as plane:
            plane.announce(instance(Endpoint(uds=str(tmp_path / "e")), health_path="/alive"))
            assert (await plane.ask()).status == 502
            await asyncio.sleep(0.1)  # it is asked several times
            assert plane.gateway.reviver.watched == {LAUNCH}
            async with RawUpstream(tmp_path / "e").running() as engine:
                await eventually(lambda: not plane.gateway.reviver.watched)
                assert engine.requests[-1].lines[0] == b"GET /alive HTTP/1.1"
                assert (await plane.ask()).status == 200

    run(main())


@pytest.mark.parametrize("how", ["withdrawn", "closed"])
def test_nobody_asks_for_an_engine_that_is_not_wanted_any_more(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        async with two_engines(tmp_path) as (plane, _):
            await plane.ask()
            (task,) = plane.gateway.reviver._tasks.values()
            if how == "withdrawn":
                plane.gate.forget(LAUNCH)
            else:
                plane.gateway.close()
                plane.gateway.reviver._ejected(instance(Endpoint(uds="/x")))
            assert not plane.gateway.reviver.watched
            await eventually(task.done)
            assert task.cancelled()

    run(main())


def test_an_engine_that_dies_with_requests_running_and_queued(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, queue_timeout_s=60) as plane:
            async with RawUpstream(tmp_path / "dies", stream_once).running() as engine:
                plane.announce(instance(engine.endpoint, slots=20))
                wires = [await plane.connect() for _ in range(60)]
                for number, wire in enumerate(wires):
                    await wire.send(request(body={**STREAM, "stream": number % 2 == 0}))
                await eventually(lambda: engine.open == 20 and plane.queued() == 40)
                began = time.monotonic()
            (tmp_path / "dies").unlink(missing_ok=True)
            replies = await asyncio.gather(*(wire.reply() for wire in wires))
            assert time.monotonic() - began < 5
            broken = [reply for reply in replies if reply.status == 200]
            assert len(broken) == 20
            for reply in broken:  # streams that had begun end with an error event and no [DONE]
                assert json.loads(reply.body.rpartition(b"data: ")[2])["error"]["code"] == "upstream_error"
                assert b"[DONE]" not in reply.body
            refused = [reply for reply in replies if reply.status != 200]
            assert {reply.status for reply in refused} <= {502, 503}
            assert all(reply.status == 502 or reply.header("retry-after") for reply in refused)
            await leaves_nothing(plane)
            async with RawUpstream(tmp_path / "again").running() as engine:  # it comes back elsewhere
                plane.announce(instance(engine.endpoint, slots=20))
                assert (await plane.ask()).status == 200

    run(main())


@pytest.mark.parametrize("cls", ["realtime", "batch"])
def test_a_queue_is_not_told_to_clear_sooner_because_an_engine_has_died(tmp_path: Path, cls: str) -> None:
    ends: list[object] = []

    async def script(visit: Visit) -> None:
        if b"quick" in visit.body:
            await visit.send(answer())
        else:
            await stream_once(visit)

    async def occupy(plane: Plane, launch_id: str) -> None:
        await (await plane.connect()).send(request("POST", f"/proxy/{launch_id}/v1/completions", STREAM))

    async def refusal(plane: Plane) -> int:
        reply = await plane.ask()
        assert (reply.status, reply.code) == (429, "queue_full")
        return int(reply.header("retry-after") or 0)

    async def main() -> None:
        async with (
            running(tmp_path, max_queued=40) as plane,
            RawUpstream(tmp_path / "lives", script).running() as sister,
        ):
            async with RawUpstream(tmp_path / "dies", script).running() as engine:
                plane.announce(instance(engine.endpoint, slots=5), instance(sister.endpoint, OTHER, slots=1))
                for _ in range(2):
                    assert (await plane.ask(body={**STREAM, "prompt": "quick"})).status == 200
                await asyncio.sleep(0.5)
                await occupy(plane, OTHER)
                for number in range(4):
                    if cls == "realtime":
                        await occupy(plane, LAUNCH)
                    else:
                        body, path = json.dumps({"model": "model", "prompt": "x"}).encode(), "/v1/completions"
                        Call(plane.gateway, KEYS["sk-batch"], ByLaunch(LAUNCH), path, body, on_end=ends.append).start()
                    await eventually(lambda so_far=number: plane.in_use() == so_far + 2)
                await eventually(lambda: not plane.gate._revocable)  # the answers of batch have begun
                await occupy(plane, LAUNCH)
                for _ in range(40):
                    await (await plane.connect()).send(request())
                await eventually(lambda: plane.in_use() == 6 and plane.queued() == 40)
                before = await refusal(plane)
                assert before >= 10  # half a second for each pair
                engine.abort_all()
                (tmp_path / "dies").unlink()
                await eventually(lambda: plane.in_use() == 1 and plane.queued() == 40)
            assert sum(record.code == "upstream_error" for record in plane.records) == 5
            assert len(ends) == (4 if cls == "batch" else 0)
            assert await refusal(plane) >= before

    run(main())


def test_what_waits_for_a_dead_engine_goes_to_its_sister(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "lives").running() as sister:
            async with RawUpstream(tmp_path / "dies", holding).running() as engine:
                plane.announce(instance(engine.endpoint, slots=2))
                wires = [await plane.connect() for _ in range(10)]
                for wire in wires:
                    await wire.send(request())
                await eventually(lambda: engine.open == 2 and plane.queued() == 8)
                plane.announce(instance(Endpoint(uds=str(tmp_path / "dies")), slots=2))
            (tmp_path / "dies").unlink(missing_ok=True)
            plane.announce(instance(sister.endpoint, OTHER, slots=2))
            replies = await asyncio.gather(*(wire.reply() for wire in wires))
            assert sorted(reply.status for reply in replies) == [200] * 8 + [502] * 2
            assert len(sister.requests) == 8
            await leaves_nothing(plane)

    run(main())


# Places that are taken back


@pytest.mark.parametrize("heads", [True, False])
def test_batch_makes_room_before_its_first_byte(tmp_path: Path, heads: bool) -> None:
    async def script(visit: Visit) -> None:
        if visit.header(b"x-vllm-priority") == [b"0"] or len(engine_of[0].requests) > 2:
            await visit.send(answer(b'{"who":"%b"}' % visit.header(b"x-vllm-priority")[0]))
            return
        if heads:  # as vLLM does: the head at once, tokens when it gets to them
            await visit.send(EVENTS)
        await visit.gone()

    engine_of: list[RawUpstream] = []

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            engine_of.append(engine)
            plane.announce(instance(engine.endpoint, slots=1))
            async with plane.wire() as batch, plane.wire() as chat:
                await batch.send(request(body=STREAM, key="sk-batch"))
                await eventually(lambda: len(engine.requests) == 1)
                (info,) = plane.gateway.inflight.list()
                assert (info.state, info.cls) == ("running", "batch")
                await chat.send(request())
                assert (await chat.reply()).body == b'{"who":"0"}'
                late = await batch.reply()
                assert (late.status, late.body) == (200, b'{"who":"100"}')
            assert len(engine.requests) == 3
            assert engine.requests[0].body == engine.requests[2].body
            await leaves_nothing(plane)
            assert len(plane.records) == 2

    run(main())


def completion(size: int) -> bytes:
    """The body of a completion, so many bytes long."""
    body = json.dumps({"model": "model", "prompt": ""}).encode()
    return body[:-2] + b"x" * (size - len(body)) + body[-2:]


FORM = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nmodel\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nx\r\n--b--\r\n'
)
NOT_KEPT = {
    "a body that is too long": request(raw_body=completion(REPLAYED_BYTES + 1), key="sk-batch"),
    "a form": request(
        path="/v1/audio/transcriptions", raw_body=FORM, key="sk-batch",
        headers=[("Content-Type", "multipart/form-data; boundary=b")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_KEPT)
def test_batch_whose_body_is_not_kept_stays_where_another_makes_room(tmp_path: Path, what: str) -> None:
    """It came last, so that it would be the first to go."""
    go = asyncio.Event()

    async def script(visit: Visit) -> None:
        if visit.header(b"x-vllm-priority") == [b"100"]:
            await go.wait()
        await visit.send(answer())

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=3))  # two for batch, one is in reserve
            async with plane.wire() as kept, plane.wire() as not_kept:
                await kept.send(request(raw_body=completion(REPLAYED_BYTES), key="sk-batch"))
                await eventually(lambda: len(engine.requests) == 1)
                await not_kept.send(NOT_KEPT[what])
                await eventually(lambda: len(engine.requests) == 2)
                assert (await plane.ask()).status == 200
                states = plane.gateway.inflight.list
                await eventually(lambda: states()[0].state == "queued")
                assert [one.state for one in states()] == ["queued", "running"]
                go.set()
                assert (await not_kept.reply()).status == 200
            await leaves_nothing(plane)

    run(main())


def test_batch_that_has_begun_stays(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def script(visit: Visit) -> None:
        if visit.header(b"x-vllm-priority") == [b"0"]:
            await visit.send(answer())
            return
        await visit.send(EVENTS, chunk(TOKEN))
        await go.wait()
        await visit.send(chunk(TOKEN), LAST_CHUNK)

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            async with plane.wire() as batch, plane.wire() as chat:
                await batch.send(request(body=STREAM, key="sk-batch"))
                await batch.head()
                await chat.send(request())
                await eventually(lambda: plane.queued() == 1)
                await asyncio.sleep(0.05)
                assert len(engine.requests) == 1
                go.set()
                assert b"".join([piece async for piece in batch.chunks()]) == TOKEN * 2
                assert (await chat.reply()).status == 200

    run(main())


def test_batch_of_which_the_client_has_seen_the_head_stays(tmp_path: Path) -> None:
    """A refusal may come in two pieces. To answer anew after the first one would be two answers in one."""
    go = asyncio.Event()
    refusal = answer(b'{"error":{}}', status=b"400 Bad Request")

    async def script(visit: Visit) -> None:
        if visit.header(b"x-vllm-priority") == [b"0"]:
            await visit.send(answer())
            return
        await visit.send(refusal[:-12])
        await go.wait()
        await visit.send(refusal[-12:])

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            async with plane.wire() as batch, plane.wire() as chat:
                await batch.send(request(key="sk-batch"))
                assert (await batch.head())[0] == 400
                await chat.send(request())
                await eventually(lambda: plane.queued() == 1)
                await asyncio.sleep(0.05)
                assert len(engine.requests) == 1
                go.set()
                assert await batch.reader.readexactly(12) == b'{"error":{}}'
                assert (await chat.reply()).status == 200
                await batch.send(request(key="sk-batch"))
                assert (await batch.reply()).status == 400
            await leaves_nothing(plane)

    run(main())


# Ended from outside


def test_requests_are_listed_and_can_be_cancelled_in_every_state(tmp_path: Path) -> None:
    async def script(visit: Visit) -> None:
        if b'"stream": true' in visit.body:
            await visit.send(EVENTS, chunk(TOKEN))
        await visit.gone()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=2))
            inflight = plane.gateway.inflight
            streamed, waiting, queued, reading = [await plane.connect() for _ in range(4)]
            same = [("X-Request-Id", "mine")]
            await streamed.send(request(body=STREAM, headers=same))
            await streamed.head()
            await waiting.send(request(headers=same))
            await eventually(lambda: plane.in_use() == 2)
            await queued.send(request(body={"model": "model", "prompt": ["a", "b"]}, headers=same))
            await eventually(lambda: plane.queued() == 1)
            await reading.send(request(headers=same)[:-5])
            await eventually(lambda: len(inflight.list()) == 4)
            listed = inflight.list()
            assert [one.state for one in listed] == ["running", "running", "queued", "reading"]
            assert [one.model for one in listed] == ["model", "model", "model", None]
            assert [one.launch_id for one in listed] == [LAUNCH, LAUNCH, None, None]
            assert [one.stream for one in listed] == [True, False, False, False]
            assert [one.tokens for one in listed] == [1, 0, 0, 0]
            assert [one.sequences for one in listed] == [1, 1, 2, 1]
            assert {one.owner for one in listed} == {"rt"}
            assert {one.path for one in listed} == {"/v1/completions"}
            ids = [one.id for one in listed]
            assert ids[0] == "mine"
            assert len(set(ids)) == 4
            assert engine.requests[1].header(b"x-request-id") == [ids[1].encode()]

            assert all(inflight.cancel(one) for one in reversed(ids))
            assert not inflight.list()
            assert plane.in_use() == plane.queued() == 0
            for wire in (waiting, queued, reading):
                reply = await wire.reply()
                assert (reply.status, reply.code, reply.header("x-should-retry")) == (409, "cancelled", "false")
            body = b"".join([piece async for piece in streamed.chunks()])
            assert json.loads(body.rpartition(b"data: ")[2])["error"]["code"] == "cancelled"
            assert b"[DONE]" not in body
            await eventually(lambda: engine.open == 0, timeout=1)
            assert not inflight.cancel(ids[0])
            assert {record.code for record in plane.records} == {"cancelled"}

    run(main())


# Clients that go away

PHASES = ["in the head", "in the body", "queued", "before the first chunk", "mid-stream", "not streamed"]
ROUNDS = 170  # over a thousand for all phases together


async def _vanish(plane: Plane, engine: RawUpstream, phase: str) -> None:
    """One client that goes away in that phase; everything done for it must be over within a second."""
    wire = await plane.connect()
    whole = request(body={**STREAM, "stream": phase != "not streamed"})
    await wire.send(whole[: {"in the head": 20, "in the body": len(whole) - 5}.get(phase, len(whole))])
    if phase == "in the body":
        await eventually(plane.gateway.inflight.list)
    elif phase == "queued":
        await eventually(lambda: plane.queued() == 1)
    elif phase != "in the head":
        await eventually(lambda: engine.open)
    if phase in ("before the first chunk", "mid-stream"):
        await wire.head()
    if phase == "mid-stream":
        await wire.reader.readuntil(b"\n\n")
    wire.close()
    plane.wires.remove(wire)
    held = int(phase == "queued")  # by whom it waited for
    await eventually(lambda: plane.in_use() == held and plane.queued() == 0 and engine.open == held, timeout=1)


def _kept() -> tuple[int, int]:
    return len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())


@pytest.mark.parametrize("phase", PHASES)
def test_clients_that_vanish_leave_nothing(tmp_path: Path, phase: str) -> None:
    async def script(visit: Visit) -> None:
        if phase == "mid-stream":
            await visit.send(EVENTS, chunk(TOKEN))
        elif phase == "before the first chunk":
            await visit.send(EVENTS)
        await visit.gone()

    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", script).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            holders = int(phase == "queued")
            for _ in range(holders):
                await (await plane.connect()).send(request())
                await eventually(lambda: engine.open == 1)
            await _vanish(plane, engine, phase)
            await eventually(lambda: len(plane.gateway.connections) == holders)
            before = _kept()
            for _ in range(ROUNDS):
                await _vanish(plane, engine, phase)
            await eventually(lambda: len(plane.gateway.connections) == holders)
            await eventually(lambda: _kept() == before)
            assert len(plane.gateway.inflight) == holders

    run(main())


# Keys that change


@pytest.mark.parametrize("cuts", [False, True])
def test_a_revoked_key_ends_what_waits_and_on_wish_what_runs(tmp_path: Path, cuts: bool) -> None:
    async def main() -> None:
        limits = GatewayLimits(revoked_keys_cut_streams=cuts)
        async with running(tmp_path, limits) as plane, RawUpstream(tmp_path / "e", stream_once).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            running_one, queued, reading, other = [await plane.connect() for _ in range(4)]
            await running_one.send(request(body=STREAM))
            await running_one.head()
            await queued.send(request())
            await eventually(lambda: plane.queued() == 1)
            await reading.send(request()[:-5])
            await eventually(lambda: len(plane.gateway.inflight) == 3)
            await other.send(request(key="sk-admin"))
            await eventually(lambda: plane.queued() == 2)
            keys = plane.gateway.guard._keys
            keys._shared = tuple(key for key in keys._shared if key.principal.name != "rt")
            keys.reload()
            for wire in (queued, reading):
                reply = await wire.reply()
                assert (reply.status, reply.code) == (401, "invalid_api_key")
            if cuts:
                body = b"".join([piece async for piece in running_one.chunks()])
                assert json.loads(body.rpartition(b"data: ")[2])["error"]["code"] == "invalid_api_key"
                assert (await other.head())[0] == 200
            else:
                assert plane.queued() == 1
                assert plane.in_use() == 1
            assert KEYS["sk-admin"].name in {one.owner for one in plane.gateway.inflight.list()}

    run(main())


def test_a_revoked_key_is_noticed_while_nobody_asks(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", stream_once).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            runs, waits = await plane.connect(), await plane.connect()
            await runs.send(request(body=STREAM))
            await runs.head()
            await waits.send(request())
            await eventually(lambda: plane.queued() == 1)
            keys = plane.gateway.guard._keys
            keys._shared, keys._path = (), tmp_path / "keys.json"
            keys._path.write_text('{"keys": []}')
            reply = await waits.reply()
            assert (reply.status, reply.code) == (401, "invalid_api_key")

    run(main())


def test_a_key_that_expires_while_its_request_waits(tmp_path: Path) -> None:
    async def main() -> None:
        soon = Principal("soon", frozenset({"realtime"}), expires_at=time.time() + 1)
        limits = GatewayLimits(upstream_keep_alive_s=0.2)
        async with (
            running(tmp_path, limits, keys={**KEYS, "sk-soon": soon}) as plane,
            RawUpstream(tmp_path / "e", stream_once).running() as engine,
        ):
            plane.announce(instance(engine.endpoint, slots=1))
            runs, waits = await plane.connect(), await plane.connect()
            await runs.send(request(body=STREAM, key="sk-soon"))
            await runs.head()
            await waits.send(request(key="sk-soon"))
            await eventually(lambda: plane.queued() == 1)
            reply = await waits.reply()
            assert (reply.status, reply.code) == (401, "invalid_api_key")
            assert plane.in_use() == 1, "what runs may end"

    run(main())


def test_a_key_that_lost_a_right_is_told_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path) as plane, RawUpstream(tmp_path / "e", holding).running() as engine:
            plane.announce(instance(engine.endpoint, slots=1))
            for _ in range(2):
                await (await plane.connect()).send(request())
            await eventually(lambda: plane.queued() == 1)
            keys = plane.gateway.guard._keys
            narrower = replace(KEYS["sk-realtime"], models=("other",))
            limited = replace(KEYS["sk-realtime"], requests_per_minute=1)
            for principal, left in ((limited, 1), (narrower, 0)):
                keys._shared = tuple(
                    Key(key.digest, principal) if key.principal.name == "rt" else key for key in keys._shared
                )
                keys.reload()
                assert plane.queued() == left
            assert (plane.records[-1].status, plane.records[-1].code) == (403, "insufficient_scope")

    run(main())


def test_what_needs_no_place_is_told_that_the_engine_is_not_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with two_engines(tmp_path) as (plane, engine):
            reply = await plane.ask("GET", f"/proxy/{LAUNCH}/health")
            assert (reply.status, reply.code) == (502, "upstream_error")
            assert (await plane.ask("GET", f"/proxy/{OTHER}/health")).status == 200
            assert len(engine.requests) == 1
            await leaves_nothing(plane)

    run(main())


def test_a_place_is_taken_back_while_its_engine_is_being_connected_to(tmp_path: Path) -> None:
    """The engine's queue of connections is full, so that the batch request has not even been sent."""

    async def main() -> None:
        async with running(tmp_path) as plane:
            path = str(tmp_path / "busy")
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen(0)
            filler = socket.socket(socket.AF_UNIX)
            filler.connect(path)
            plane.announce(instance(Endpoint(uds=path), slots=1))
            async with plane.wire() as batch, plane.wire() as chat:
                await batch.send(request(key="sk-batch"))
                await eventually(lambda: plane.in_use() == 1)
                await chat.send(request())
                states = plane.gateway.inflight.list
                await eventually(lambda: [(one.cls, one.state) for one in states()][1:] == [("realtime", "running")])
                assert [(one.cls, one.state) for one in states()] == [("batch", "queued"), ("realtime", "running")]
            await leaves_nothing(plane)
            filler.close()
            listener.close()

    run(main())
