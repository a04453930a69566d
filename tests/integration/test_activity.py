"""The history of finished requests in a real file: what is kept, in which order, how far back; and bad disks."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.aio import run
from tests.support.faulty_disk import FULL, IO_ERROR_WRITE, faulty_disk
from tests.support.traffic import record
from vllm_bootstrap import activity
from vllm_bootstrap.activity import Activity, ActivityFilter
from vllm_bootstrap.errors import NotFound

ALL = ActivityFilter()
ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "activity_v1.sql"


def opened(path: Path, rows: int = 1000) -> Activity:
    return Activity.open(path / "activity.db", rows=rows)


async def ids(history: Activity, wanted: ActivityFilter = ALL) -> list[str]:
    rows, _ = await history.page(wanted, limit=1000)
    return [row.request_id for row in rows]


def test_a_finished_request_is_kept_as_it_was(tmp_path: Path) -> None:
    async def story() -> None:
        history = opened(tmp_path)
        history.record(record())
        history.record(record(2, stream=None, code="queue_full", status=429, launch_id=None, first_byte_s=None))
        rows, has_more = await history.page(ALL)
        assert [row.request_id for row in rows] == ["req_2", "req_1"]
        assert not has_more
        first = rows[1]._asdict()
        assert first == {
            "id": 1, "request_id": "req_1", "started_at": 1001.0, "cls": "realtime", "owner": "alice",
            "model": "model", "launch_id": "l1", "method": "POST", "path": "/v1/chat/completions", "status": 200,
            "code": None, "stream": True, "queue_ms": 20, "ttft_ms": 120.0, "duration_ms": 1250.0,
            "prompt_tokens": 7, "completion_tokens": 11, "bytes_in": 100, "bytes_out": 2000,
        }  # fmt: skip
        assert (rows[0].code, rows[0].ttft_ms, rows[0].stream) == ("queue_full", None, False)
        await history.close()

    run(story())


def test_an_answer_that_comes_whole_has_no_time_to_first_token(tmp_path: Path) -> None:
    async def story() -> None:
        history = opened(tmp_path)
        history.record(record(stream=False))
        rows, _ = await history.page(ALL)
        assert rows[0].ttft_ms is None
        await history.close()

    run(story())


def test_pages_go_back_in_time_and_filters_hold(tmp_path: Path) -> None:
    async def story() -> None:
        history = opened(tmp_path)
        for number in range(1, 8):
            cls = "batch" if number % 2 else "realtime"
            owner = "bob" if number > 5 else "alice"
            history.record(record(number, cls=cls, owner=owner, status=200 if number < 7 else 503, model=f"m{number}"))
        newest, more = await history.page(ALL, limit=3)
        assert ([row.id for row in newest], more) == ([7, 6, 5], True)
        older, more = await history.page(ALL, after=newest[-1].id, limit=4)
        assert ([row.id for row in older], more) == ([4, 3, 2, 1], False)
        assert await ids(history, ActivityFilter(cls="batch", owner="alice")) == ["req_5", "req_3", "req_1"]
        assert await ids(history, ActivityFilter(statuses=(500, 599))) == ["req_7"]
        assert await ids(history, ActivityFilter(model="m2")) == ["req_2"]
        assert await ids(history, ActivityFilter(since=1006.0)) == ["req_7", "req_6"]
        await history.close()

    run(story())


def test_who_was_turned_away_at_the_door_cannot_fill_it(tmp_path: Path) -> None:
    async def story() -> None:
        history = opened(tmp_path)
        history.record(record(owner=None, status=401))
        assert await ids(history) == []
        await history.close()

    run(story())


def test_who_only_looks_at_an_engine_cannot_fill_it(tmp_path: Path) -> None:
    """A scraper of ``/proxy/{id}/metrics`` asks all day long, also while the launch is gone."""

    async def story() -> None:
        history = opened(tmp_path)
        history.record(record(1, cls=None, method="GET", path="/proxy/l1/metrics", stream=None))
        history.record(record(2, cls=None, method="GET", path="/proxy/l1/metrics", status=409, code="launch_not_ready"))
        history.record(record(3, cls=None, path="/proxy/l1/tokenize", stream=None))
        history.record(record(4, cls=None, status=400, code="invalid_json", stream=None))
        history.record(record(5))
        assert await ids(history) == ["req_5", "req_4"]
        await history.close()

    run(story())


def test_sums_by_key_class_and_model(tmp_path: Path) -> None:
    async def story() -> None:
        history = opened(tmp_path)
        assert await history.usage() == ([], None)
        history.record(record(1))
        history.record(record(2, status=502, prompt_tokens=None, completion_tokens=None))
        history.record(record(3, owner="bob", cls="batch", code="upstream_error"))  # its stream broke off
        rows, oldest = await history.usage()
        assert [tuple(row) for row in rows] == [
            ("alice", "realtime", "model", 2, 1, 7, 11, 1001.0, 1002.0),
            ("bob", "batch", "model", 1, 1, 7, 11, 1003.0, 1003.0),
        ]  # fmt: skip
        assert oldest == 1001.0
        rows, oldest = await history.usage(since=1003.0)
        assert ([row.owner for row in rows], oldest) == (["bob"], 1001.0)
        await history.close()

    run(story())


def test_it_survives_a_restart_and_keeps_to_its_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        history = opened(tmp_path, rows=50)
        for number in range(1, 201):
            history.record(record(number))
        await history.close()
        history = opened(tmp_path, rows=50)
        assert await ids(history) == [f"req_{number}" for number in range(200, 150, -1)]
        await history.close()

    run(story())

    async def smaller() -> None:
        """A lower cap is reached step by step, without more traffic than one request."""
        monkeypatch.setattr(activity, "PRUNE_STEP", 10)
        monkeypatch.setattr(activity, "FLUSH_S", 0.01)
        history = opened(tmp_path, rows=5)
        history.record(record(201))
        kept = 51
        while kept > 5:
            kept = len(await ids(history))
        assert (await ids(history))[0] == "req_201"
        await history.close()

    run(smaller())


def test_writing_happens_by_itself_about_once_a_second(tmp_path: Path) -> None:
    async def story() -> None:
        history = opened(tmp_path)
        history.record(record())
        conn = sqlite3.connect(tmp_path / "activity.db")
        while conn.execute("SELECT count(*) FROM requests").fetchone()[0] == 0:
            await asyncio.sleep(0.02)
        conn.close()
        await history.close()

    run(asyncio.wait_for(story(), 20))


def test_many_at_once_are_written_in_order_and_none_is_lost(tmp_path: Path) -> None:
    async def story() -> None:
        history = opened(tmp_path, rows=10_000)
        for number in range(5_000):
            history.record(record(number))
            if number % 1_000 == 0:
                await asyncio.sleep(0)
        rows, _ = await history.page(ALL, limit=10_000)
        assert [row.request_id for row in rows] == [f"req_{number}" for number in reversed(range(5_000))]
        assert history.dropped == 0
        await history.close()

    run(story())


def test_a_writer_that_stands_still_costs_rows_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activity, "FLUSH_ROWS", 10)
    monkeypatch.setattr(activity, "BUFFER_ROWS", 30)

    async def story() -> None:
        history = opened(tmp_path)
        other = sqlite3.connect(tmp_path / "activity.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")  # another program holds the file
        for number in range(100):
            history.record(record(number))
        assert history.dropped == 100 - 10 - 30
        other.execute("ROLLBACK")
        other.close()
        assert len(await ids(history)) == 40
        history.record(record(100))
        assert (await ids(history))[0] == "req_100"
        await history.close()

    run(story())


def test_a_full_disk_drops_and_counts_until_there_is_room(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()

    async def story() -> None:
        with faulty_disk(folder) as disk:
            history = opened(folder)
            disk.write_error = FULL
            for number in range(3):
                history.record(record(number))
            await history.settle()
            assert history.dropped == 3
            disk.write_error = None
            history.record(record(9))
            assert await ids(history) == ["req_9"]
            assert history.dropped == 3
            await history.close()

    run(story())


def test_a_failing_disk_ends_the_history_but_raises_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()

    async def story() -> None:
        with faulty_disk(folder) as disk:
            history = opened(folder)
            disk.write_error = IO_ERROR_WRITE
            history.record(record(1))
            await history.settle()
            disk.write_error = None
            history.record(record(2))
            await history.settle()
            assert history.dropped == 2
            await history.close()

    run(story())


@pytest.mark.parametrize("content", [b"not a database at all" * 400, b"SQLite format 3\0" + b"\xff" * 8192])
def test_a_file_that_cannot_be_used_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "activity.db").write_bytes(content)

    async def story() -> None:
        history = opened(tmp_path)
        history.record(record())
        with pytest.raises(NotFound, match="No history is kept at the moment"):
            await history.page(ALL)
        await history.close()

    run(story())
    assert (tmp_path / "activity.db").read_bytes() == content


def test_a_cap_of_nothing_makes_no_file(tmp_path: Path) -> None:
    async def story() -> None:
        history = opened(tmp_path, rows=0)
        history.record(record())
        with pytest.raises(NotFound, match="ACTIVITY_ROWS is 0"):
            await history.usage()
        await history.close()

    run(story())
    assert list(tmp_path.iterdir()) == []


def test_after_closing_nothing_is_taken_and_nothing_breaks(tmp_path: Path) -> None:
    async def story() -> None:
        history = opened(tmp_path)
        history.record(record(1))
        await history.close()
        await history.close()
        history.record(record(2))
        with pytest.raises(NotFound, match="shutting down"):
            await history.page(ALL)

    run(story())
    conn = sqlite3.connect(tmp_path / "activity.db")
    assert conn.execute("SELECT request_id FROM requests").fetchall() == [("req_1",)]
    conn.close()


KILLED = """
import asyncio, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.integration.test_activity import opened
from tests.support.traffic import record
async def main():
    history = opened(Path(sys.argv[1]))
    for number in range(300):
        history.record(record(number))
    await history.settle()
    history.record(record(1000))
    print("written", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_a_killed_daemon_loses_only_what_was_not_written_yet(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(root=str(ROOT)), str(tmp_path)], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"written\n"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()

    async def story() -> None:
        history = opened(tmp_path)
        kept = await ids(history)
        assert kept[-300:] == [f"req_{number}" for number in reversed(range(300))]
        assert kept[:-300] in ([], ["req_1000"])
        await history.close()

    run(story())


def test_a_stored_history_of_the_first_version_opens_and_means_the_same(tmp_path: Path) -> None:
    conn = sqlite3.connect(tmp_path / "activity.db")
    conn.executescript(FIXTURE.read_text())
    conn.close()

    async def story() -> None:
        history = opened(tmp_path)
        rows, _ = await history.page(ALL)
        assert [(row.request_id, row.owner, row.status, row.ttft_ms, row.completion_tokens) for row in rows] == [
            ("req_2", "bob", 429, None, None), ("req_1", "alice", 200, 120.0, 11),
        ]  # fmt: skip
        history.record(record(3))
        assert (await ids(history))[0] == "req_3"
        await history.close()

    run(story())


def test_every_version_of_the_file_has_a_stored_example() -> None:
    stored = sorted(FIXTURE.parent.glob("activity_v*.sql"))
    assert len(stored) == len(list(activity.ACTIVITY_MIGRATIONS.glob("*.sql")))
