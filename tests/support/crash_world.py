"""Batches on a disk that is cut off at any point, with an engine that answers at once and remembers what it did.

``record`` runs a whole batch over a recorded disk. ``Cut`` takes what is left at one point of that record, starts
batches anew on it, lets everything end, and says what of the promises did not hold: an empty list is a good end.

``python -m tests.support.crash_world [STEP]`` tries all points, with each kind of cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.batch_office import LINES, OWNER, InstantEngine, Office, input_lines, office
from tests.support.recorded_disk import Left, Op, RecordedDisk, Replay, recorded_disk
from vllm_bootstrap.batches.jobs import TERMINAL, State
from vllm_bootstrap.batches.types import BatchView
from vllm_bootstrap.errors import NotFound

KEY = "once"
_RECORDED = "SELECT line FROM records WHERE ok >= ?"


# Recording


def record(root: Path, lines: int = LINES, lying: Callable[[Path], bool] = lambda _: False) -> list[Op]:
    """The log of a whole life: an upload, a batch with its input deleted under it, its end, and another start."""
    root.mkdir()
    with recorded_disk(root, lying) as disk:
        asyncio.run(_whole_life(disk, lines))
    return disk.log


async def _whole_life(disk: RecordedDisk, lines: int) -> None:
    engine = InstantEngine(pace_s=0.001)
    async with office(disk.folder, engine) as one:
        file_id = await one.upload(input_lines(lines))
        disk.note("uploaded", file_id)
        view = await one.create(file_id, idempotency_key=KEY)
        disk.note("accepted", view.row.id)
        watching = asyncio.create_task(_watch(disk, one, view.row.id))
        await one.files.delete(file_id, OWNER)
        disk.note("deleted", file_id)
        view = await one.ended(view.row.id)
        await watching
        ids = view.row.output_file_id, view.row.error_file_id
        disk.note("ended", view.row.id, ids, [await one.content(each) for each in ids if each])


async def _watch(disk: RecordedDisk, one: Office, batch_id: str) -> None:
    """Note each count that anybody could have seen."""
    seen = 0
    while True:
        view = await one.batches.get(batch_id, OWNER)
        finished = view.row.counts.completed + view.row.counts.failed
        if finished > seen:
            seen = finished
            disk.note("seen", finished)
        if view.row.phase.state in TERMINAL:
            return
        await asyncio.sleep(0)


# Cutting


@dataclass
class Cut:
    """What a cut at one point leaves, and what becomes of it. ``wrong``: what did not hold. ``completed``: by batch
    the lines that were found with a good record."""

    root: Path
    replay: Replay
    left: Left
    lines: int = LINES
    seed: int = 0
    wrong: list[str] = field(default_factory=list)
    completed: dict[str, set[int]] = field(default_factory=dict)

    def run(self, folder: Path) -> list[str]:
        folder.mkdir()
        try:
            self.replay.leave(self.root, folder, self.left, self.seed)
            durable, self.completed = _durable_records(folder), _durable_records(folder, good_only=True)
            self._compare_with_promises(durable)
            asyncio.run(self._second_life(folder, durable))
        except Exception as exc:  # noqa: BLE001 - whatever goes wrong is what is looked for
            self.wrong.append(f"{type(exc).__name__}: {exc}")
        finally:
            shutil.rmtree(folder)
        return self.wrong

    def _noted(self, kind: str) -> list[tuple[Any, ...]]:
        return [tuple(note[1:]) for note in self.replay.notes if note[0] == kind]

    def _expect(self, holds: object, what: str) -> None:
        if not holds:
            self.wrong.append(what)

    def _compare_with_promises(self, durable: dict[str, set[int]]) -> None:
        seen = max((count for (count,) in self._noted("seen")), default=0)
        if not self._noted("ended"):
            found = sum(len(lines) for lines in durable.values())
            self._expect(found >= seen, f"{seen} lines were shown as finished, {found} have a record")

    async def _second_life(self, folder: Path, durable: dict[str, set[int]]) -> None:
        engine = InstantEngine()
        async with office(folder, engine) as two:
            accepted = [batch_id for (batch_id,) in self._noted("accepted")]
            for batch_id in accepted:
                with contextlib.suppress(NotFound):
                    await two.batches.get(batch_id, OWNER)
                    continue
                self._expect(False, f"the accepted batch {batch_id} is not there")
            await self._promised_files(two, bool(accepted))
            known, _ = await two.batches.list(OWNER, after=None, limit=10)
            if not known:
                file_id = await two.upload(input_lines(self.lines))
                known = [await two.create(file_id, idempotency_key=KEY)]
            self._expect(len(known) == 1, f"{len(known)} batches of one")
            for view in known:
                await self._look_at(two, await two.ended(view.row.id))
            again = [key for key in engine.executed if key[1] in durable.get(key[0], ())]
            self._expect(not again, f"run again although finished: {again[:5]}")
            self._expect(len(set(engine.executed)) == len(engine.executed), "a line was run twice in one life")
            await two.files.sweep()
            strays = [path.name for path in folder.rglob("*.part*")]
            self._expect(not strays, f"left over: {strays}")
        self._look_at_databases(folder)

    async def _promised_files(self, two: Office, accepted: bool) -> None:
        deleted = self._noted("deleted")
        for (file_id,) in self._noted("uploaded"):
            if accepted or deleted:
                continue  # whether its deletion is on disk is nobody's affair until it was answered
            self._expect(len(await two.content(file_id)) == self.lines, "the uploaded file is not whole")
        for (file_id,) in deleted:
            with contextlib.suppress(NotFound):
                await two.files.get(file_id, OWNER)
                self._expect(False, "the deleted file is back")
        for batch_id, ids, contents in self._noted("ended"):
            view = await two.batches.get(batch_id, OWNER)
            self._expect((view.row.output_file_id, view.row.error_file_id) == ids, "other files than were shown")
            now = [await two.content(each) for each in ids if each]
            self._expect(now == contents, "the files have changed")

    async def _look_at(self, two: Office, view: BatchView) -> None:
        row = view.row
        self._expect(row.phase.state is State.COMPLETED, f"the batch is {row.phase.state}: {row.errors}")
        good = await two.content(row.output_file_id) if row.output_file_id else []
        bad = await two.content(row.error_file_id) if row.error_file_id else []
        ids = sorted(record["custom_id"] for record in good + bad)
        wanted = sorted(f"id-{n}" for n in range(1, self.lines + 1))
        self._expect(ids == wanted, f"{len(ids)} records for {self.lines} lines, {len(set(ids))} different ones")
        for record in good:
            said = record["response"]["body"]["choices"][0]["text"]
            self._expect(said == record["custom_id"], f"{record['custom_id']} has the answer of {said}")
        counts = row.counts
        self._expect(counts == (self.lines, len(good), len(bad)), f"{counts}, but {len(good)} and {len(bad)} records")
        self._expect(row.usage.completion == 3 * len(good), f"usage {row.usage}")
        events = [event.event for event in await two.batches.events(row.id, OWNER, after=0, limit=100)]
        self._expect(events == ["created", "input_accepted", "lines_finished", "files_written"], f"history {events}")

    def _look_at_databases(self, folder: Path) -> None:
        for path in folder.rglob("*.db"):
            with contextlib.closing(sqlite3.connect(path)) as conn:
                verdict = conn.execute("PRAGMA integrity_check").fetchall()
            self._expect(verdict == [("ok",)], f"{path.name}: {verdict}")


def _durable_records(folder: Path, *, good_only: bool = False) -> dict[str, set[int]]:
    """By batch the lines that have a record (a good one), read from a copy, so that nothing is repaired by looking."""
    found: dict[str, set[int]] = {}
    with tempfile.TemporaryDirectory() as copy:
        for path in (folder / "batches").glob("*.db*"):
            shutil.copy(path, copy)
        for path in Path(copy).glob("*.db"):
            with contextlib.closing(sqlite3.connect(path)) as conn:
                found[path.stem] = {
                    row[0] for row in conn.execute("SELECT line FROM records WHERE ok >= ?", [good_only])
                }
    return found


def points(log: list[Op], step: int = 1, offset: int = 0) -> list[int]:
    """After every ``step``-th operation, and at the end."""
    all_points = [at + 1 for at, op in enumerate(log) if op[0] != "note"]
    return sorted({*all_points[offset::step], len(log)})


def cuts(
    root: Path,
    log: list[Op],
    at: list[int],
    kinds: Callable[[int], list[Left]],
    lines: int = LINES,
    cut: type[Cut] = Cut,
) -> Iterator[tuple[int, Left, list[str]]]:
    """Try them; yields what went wrong at each."""
    replay = Replay(log)
    for number, point in enumerate(at):
        replay.go_to(point)
        for left in kinds(number):
            yield point, left, cut(root, replay, left, lines, seed=point).run(root.parent / "cut")


def try_all(recording: Callable[[Path], list[Op]] = record, cut: type[Cut] = Cut) -> int:
    """All points (or every STEP-th, the program's argument), all kinds of cut. Returns 1 when one went wrong."""
    step = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    began, tried, failed = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory(prefix="crash", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temp:
        root = Path(temp).resolve() / "state"
        log = recording(root)
        for point, left, wrong in cuts(root, log, points(log, step), lambda _: list(Left), cut=cut):
            tried += 1
            if wrong:
                failed += 1
                print(f"cut after {point} of {len(log)} ({log[point - 1][:2]}), {left.value} left: {wrong}")
    print(f"{tried} cuts tried, {failed} with a fault, {time.monotonic() - began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(try_all())
