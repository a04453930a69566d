"""A line store against a dictionary: each line one record, the first, and sums that are those of the records."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.batches import line, line_store
from vllm_bootstrap.batches.linestore import LineStore
from vllm_bootstrap.batches.types import Counts, Record, TokenUsage

COUNT = 12
numbers = st.integers(1, COUNT)
records = st.builds(
    Record,
    numbers,
    st.booleans(),
    st.integers(1, 3),
    st.binary(min_size=1, max_size=3),
    st.builds(TokenUsage, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
)


class Stores(RuleBasedStateMachine):
    @initialize(shared=st.booleans())
    def start(self, shared: bool) -> None:
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        # Some begin alike, so that the order of work is not that of the file.
        content = [
            line(f"id-{n}", model=f"m{n % 2}", prompt=f"{n % 3}" * 600 if shared else "x") for n in range(1, COUNT + 1)
        ]
        self.store = line_store(self.folder, content)
        self.kept: dict[int, Record] = {}
        self.noted: dict[int, tuple[int, int]] = {}
        self.usage = TokenUsage()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.runner.close()
            shutil.rmtree(self.folder)

    def expected(self) -> tuple[Counts, TokenUsage, int]:
        completed = sum(kept.ok for kept in self.kept.values())
        retried = sum(kept.attempts > 1 for kept in self.kept.values())
        return Counts(COUNT, completed, len(self.kept) - completed), self.usage, retried

    def take(self, made: list[Record]) -> None:
        for each in made:
            if each.number not in self.kept:
                self.kept[each.number] = each
                self.usage = self.usage.plus(each.usage)
            self.noted.pop(each.number, None)

    @rule(made=st.lists(records, max_size=5))
    def finish(self, made: list[Record]) -> None:
        totals = self.runner.run(self.store.finish(made, 1.0))
        self.take(made)
        assert totals == self.expected()

    @rule(number=numbers, attempts=st.integers(1, 5), deaths=st.integers(0, 5))
    def note(self, number: int, attempts: int, deaths: int) -> None:
        if number not in self.kept:
            self.runner.run(self.store.note([(number, attempts, deaths)]))
            self.noted[number] = attempts, deaths

    @rule()
    def forget_failed(self) -> None:
        failed = [number for number, kept in self.kept.items() if not kept.ok]
        assert self.runner.run(self.store.forget_failed()) == len(failed)
        for number in failed:
            del self.kept[number]
        self.noted.clear()

    @rule()
    def fail_rest(self) -> None:
        totals = self.runner.run(self.store.fail_rest("batch_expired", "late", 1.0))
        left = [n for n in range(1, COUNT + 1) if n not in self.kept]
        self.take([Record(n, False, self.noted.get(n, (0, 0))[0], b"") for n in left])
        assert totals == self.expected()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = LineStore.open(self.folder / "batch_b1.db", self.folder / "batch_b1.jsonl")

    @rule(most=st.integers(1, 5), max_bytes=st.integers(1, 2000), from_start=st.booleans())
    def walk(self, most: int, max_bytes: int, from_start: bool) -> None:
        """All that is unfinished comes once, however it is asked for, in the same order."""
        found: list[int] = []
        for model_no in (1, 2):
            after: int | None = 0
            last = 0
            while after is not None:
                taken, after = self.runner.run(self.store.next(model_no, after, most, max_bytes))
                assert len(taken) <= most
                for each in taken:
                    assert each.pos > last
                    assert each.custom_id == f"id-{each.number}"
                    assert (each.attempts, each.deaths) == self.noted.get(each.number, (0, 0))
                    last = each.pos
                assert after is None or after == last
                found += [each.number for each in taken]
                if from_start:
                    break
        if not from_start:
            assert sorted(found) == [n for n in range(1, COUNT + 1) if n not in self.kept]

    @invariant()
    def sums_are_those_of_the_records(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.runner.run(self.store.totals()) == self.expected()

    @rule()
    def records_are_all_there(self) -> None:
        async def read(ok: bool) -> list[tuple[int, bytes]]:
            return [item async for chunk in self.store.records(ok) for item in chunk]

        for ok in (True, False):
            got = self.runner.run(read(ok))
            assert [number for number, _ in got] == sorted(n for n, kept in self.kept.items() if kept.ok is ok)
            assert all(not (data := self.kept[number].data) or data == stored for number, stored in got)


TestStores = Stores.TestCase
TestStores.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
