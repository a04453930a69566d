"""Webhooks against a real HTTP server, with the real database."""

import asyncio
import base64
import contextlib
import functools
import json
import logging
import time

import openai
import pytest

from tests.support.aio import eventually, run
from vllm_bootstrap.batches import posting
from vllm_bootstrap.batches.posting import Dial, NotAllowed, NotReached
from vllm_bootstrap.batches.types import Webhook
from vllm_bootstrap.batches.webhooks import Webhooks, announcement, insert
from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import StorageFailed, StorageFull, Unavailable

SECRET = "whsec_" + base64.b64encode(b"the key that signs").decode()
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
BROKEN = b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno"


class Receiver:
    """Answers each connection with the next of ``answers`` (the last one again and again). ``got``: path, headers and
    body of each request."""

    def __init__(self, *answers):
        self.answers = list(answers) or [NO_CONTENT]
        self.got = []
        self._tasks = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        try:
            await self._answer(reader, writer)
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError):
            pass  # whoever asked has gone away
        finally:
            writer.transport.abort()

    async def _answer(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(_pair(line) for line in head[1:] if line)
        body = await reader.readexactly(int(headers["content-length"]))
        self.got.append((head[0], headers, body))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            await answer(writer)
        else:
            writer.write(answer)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/hook?token=in-the-url"


def _pair(line):
    name, _, value = line.partition(": ")
    return name.lower(), value


class Hand:
    """A wall clock that is moved by hand."""

    def __init__(self, at=None):
        self.at = time.time() if at is None else at

    def __call__(self):
        return self.at


@contextlib.asynccontextmanager
async def opened(path, clock, *, attempts=3, post=posting.post, allow_private=True):
    db = await asyncio.to_thread(Database.open, path)
    hooks = Webhooks(db, allow_private=allow_private, attempts=attempts, clock=clock, post=post, chance=lambda: 1.0)
    task = asyncio.create_task(hooks.run())
    try:
        yield db, hooks
    finally:
        await hooks.close()
        await asyncio.wait_for(task, 5)
        await asyncio.to_thread(db.close)


async def rows(db):
    found = await db.read(lambda conn: conn.execute("SELECT * FROM webhooks ORDER BY id").fetchall())
    return [dict(row) for row in found]


async def tell(db, hooks, url, clock, number=1, state="completed"):
    row = announcement(f"batch_{number}", "night", Webhook(url, SECRET), state, clock(), bytes([number] * 7))
    await db.write(lambda conn: insert(conn, row))
    hooks.kick()
    return row


async def gone(db):
    """Until nothing is left to be told."""
    async with asyncio.timeout(10):
        while await rows(db):
            await asyncio.sleep(0.005)


async def tried(db, attempts):
    async with asyncio.timeout(10):
        while (await rows(db))[0]["attempts"] < attempts:
            await asyncio.sleep(0.005)


def test_an_end_is_told_signed_and_forgotten(tmp_path):
    async def main():
        clock = Hand()
        async with Receiver() as there, opened(tmp_path / "state.db", clock) as (db, hooks):
            row = await tell(db, hooks, there.url, clock)
            await gone(db)
            ((line, headers, body),) = there.got
            assert line == "POST /hook?token=in-the-url HTTP/1.1"
            assert headers["host"] == f"127.0.0.1:{there.port}"
            assert headers["content-type"] == "application/json"
            assert body.decode() == row.payload
            event = openai.OpenAI(api_key="none").webhooks.unwrap(body, headers, secret=SECRET)
            assert (event.type, event.data.id) == ("batch.completed", "batch_1")

    run(main())


def test_it_is_tried_again_later_under_the_same_id(tmp_path):
    async def main():
        clock = Hand()
        async with Receiver(BROKEN, BROKEN, NO_CONTENT) as there, opened(tmp_path / "s.db", clock) as (db, hooks):
            await tell(db, hooks, there.url, clock)
            await tried(db, 1)
            (row,) = await rows(db)
            assert (row["next_at"], row["last_error"]) == (clock() + 10, "it answered 500")
            clock.at += 9.9
            hooks.kick()
            await asyncio.sleep(0.05)
            assert len(there.got) == 1, "not before its time"
            clock.at += 0.1
            hooks.kick()
            await tried(db, 2)
            clock.at += 30
            hooks.kick()
            await gone(db)
            ids = {headers["webhook-id"] for _, headers, _ in there.got}
            stamps = [int(headers["webhook-timestamp"]) for _, headers, _ in there.got]
            assert (len(there.got), len(ids)) == (3, 1)
            assert stamps == sorted(set(stamps)), "each attempt is signed for its own time"

    run(main())


def test_it_wakes_by_itself_when_a_row_is_due(tmp_path):
    async def main():
        start = time.time()
        async with Receiver() as there, opened(tmp_path / "s.db", time.time) as (db, hooks):
            row = announcement("batch_1", "night", Webhook(there.url, SECRET), "expired", start + 0.3, bytes(7))
            await db.write(lambda conn: insert(conn, row))
            hooks.kick()
            await gone(db)
            assert time.time() >= start + 0.3

    run(main())


def test_it_gives_up_after_so_many_attempts_and_says_so(tmp_path, caplog):
    async def main(attempts):
        clock = Hand()
        there = Receiver(BROKEN)
        async with there, opened(tmp_path / f"{attempts}.db", clock, attempts=attempts) as (db, hooks):
            await tell(db, hooks, there.url, clock)
            for number in range(1, attempts):
                await tried(db, number)
                clock.at += 3600
                hooks.kick()
            await gone(db)
            return len(there.got)

    with caplog.at_level(logging.DEBUG):
        assert [run(main(attempts)) for attempts in (1, 3)] == [1, 3]
    assert "of batch batch_1 to 127.0.0.1 is given up after 3 attempts: it answered 500" in caplog.text
    assert "token=in-the-url" not in caplog.text
    assert SECRET.removeprefix("whsec_") not in caplog.text


def test_gone_is_gone_at_once(tmp_path):
    async def main():
        clock = Hand()
        gone_for_good = b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n"
        async with Receiver(gone_for_good) as there, opened(tmp_path / "s.db", clock) as (db, hooks):
            await tell(db, hooks, there.url, clock)
            await gone(db)
            assert len(there.got) == 1

    run(main())


def test_rows_survive_a_restart_and_a_broken_delivery(tmp_path):
    async def main():
        clock, asked = Hand(), asyncio.Event()

        async def never(_writer):
            asked.set()
            await asyncio.sleep(60)

        async with Receiver(never, NO_CONTENT) as there:
            async with opened(tmp_path / "s.db", clock) as (db, hooks):
                row = await tell(db, hooks, there.url, clock)
                await asyncio.wait_for(asked.wait(), 5)
            async with opened(tmp_path / "s.db", clock) as (db, hooks):
                await gone(db)
            assert [headers["webhook-id"] for _, headers, _ in there.got] == [row.id, row.id]

    run(main())


def test_a_clock_that_was_set_back_does_not_hold_a_row_for_long(tmp_path):
    async def main():
        clock = Hand()
        async with Receiver() as there, opened(tmp_path / "s.db", clock) as (db, hooks):
            clock.at += 86400 * 365
            row = announcement("batch_1", "night", Webhook(there.url, SECRET), "failed", clock(), bytes(7))
            clock.at -= 86400 * 365
            await db.write(lambda conn: insert(conn, row))
            hooks.kick()
            await gone(db)

    run(main())


def test_many_are_told_few_at_a_time(tmp_path):
    async def main():
        clock, now, most, told = Hand(), 0, 0, 0
        eight, answer = asyncio.Event(), asyncio.Event()

        async def post(_url, _body, _headers, *, allow_private):
            nonlocal now, most, told
            now, told = now + 1, told + 1
            most = max(most, now)
            if now == 8:
                eight.set()
            await answer.wait()
            await asyncio.sleep(0)
            now -= 1
            return 200

        async with opened(tmp_path / "s.db", clock, post=post) as (db, hooks):
            for number in range(50):
                await tell(db, hooks, "http://x/", clock, number)
            await asyncio.wait_for(eight.wait(), 30)
            answer.set()
            await gone(db)
            assert (most, told) == (8, 50)

    run(main())


class Moody:
    """A database that is full or held by somebody else for a while."""

    def __init__(self, db):
        self._db, self.failed = db, None
        self.trouble = {"read": [], "write": []}

    async def read(self, work):
        return await self._asked("read", work)

    async def write(self, work):
        return await self._asked("write", work)

    async def _asked(self, how, work):
        if self.trouble[how]:
            raise self.trouble[how].pop(0)
        return await getattr(self._db, how)(work)


def test_what_cannot_be_stored_is_not_told_again_at_once(tmp_path):
    async def main():
        clock = Hand()
        db = await asyncio.to_thread(Database.open, tmp_path / "s.db")
        moody = Moody(db)
        moody.trouble = {"read": [Unavailable("held")], "write": [StorageFull("full")]}
        hooks = Webhooks(moody, allow_private=True, attempts=3, clock=clock)
        task = asyncio.create_task(hooks.run())
        async with Receiver() as there:
            await eventually(lambda: not moody.trouble["read"])
            await tell(db, hooks, there.url, clock)
            await eventually(lambda: not moody.trouble["write"])
            for _ in range(3):
                hooks.kick()
                await asyncio.sleep(0.01)
            assert (len(there.got), len(await rows(db))) == (1, 1)
            clock.at += 61
            hooks.kick()
            await gone(db)
            assert len(there.got) == 2
        await hooks.close()
        await task
        await asyncio.to_thread(db.close)

    run(main())


def test_a_failed_disk_ends_it(tmp_path, caplog):
    async def main():
        db = await asyncio.to_thread(Database.open, tmp_path / "s.db")
        db._failed = StorageFailed("the disk")
        hooks = Webhooks(db, allow_private=True, attempts=3, clock=time.time)
        await asyncio.wait_for(hooks.run(), 5)
        db._failed = None
        await asyncio.to_thread(db.close)

    run(main())
    assert "none is delivered any more" in caplog.text


# -- one POST -------------------------------------------------------------------------------------------------------


async def post(url, *, allow_private=True, **options):
    return await posting.post(url, b"{}", {"x-a": "b"}, allow_private=allow_private, **options)


@pytest.mark.parametrize(
    "answer", [NO_CONTENT, b"HTTP/1.1 100 Continue\r\n\r\n" + NO_CONTENT, b"HTTP/1.0 204 x\r\n\r\n"]
)
def test_the_final_status_counts(answer):
    async def main():
        async with Receiver(answer) as there:
            return await post(there.url)

    assert run(main()) == 204


def test_redirects_are_not_followed(tmp_path):
    async def main():
        async with Receiver() as second:
            away = f"HTTP/1.1 307 Away\r\nLocation: {second.url}\r\nContent-Length: 0\r\n\r\n".encode()
            meta = b"HTTP/1.1 302 Away\r\nLocation: http://169.254.169.254/latest/\r\nContent-Length: 0\r\n\r\n"
            async with Receiver(away, meta) as first:
                assert [await post(first.url), await post(first.url)] == [307, 302]
                assert (len(first.got), second.got) == (2, [])

    run(main())


def test_proxies_of_the_environment_are_not_asked(monkeypatch):
    async def main():
        async with Receiver() as proxy, Receiver() as there:
            for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            await post(there.url)
            assert (len(there.got), proxy.got) == (1, [])

    run(main())


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "0x7f000001", "2130706433", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_this_machine_is_not_asked_under_any_name(host):
    async def main():
        async with Receiver() as there:
            with pytest.raises((NotAllowed, NotReached)):
                await post(f"http://{host}:{there.port}/", allow_private=False)
            assert there.got == []

    run(main())


class Names:
    """A resolver that says something else each time, and a network in which everything leads to one server."""

    def __init__(self, there, *answers):
        self.there, self.answers = there, list(answers)
        self.dialled = []

    async def resolve(self, _host, _port):
        return self.answers.pop(0)

    async def connect(self, dial):
        self.dialled.append(dial)
        return await asyncio.open_connection("127.0.0.1", self.there.port)

    async def post(self, url="http://hook.example/x", **options):
        return await post(url, allow_private=False, resolve=self.resolve, connect=self.connect, **options)


def test_a_name_is_resolved_once_and_the_checked_address_is_dialled():
    async def main():
        async with Receiver() as there:
            names = Names(there, ["93.184.216.34"], ["127.0.0.1"])
            assert await names.post("http://hook.example:81/x") == 204
            assert names.dialled == [Dial("93.184.216.34", 81, None)]
            assert there.got[0][1]["host"] == "hook.example:81"
            with pytest.raises(NotAllowed):
                await names.post()
            assert len(names.dialled) == 1

    run(main())


@pytest.mark.parametrize("bad", ["127.0.0.1", "169.254.169.254", "fe80::1%eth0", "::ffff:10.0.0.1", "no address"])
def test_one_private_address_among_public_ones_is_enough_to_refuse(bad):
    async def main():
        names = Names(None, ["93.184.216.34", bad])
        with pytest.raises(NotAllowed):
            await names.post()
        assert names.dialled == []

    run(main())


def test_the_certificate_must_bear_the_name_not_the_address():
    async def main():
        async with Receiver() as there:
            names = Names(there, ["93.184.216.34"])
            await names.post("https://hook.example/x")
            assert names.dialled == [Dial("93.184.216.34", 443, "hook.example")]

    run(main())


def test_a_second_address_is_tried_when_the_first_refuses():
    async def main():
        async with Receiver() as there:
            names = Names(there, ["93.184.216.34", "93.184.216.35"])
            first = functools.partial(names.connect)

            async def connect(dial):
                if dial.address.endswith("34"):
                    raise ConnectionRefusedError
                return await first(dial)

            status = await post("http://x/", allow_private=False, resolve=names.resolve, connect=connect)
            assert (status, [dial.address for dial in names.dialled]) == (204, ["93.184.216.35"])

    run(main())


async def _silent(_writer):
    await asyncio.sleep(60)


async def _trickle(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nx: ")
    while True:
        writer.write(b"y")
        await writer.drain()
        await asyncio.sleep(0.01)


async def _endless(writer, status=b"200"):
    writer.write(b"HTTP/1.1 " + status + b" OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"2000\r\n" + b"z" * 8192 + b"\r\n")
        await writer.drain()


async def _many_headers(writer):
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x: " + b"y" * 8000 + b"\r\n")
        await writer.drain()


@pytest.mark.parametrize("behaviour", [_silent, _trickle])
def test_the_time_for_an_answer_is_limited(behaviour):
    async def main():
        async with Receiver(behaviour) as there:
            with pytest.raises(NotReached, match=r"no answer within 0\.2 s"):
                await post(there.url, timeout_s=0.2)

    run(main())


@pytest.mark.parametrize("status", [b"200", b"500"])
def test_an_endless_answer_is_not_read_to_its_end(status):
    async def main():
        async with Receiver(functools.partial(_endless, status=status)) as there:
            return await post(there.url)

    assert run(main()) == int(status)


@pytest.mark.parametrize(
    "answer",
    [b"", b"SMTP ready\r\n", b"HTTP/1.1 20", b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nz",
     b"HTTP/1.1 100 Continue\r\n\r\n", _many_headers],
)  # fmt: skip
def test_what_is_no_answer(answer):
    async def main():
        async with Receiver(answer) as there:
            with pytest.raises(NotReached):
                await post(there.url)

    run(main())


async def _mail(_reader, writer):
    writer.write(b"220 no TLS here\r\n")
    await writer.drain()
    writer.close()


def test_nobody_there_and_no_such_name():
    async def main():
        async with Receiver() as there:
            pass
        with pytest.raises(NotReached, match="no connection"):
            await post(there.url)
        with pytest.raises(NotReached, match="cannot be resolved"):
            await post("http://no-such-host.invalid/")
        with pytest.raises(NotReached):
            await post("http://x/", resolve=Names(None, []).resolve)
        mail = await asyncio.start_server(_mail, "127.0.0.1", 0)
        async with mail:
            with pytest.raises(NotReached, match="TLS"):
                await post(f"https://127.0.0.1:{mail.sockets[0].getsockname()[1]}/")

    run(main())


def test_kicks_are_not_lost_while_it_looks(tmp_path):
    async def main():
        clock = Hand()
        async with Receiver() as there, opened(tmp_path / "s.db", clock) as (db, hooks):
            await asyncio.gather(*(tell(db, hooks, there.url, clock, number) for number in range(1, 20)))
            await eventually(lambda: len(there.got) == 19)
            await gone(db)
            assert len({json.loads(body)["id"] for _, _, body in there.got}) == 19

    run(main())
