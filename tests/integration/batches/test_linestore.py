"""Lines and records of a batch on a real file: each line one record, whatever happens in between."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.aio import run
from tests.support.batches import line, line_store, lines
from tests.support.faulty_disk import FULL, IO_ERROR_FSYNC, FaultyDisk, faulty_disk
from vllm_bootstrap.batches import linestore
from vllm_bootstrap.batches.linestore import LineStore
from vllm_bootstrap.batches.types import Counts, Line, Record, TokenUsage
from vllm_bootstrap.db import CannotOpen, NewerSchema
from vllm_bootstrap.errors import StorageFailed, StorageFull

PLENTY = 10**9


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LineStore]:
    """Ten lines: 1 to 6 of model m, 7 to 10 of model n."""
    made = line_store(tmp_path, [line(f"id-{n}", model="m" if n <= 6 else "n", n=n) for n in range(1, 11)])
    yield made
    made.close()


def record(number: int, ok: bool = True, attempts: int = 1, data: bytes | None = None, **usage: int) -> Record:
    return Record(number, ok, attempts, data or b"record %d" % number, TokenUsage(**usage))


def waiting(store: LineStore, model_no: int = 1, after: int = 0, most: int = 100, max_bytes: int = PLENTY) -> list[int]:
    found, _ = run(store.next(model_no, after, most, max_bytes))
    return [item.number for item in found]


def kept(store: LineStore, *, ok: bool, after: int = 0) -> list[tuple[int, bytes]]:
    async def read() -> list[tuple[int, bytes]]:
        return [item async for chunk in store.records(ok, after) for item in chunk]

    return run(read())


def reopened(store: LineStore, tmp_path: Path) -> LineStore:
    store.close()
    return LineStore.open(tmp_path / "batch_b1.db", tmp_path / "batch_b1.jsonl")


def test_models_and_totals(store: LineStore) -> None:
    assert run(store.models()) == [(1, "m", 6), (2, "n", 4)]
    assert run(store.totals()) == (Counts(10), TokenUsage(), 0)


def test_lines_come_in_order_with_their_bodies(store: LineStore) -> None:
    found, on = run(store.next(2, 0, 2, PLENTY))
    assert [item._replace(body=b"") for item in found] == [Line(7, 2, 1, "id-7", b""), Line(8, 2, 2, "id-8", b"")]
    assert [json.loads(item.body)["n"] for item in found] == [7, 8]
    assert on == 2
    found, on = run(store.next(2, 2, 2, PLENTY))
    assert [item.number for item in found] == [9, 10]
    assert on is None
    assert run(store.next(2, 4, 2, PLENTY)) == ([], None)
    assert run(store.next(99, 0, 2, PLENTY)) == ([], None)


def test_bodies_taken_at_once_are_bounded_but_one_always_comes(store: LineStore) -> None:
    size = len(run(store.next(1, 0, 1, PLENTY))[0][0].body)
    assert waiting(store, max_bytes=size * 2 + 1) == [1, 2]
    assert run(store.next(1, 0, 100, 1))[1] == 1
    assert waiting(store, max_bytes=1) == [1]


def test_a_finished_line_is_not_given_out_again(store: LineStore, tmp_path: Path) -> None:
    totals = run(store.finish([record(1, prompt=3, completion=5), record(2, ok=False, attempts=4)], 9.0))
    assert totals == (Counts(10, 1, 1), TokenUsage(3, 0, 5), 1)
    assert waiting(store) == [3, 4, 5, 6]
    again = reopened(store, tmp_path)
    assert waiting(again) == [3, 4, 5, 6]
    assert run(again.totals()) == totals
    assert kept(again, ok=True) == [(1, b"record 1")]
    assert kept(again, ok=False) == [(2, b"record 2")]
    again.close()


def test_the_first_record_of_a_line_stays(store: LineStore) -> None:
    run(store.finish([record(1, prompt=3)], 1.0))
    totals = run(store.finish([record(1, ok=False, attempts=9, data=b"late", prompt=9), record(3), record(3)], 2.0))
    assert totals == (Counts(10, 2, 0), TokenUsage(3), 0)
    assert kept(store, ok=True) == [(1, b"record 1"), (3, b"record 3")]


def test_groups_are_written_whole_or_not_at_all(store: LineStore) -> None:
    broken = record(2)._replace(data=None)  # type: ignore[arg-type]
    with pytest.raises(sqlite3.IntegrityError):
        run(store.finish([record(1), broken], 1.0))
    assert run(store.totals()).counts == Counts(10)
    assert waiting(store) == [1, 2, 3, 4, 5, 6]


def test_troubles_are_remembered_until_the_line_is_finished(store: LineStore, tmp_path: Path) -> None:
    run(store.note([(1, 2, 1), (3, 1, 0)]))
    run(store.note([(1, 3, 2)]))
    store = reopened(store, tmp_path)
    found, _ = run(store.next(1, 0, 3, PLENTY))
    assert [(item.number, item.attempts, item.deaths) for item in found] == [(1, 3, 2), (2, 0, 0), (3, 1, 0)]
    run(store.finish([record(1, ok=False, attempts=4)], 1.0))
    run(store.forget_failed())
    found, _ = run(store.next(1, 0, 1, PLENTY))
    assert (found[0].number, found[0].attempts) == (1, 0)
    store.close()


def test_all_that_is_left_can_be_failed(store: LineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linestore, "STEP_LINES", 3)
    run(store.finish([record(2), record(9, ok=False)], 1.0))
    run(store.note([(1, 3, 0)]))
    totals = run(store.fail_rest("batch_expired", "Too late.", 5.0))
    assert totals == (Counts(10, 1, 9), TokenUsage(), 1)
    failed = dict(kept(store, ok=False))
    assert sorted(failed) == [1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert failed[9] == b"record 9"
    assert json.loads(failed[10]) == {
        "id": "batch_req_b1_10", "custom_id": "id-10", "response": None,
        "error": {"code": "batch_expired", "message": "Too late."},
    }  # fmt: skip
    assert run(store.fail_rest("batch_cancelled", "Again.", 6.0)) == totals


def test_failed_lines_can_be_run_again(store: LineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linestore, "STEP_LINES", 2)
    run(store.finish([record(n, ok=n % 2 == 0, attempts=n, prompt=1) for n in range(1, 7)], 1.0))
    assert waiting(store) == []
    assert run(store.forget_failed()) == 3
    assert run(store.totals()) == (Counts(10, 3, 0), TokenUsage(6), 3)
    assert waiting(store) == [1, 3, 5]
    assert run(store.forget_failed()) == 0


def test_lines_that_were_forgotten_are_found_behind_the_place_reached(store: LineStore) -> None:
    run(store.finish([record(n, ok=False) for n in (1, 2, 3)], 1.0))
    assert waiting(store) == [4, 5, 6]  # from here on it knows that the first three are finished
    run(store.forget_failed())
    assert waiting(store) == [1, 2, 3, 4, 5, 6]


def test_the_place_reached_saves_the_way_there(store: LineStore) -> None:
    run(store.finish([record(n) for n in (1, 2, 4)], 1.0))
    assert waiting(store) == [3, 5, 6]
    assert store._finished_to == {1: 2}
    assert waiting(store, after=3) == [5, 6]
    assert store._finished_to == {1: 2}  # whether 3 is finished was not looked at
    run(store.finish([record(3), record(5)], 1.0))
    assert waiting(store, after=1) == [6]
    assert store._finished_to == {1: 5}


def test_records_come_by_line_in_bounded_chunks(store: LineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linestore, "CHUNK_RECORDS", 3)
    monkeypatch.setattr(linestore, "CHUNK_BYTES", 1000)
    run(store.finish([record(n, data=b"x" * (600 if n > 5 else 1)) for n in (9, 1, 8, 2, 3, 4, 6, 7)], 1.0))

    async def sizes() -> list[list[int]]:
        return [[number for number, _ in chunk] async for chunk in store.records(True)]

    assert run(sizes()) == [[1, 2, 3], [4, 6, 7], [8, 9]]
    assert [number for number, _ in kept(store, ok=True, after=6)] == [7, 8, 9]


def test_records_are_read_while_others_are_written(store: LineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linestore, "CHUNK_RECORDS", 1)

    async def main() -> list[int]:
        await store.finish([record(2), record(4)], 1.0)
        found = []
        async for chunk in store.records(True):
            found += [number for number, _ in chunk]
            if found == [2]:
                await store.finish([record(1), record(3)], 1.0)
        return found

    assert run(main()) == [2, 3, 4]
    assert [number for number, _ in kept(store, ok=True)] == [1, 2, 3, 4]


def test_many_writers_share_commits(tmp_path: Path) -> None:
    store = line_store(tmp_path, lines(300))

    async def main() -> list[int]:
        totals = await asyncio.gather(*(store.finish([record(n)], 1.0) for n in range(1, 301)))
        return sorted(each.counts.completed for each in totals)

    assert run(main()) == list(range(1, 301))
    store.close()


def test_a_missing_or_foreign_database_is_refused(tmp_path: Path, store: LineStore) -> None:
    with pytest.raises(CannotOpen, match="missing"):
        LineStore.open(tmp_path / "other.db", tmp_path / "batch_b1.jsonl")
    assert not (tmp_path / "other.db").exists()
    with pytest.raises(CannotOpen, match="input"):
        LineStore.open(tmp_path / "batch_b1.db", tmp_path / "other.jsonl")
    (tmp_path / "noise.db").write_bytes(b"noise" * 1000)
    with pytest.raises(CannotOpen):
        LineStore.open(tmp_path / "noise.db", tmp_path / "batch_b1.jsonl")


def test_a_database_of_a_newer_program_is_refused_and_left_alone(tmp_path: Path, store: LineStore) -> None:
    store.close()
    path = tmp_path / "batch_b1.db"
    with sqlite3.connect(path) as conn:
        conn.execute("PRAGMA user_version=99")
    conn.close()
    before = path.read_bytes()
    with pytest.raises(NewerSchema, match="99"):
        LineStore.open(path, tmp_path / "batch_b1.jsonl")
    assert path.read_bytes() == before


def test_an_input_that_was_cut_off_is_no_empty_body(store: LineStore, tmp_path: Path) -> None:
    os.truncate(tmp_path / "batch_b1.jsonl", 30)
    with pytest.raises(StorageFailed, match="Line 1 of the input"):
        run(store.next(1, 0, 1, PLENTY))


def test_an_input_that_cannot_be_read(store: LineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(StorageFailed, match="Input/output error"):
        run(store.next(1, 0, 1, PLENTY))


def test_closing_twice_does_no_harm(store: LineStore) -> None:
    store.close()
    store.close()
    with pytest.raises(RuntimeError):
        run(store.finish([record(1)], 1.0))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    folder = tmp_path / "state"
    folder.mkdir()
    with faulty_disk(folder) as layer:
        yield layer


def test_a_full_disk_refuses_and_recovers(disk: FaultyDisk) -> None:
    store = line_store(disk.folder, lines(5))
    run(store.finish([record(1)], 1.0))
    disk.write_error = FULL
    with pytest.raises(StorageFull):
        run(store.finish([record(2)], 1.0))
    assert store.failed is None
    disk.write_error = None
    assert run(store.finish([record(3)], 1.0)).counts == Counts(5, 2, 0)
    assert waiting(store) == [2, 4, 5]
    store.close()


def test_a_failed_sync_ends_the_writing(disk: FaultyDisk) -> None:
    store = line_store(disk.folder, lines(5))
    run(store.finish([record(1)], 1.0))
    disk.sync_error = IO_ERROR_FSYNC
    with pytest.raises(StorageFailed):
        run(store.finish([record(2)], 1.0))
    disk.sync_error = None
    assert store.failed is not None
    with pytest.raises(StorageFailed):
        run(store.finish([record(3)], 1.0))
    store.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from vllm_bootstrap.batches.linestore import LineStore
from vllm_bootstrap.batches.types import Record
async def main():
    store = LineStore.open(Path(sys.argv[1]), Path(sys.argv[2]))
    for number in range(1, 20_000):
        await store.finish([Record(number, number % 3 > 0, 1, b"x" * 500)], 1.0)
        print(number, flush=True)
asyncio.run(main())
"""


def test_what_was_finished_outlives_a_kill(tmp_path: Path) -> None:
    line_store(tmp_path, lines(20_000), max_lines=20_000).close()
    paths = [tmp_path / "batch_b1.db", tmp_path / "batch_b1.jsonl"]
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, *map(str, paths)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        told = [int(writer.stdout.readline()) for _ in range(400)]
        writer.send_signal(signal.SIGKILL)
        told += [int(rest) for rest in writer.stdout.read().splitlines()]
    store = LineStore.open(*paths)
    counts = run(store.totals()).counts
    finished = {number for ok in (True, False) for number, _ in kept(store, ok=ok)}
    assert set(told) <= finished
    assert len(finished) == counts.completed + counts.failed <= len(told) + 1
    assert counts.failed == sum(number % 3 == 0 for number in finished)
    assert waiting(store, most=1) == [max(finished) + 1]
    store.close()
