"""The helper that judges a batch's input: in this process, as a process of its own, and killed at any point."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vllm_bootstrap
from tests.support import small_disk
from tests.support.aio import eventually, run
from tests.support.batches import CHAT, indexed, line, lines, task
from tests.support.orphans import is_dead
from vllm_bootstrap.batches import indexing
from vllm_bootstrap.batches.indexer import PROGRAM, IndexingFailed, Outcome, Task, index
from vllm_bootstrap.batches.linestore import LineStore
from vllm_bootstrap.errors import StorageFull

MB = 1024**2
ROOT = Path(vllm_bootstrap.__file__).parent.parent


def rows(wanted: Task) -> list[tuple[Any, ...]]:
    """What stands in the database, each body as it was written: model, pos, line, body, custom id."""
    conn = sqlite3.connect(f"file:{wanted.database}?mode=ro", uri=True)
    data = Path(wanted.input).read_bytes()
    try:
        assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        found = conn.execute(
            "SELECT m.name, l.pos, l.line, l.start, l.length, l.custom_id FROM lines l JOIN models m USING (model_no)"
            " ORDER BY model_no, pos"
        ).fetchall()
    finally:
        conn.close()
    return [(model, pos, at, json.loads(data[start : start + length]), custom_id)
            for model, pos, at, start, length, custom_id in found]  # fmt: skip


def numbers(wanted: Task) -> list[int]:
    return [row[2] for row in rows(wanted)]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def codes(outcome: Outcome) -> list[tuple[str, int | None]]:
    return [(error.code, error.line) for error in outcome.errors]


def test_good_lines_are_found_again_by_model_and_place(tmp_path: Path) -> None:
    wanted = task(tmp_path, [line("a", prompt="ä"), line("b", model="n"), line("ü", prompt="z")])
    outcome = indexed(wanted)
    assert (outcome.lines, dict(outcome.models), outcome.errors) == (3, {"m": 2, "n": 1}, [])
    assert rows(wanted) == [
        ("m", 1, 1, {"model": "m", "prompt": "ä"}, "a"),
        ("m", 2, 3, {"model": "m", "prompt": "z"}, "ü"),
        ("n", 1, 2, {"model": "n", "prompt": "hello"}, "b"),
    ]
    assert files(tmp_path) == ["batch_b1.db", "batch_b1.jsonl"]
    assert Path(wanted.database).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + b"\n".join(lines(3)) + b"\n",
        b"\r\n".join(lines(3)) + b"\r\n",
        b"\n".join(lines(3)),
    ],
    ids=["byte order mark", "CRLF", "no end"],
)
def test_files_of_all_editors_are_taken(tmp_path: Path, content: bytes) -> None:
    wanted = task(tmp_path, content)
    assert indexed(wanted).errors == []
    assert [row[4] for row in rows(wanted)] == ["id-1", "id-2", "id-3"]


def test_blank_lines_count_and_ask_for_nothing(tmp_path: Path) -> None:
    wanted = task(tmp_path, b"\n\n" + line("a") + b"\n \t\r\n" + line("b") + b"\n\n")
    assert indexed(wanted).lines == 2
    assert numbers(wanted) == [3, 5]


@pytest.mark.parametrize("content", [b"", b"\n\n \r\n", b"\xef\xbb\xbf"])
def test_an_input_without_lines_is_refused(tmp_path: Path, content: bytes) -> None:
    assert codes(indexed(task(tmp_path, content))) == [("empty_file", None)]


def test_every_fault_is_told_with_its_line(tmp_path: Path) -> None:
    content = [line("a"), b"{", b'{"a": "\xff"}', line("\0b"), b"\0", line("c", url=CHAT), b"",
               line("d", model=None), line("a"), line("e" * 600), line("f", stream=True), line("g")]  # fmt: skip
    outcome = indexed(task(tmp_path, content))
    assert codes(outcome) == [
        ("invalid_json_line", 2), ("invalid_encoding", 3), ("invalid_json_line", 5), ("mismatched_endpoint", 6),
        ("missing_model", 8), ("duplicate_custom_id", 9), ("invalid_custom_id", 10), ("unsupported_parameter", 11),
    ]  # fmt: skip
    assert "line 1" in outcome.errors[5].message
    assert outcome.error_count == 8
    assert files(tmp_path) == ["batch_b1.jsonl"]


def test_only_the_first_faults_are_kept_but_all_are_counted(tmp_path: Path) -> None:
    outcome = indexed(task(tmp_path, [b"{"] * 50, max_errors=3))
    assert codes(outcome) == [("invalid_json_line", number) for number in (1, 2, 3)]
    assert outcome.error_count == 50


@pytest.mark.parametrize("apart", [1, 2500])
def test_an_id_used_twice_is_found_near_and_far(tmp_path: Path, apart: int) -> None:
    content = lines(3000)
    content[100 + apart] = line("id-101")
    outcome = indexed(task(tmp_path, content, max_lines=3000))
    assert codes(outcome) == [("duplicate_custom_id", 101 + apart)]
    assert "line 101 " in outcome.errors[0].message


def test_a_line_that_is_too_long_is_told_of(tmp_path: Path) -> None:
    longest = len(line("b"))
    outcome = indexed(task(tmp_path, [line("b"), line("cc"), line("d")], max_line_bytes=longest))
    assert codes(outcome) == [("line_too_long", 2)]
    assert f"{longest} bytes" in outcome.errors[0].message


def test_more_lines_than_allowed_end_the_reading(tmp_path: Path) -> None:
    assert indexed(task(tmp_path, lines(5), max_lines=5)).errors == []
    outcome = indexed(task(tmp_path, [*lines(6), b"{"], max_lines=5))
    assert codes(outcome) == [("too_many_lines", None)]


def test_more_models_than_there_can_be_queues(tmp_path: Path) -> None:
    content = [line(f"{number}", model=f"m{number}") for number in range(indexing.MAX_MODELS + 1)]
    outcome = indexed(task(tmp_path, [*content, line("again", model="m0")]))
    assert codes(outcome) == [("too_many_models", indexing.MAX_MODELS + 1)]


def test_rules_of_key_and_launch_hold(tmp_path: Path) -> None:
    assert codes(indexed(task(tmp_path, [line(model="x")], models=["m*"]))) == [("model_not_allowed", 1)]
    wanted = task(tmp_path, [line("a", model=None), line("b")], model_optional=True)
    assert dict(indexed(wanted).models) == {"": 1, "m": 1}


def test_lines_that_begin_alike_are_worked_off_together_if_wished(tmp_path: Path) -> None:
    content = [line(f"{number}", prompt=f"{number % 3}" * 600 + f"{number}") for number in range(1, 7)]
    assert indexed(task(tmp_path, content)).errors == []
    assert numbers(task(tmp_path, content)) == [1, 4, 2, 5, 3, 6]
    indexed(task(tmp_path, content, prefixes=False))
    assert numbers(task(tmp_path, content)) == [1, 2, 3, 4, 5, 6]


def test_the_database_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = task(tmp_path, lines(3))
    seen: list[tuple[str, bool]] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        seen.append((Path(f"/proc/self/fd/{fd}").readlink().name, Path(wanted.database).exists()))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    indexed(wanted)
    assert seen == [("batch_b1.db.part", False), (tmp_path.name, True)]


def test_what_an_earlier_run_left_is_replaced_with_its_log(tmp_path: Path) -> None:
    wanted = task(tmp_path, lines(3))
    for ending in ("", "-wal", "-shm", ".part", ".part.stage"):
        Path(wanted.database + ending).write_bytes(b"old")
    assert indexed(wanted).errors == []
    assert numbers(wanted) == [1, 2, 3]
    assert files(tmp_path) == ["batch_b1.db", "batch_b1.jsonl"]


# As a process of its own


def by_helper(wanted: Task) -> Outcome:
    return run(index(wanted))


def test_the_helper_comes_to_the_same(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    wanted = task(tmp_path, lines(2000), max_lines=2000)
    outcome = run(index(wanted, lambda done, count: told.append((done, count))))
    expected = rows(wanted)
    assert outcome == indexed(wanted)
    assert rows(wanted) == expected
    assert told[0][0] == Path(wanted.input).stat().st_size
    bad = task(tmp_path, [line("a"), line("a"), b"\xff"])
    assert by_helper(bad) == indexed(bad)


def test_the_helper_writes_what_a_line_store_opens(tmp_path: Path) -> None:
    wanted = task(tmp_path, lines(3))
    by_helper(wanted)
    store = LineStore.open(Path(wanted.database), Path(wanted.input))
    assert run(store.totals()).counts == (3, 0, 0)
    store.close()


def test_a_line_of_50_mb_is_told_of_and_not_held(tmp_path: Path) -> None:
    path = tmp_path / "batch_b1.jsonl"
    with path.open("wb") as file:
        file.write(line("a") + b"\n")
        for _ in range(50):
            file.write(b"x" * MB)
        file.write(b"\n" + line("b") + b"\n{")
    wanted = Task(str(path), str(tmp_path / "batch_b1.db"), "/v1/completions", max_lines=10, max_line_bytes=MB)
    # Started by a small process, whose largest child is this helper.
    program = "import resource, subprocess, sys\nsubprocess.run(sys.argv[1:], stdin=sys.stdin)\n"
    program += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    order = json.dumps(dataclasses.asdict(wanted))
    done = subprocess.run(
        [sys.executable, "-c", program, *PROGRAM], input=order, capture_output=True, text=True, check=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    *_, said, peak = done.stdout.splitlines()
    assert [(error["code"], error["line"]) for error in json.loads(said)["errors"]] == [
        ("line_too_long", 2), ("invalid_json_line", 4),
    ]  # fmt: skip
    assert int(peak) / 1024 < 45


class Held:
    """An input that never ends: the helper stands in the middle of it. ``pid``: the helper's, once it was started."""

    def __init__(self, folder: Path) -> None:
        self.task = Task(str(folder / "batch_b1.jsonl"), str(folder / "batch_b1.db"), "/v1/completions", 10**6, 10_000)
        self.told: list[tuple[int, int]] = []
        os.mkfifo(self.task.input)
        self._fd = os.open(self.task.input, os.O_RDWR)
        os.write(self._fd, b"".join(item + b"\n" for item in lines(100)))

    def on_progress(self, done: int, count: int) -> None:
        self.told.append((done, count))

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    made = Held(tmp_path)
    yield made
    made.close()


@pytest.fixture
def pids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the processes that are started, in their order."""
    found: list[int] = []
    real = asyncio.create_subprocess_exec

    async def start(*args: Any, **options: Any) -> asyncio.subprocess.Process:
        process = await real(*args, **options)
        found.append(process.pid)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    return found


def test_cancelling_kills_the_helper_and_leaves_nothing(tmp_path: Path, held: Held, pids: list[int]) -> None:
    async def main() -> None:
        running = asyncio.create_task(index(held.task, held.on_progress))
        await eventually(lambda: held.told)
        assert "batch_b1.db.part" in files(tmp_path)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    run(main())
    assert is_dead(pids[0])
    assert files(tmp_path) == ["batch_b1.jsonl"]


def test_a_helper_that_was_killed_can_be_tried_again(tmp_path: Path, held: Held, pids: list[int]) -> None:
    async def main() -> None:
        running = asyncio.create_task(index(held.task, held.on_progress))
        await eventually(lambda: held.told)
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(IndexingFailed, match="was killed by SIGKILL"):
            await running

    run(main())
    assert files(tmp_path) == ["batch_b1.jsonl"]
    (tmp_path / "batch_b1.jsonl").unlink()
    assert by_helper(task(tmp_path, lines(3))).lines == 3


def test_the_helper_is_polite(held: Held, pids: list[int]) -> None:
    async def main() -> int:
        running = asyncio.create_task(index(held.task, held.on_progress))
        await eventually(lambda: held.told)
        nice = os.getpriority(os.PRIO_PROCESS, pids[0])
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return nice

    assert run(main()) == os.getpriority(os.PRIO_PROCESS, 0) + indexing.NICENESS


PARENT = """
import asyncio, json, sys
from vllm_bootstrap.batches.indexer import Task, index
real = asyncio.create_subprocess_exec
async def start(*args, **options):
    process = await real(*args, **options)
    print(process.pid, flush=True)
    return process
asyncio.create_subprocess_exec = start
asyncio.run(index(Task(**json.loads(sys.argv[1])), lambda done, count: print(count, flush=True)))
"""


def test_the_helper_dies_with_the_daemon(tmp_path: Path, held: Held) -> None:
    order = json.dumps(dataclasses.asdict(held.task))
    with subprocess.Popen([sys.executable, "-c", PARENT, order], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        helper = int(parent.stdout.readline())
        assert int(parent.stdout.readline()) == 100
        parent.kill()
    run(eventually(lambda: is_dead(helper)))
    # What it left is no obstacle.
    assert "batch_b1.db.part" in files(tmp_path)
    (tmp_path / "batch_b1.jsonl").unlink()
    assert by_helper(task(tmp_path, lines(3))).lines == 3
    assert files(tmp_path) == ["batch_b1.db", "batch_b1.jsonl"]


def test_a_helper_whose_parent_died_first_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = dataclasses.replace(task(tmp_path, lines(1)), parent=2**22 + 1)
    done = subprocess.run(
        PROGRAM, input=json.dumps(dataclasses.asdict(wanted)), text=True, timeout=60, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert files(tmp_path) == ["batch_b1.jsonl"]


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ((sys.executable, "-c", "import sys; sys.exit('out of luck')"), "ended with status 1: out of luck"),
        ((sys.executable, "-c", "print('{')"), "ended with status 0"),
        ((sys.executable, "-c", "import sys; sys.stderr.write('x' * 10**6 + 'last'); sys.exit(9)"), "status 9: x+last"),
        (("/does/not/exist",), "could not be started"),
    ],
)
def test_a_helper_that_fails_says_why(tmp_path: Path, program: tuple[str, ...], says: str) -> None:
    with pytest.raises(IndexingFailed, match=says):
        run(index(task(tmp_path, lines(1)), program=program))


def test_an_input_that_cannot_be_read(tmp_path: Path) -> None:
    wanted = task(tmp_path, lines(1))
    Path(wanted.input).unlink()
    with pytest.raises(IndexingFailed, match="No such file"):
        by_helper(wanted)
    assert files(tmp_path) == []


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    with small_disk.mounted(tmp_path / "small", "1m"):
        source = task(tmp_path, lines(20_000), max_lines=20_000)
        wanted = dataclasses.replace(source, database=str(tmp_path / "small" / "batch_b1.db"))
        with pytest.raises(StorageFull, match="full"):
            by_helper(wanted)
        assert files(tmp_path / "small") == []


@pytest.mark.parametrize(
    ("failure", "full"),
    [(OSError(28, "no room"), True), (OSError(122, "quota"), True), (OSError(5, "I/O"), False)],
)
def test_failures_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: OSError, full: bool
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(indexing, "_make", fail)
    status, said = called(task(tmp_path, lines(1)), monkeypatch, capsys)
    assert (status, said[-1]["full"]) == (1, full)


def test_the_program_tells_its_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = called(task(tmp_path, [line("a"), b"{"]), monkeypatch, capsys)
    assert status == 0
    assert (said[-1]["lines"], said[-1]["models"], said[-1]["error_count"]) == (2, {"m": 1}, 1)


def called(
    wanted: Task, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[dict[str, Any]]]:
    """The program, run in this process."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(dataclasses.asdict(wanted))))
    monkeypatch.setattr(os, "nice", lambda _by: 0)
    monkeypatch.setenv("SQLITE_TMPDIR", "")
    status = indexing.main()
    return status, [json.loads(said) for said in capsys.readouterr().out.splitlines()]


def test_the_helper_imports_little() -> None:
    program = "import sys, vllm_bootstrap.batches.indexing\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=True, timeout=60,
    )  # fmt: skip
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded - {"vllm_bootstrap", "__main__"} <= set(sys.stdlib_module_names)
    assert not loaded & {"asyncio", "typing_extensions", "logging", "subprocess", "inspect_"}
