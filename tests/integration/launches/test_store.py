from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.aio import run
from tests.support.launches import launch_id, row
from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import Conflict, GpuConflict
from vllm_bootstrap.gpus.ledger import Ledger, Parked
from vllm_bootstrap.launches.lifecycle import (
    ASLEEP,
    BOOTSTRAPPING,
    FAILED,
    FALLING_ASLEEP,
    READY,
    STOPPED,
    STOPPING,
    WAKING,
    Phase,
    Why,
)
from vllm_bootstrap.launches.store import (
    STARTS_KEPT,
    AttemptRow,
    Claim,
    IdempotentReplay,
    LaunchStore,
    StaleTransition,
)

STOPPING_OPERATOR, STOPPING_DIED = STOPPING[Why.OPERATOR], STOPPING[Why.DIED]
FORGED_EVENT = """INSERT OR REPLACE INTO launch_events
    SELECT seq, launch_id, 1, 1, 'forged', NULL, 'ready', '{}' FROM launch_events"""
ONE, TWO, THREE = (launch_id(n) for n in (1, 2, 3))


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = Database.open(tmp_path / "state.db")
    yield database
    database.close()


@pytest.fixture
def store(db: Database) -> LaunchStore:
    return LaunchStore(db)


def whole(*uuids: str) -> list[Claim]:
    return [Claim(uuid, 1000, False) for uuid in uuids]


async def end(store: LaunchStore, number: int, at: float, to: Phase = STOPPED) -> None:
    name = launch_id(number)
    await store.transition(name, 1, "stop_requested", BOOTSTRAPPING, STOPPING_OPERATOR, at)
    await store.transition(name, 1, "released", STOPPING_OPERATOR, to, at)


# Creating


def test_a_launch_is_stored_with_its_claims_and_its_first_history_row(store: LaunchStore) -> None:
    async def main() -> None:
        placement = {"kind": "cuda", "gpus": [{"uuid": "GPU-a"}]}
        event = await store.create(row(1), whole("GPU-a", "GPU-b"), placement=placement, detail={"gpus": 2})
        assert (event.event, event.from_state, event.to_state) == ("created", None, "bootstrapping")
        assert (event.attempt, event.at, event.detail) == (1, 1.0, {"gpus": 2})
        assert await store.get(ONE) == row(1, placement=placement)
        assert await store.placement(ONE) == placement
        assert await store.claims() == {ONE: tuple(whole("GPU-a", "GPU-b"))}
        assert await store.events(ONE) == [event]

    run(main())


def test_unknown_launches_are_none(store: LaunchStore) -> None:
    assert run(store.get(ONE)) is None
    assert run(store.placement(ONE)) is None
    assert run(store.attempts(ONE)) == []
    assert run(store.events(ONE)) == []


def test_an_owned_gpu_refuses_the_whole_launch_and_names_the_owner(store: LaunchStore) -> None:
    async def main() -> None:
        await store.create(row(1), whole("GPU-b"))
        with pytest.raises(GpuConflict, match=f"GPU GPU-b is owned by {ONE}") as caught:
            await store.create(row(2), whole("GPU-a", "GPU-b"), ("alice", "key", "hash"))
        assert caught.value.details == {"gpus": [{"uuid": "GPU-b", "owners": [ONE]}]}
        assert await store.get(TWO) is None
        assert await store.claims() == {ONE: tuple(whole("GPU-b"))}
        assert await store.idempotent("alice", "key") is None

    run(main())


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [
        ((500, True), (500, True), True),
        ((500, True), (501, True), False),
        ((1000, True), (1, True), False),
        ((1000, False), (1, True), False),
        ((1, True), (1000, False), False),
    ],
)
def test_the_trigger_keeps_what_the_ledger_keeps(
    store: LaunchStore, first: tuple[int, bool], second: tuple[int, bool], fits: bool
) -> None:
    async def main() -> None:
        ledger = Ledger()
        await store.create(row(1), [Claim("GPU-a", *first)])
        ledger.restore(await store.claims())
        assert ledger.fits(Claim("GPU-a", *second)) is fits
        try:
            await store.create(row(2), [Claim("GPU-a", *second)])
        except GpuConflict:
            assert not fits
        else:
            assert fits

    run(main())


def test_a_hundred_launches_race_for_two_gpus(store: LaunchStore) -> None:
    async def main() -> None:
        tries = [store.create(row(n), whole(f"GPU-{n % 2}")) for n in range(100)]
        results = await asyncio.gather(*tries, return_exceptions=True)
        assert sum(isinstance(r, GpuConflict) for r in results) == 98
        claims = await store.claims()
        assert sorted(c.uuid for held in claims.values() for c in held) == ["GPU-0", "GPU-1"]
        assert {r.id for r in await store.list(active_only=False)} == set(claims)

    run(main())


def test_the_same_gpu_on_another_node_is_another_gpu(store: LaunchStore, db: Database) -> None:
    async def main() -> None:
        await store.create(row(1), whole("cpu"))
        await store.create(row(2, node_id="far"), whole("cpu"))
        assert set(await store.claims()) == {ONE}
        assert set(await LaunchStore(db, "far").claims()) == {TWO}
        assert [found.id for found, _ in await LaunchStore(db, "far").unfinished()] == [TWO]

    run(main())


def test_other_constraints_are_not_mistaken_for_conflicts(store: LaunchStore) -> None:
    async def main() -> None:
        await store.create(row(1), whole("GPU-a"))
        with pytest.raises(sqlite3.IntegrityError, match=r"launches\.id"):
            await store.create(row(1), [])
        with pytest.raises(sqlite3.IntegrityError, match="has not ended owns GPUs"):
            await store.create(row(2, phase=STOPPED, ended_at=2.0), whole("GPU-b"))

    run(main())


# Idempotency


def test_an_idempotency_key_is_remembered_for_its_owner(store: LaunchStore) -> None:
    async def main() -> None:
        await store.create(row(1), [], ("alice", "key", "hash"))
        assert await store.idempotent("alice", "key") == ("hash", ONE)
        assert await store.idempotent("bob", "key") is None
        await store.create(row(2), [], ("bob", "key", "hash"))

    run(main())


def test_of_two_racing_creates_with_one_key_the_second_is_a_replay(store: LaunchStore) -> None:
    async def main() -> None:
        tries = [store.create(row(n), whole("GPU-a"), ("alice", "key", f"hash{n}")) for n in (1, 2)]
        first, second = await asyncio.gather(*tries, return_exceptions=True)
        assert not isinstance(first, BaseException)
        assert isinstance(second, IdempotentReplay)
        assert (second.launch_id, second.request_hash) == (ONE, "hash1")
        assert await store.get(TWO) is None

    run(main())


# Moving


def test_a_transition_changes_state_and_history_together(store: LaunchStore) -> None:
    async def main() -> None:
        await store.create(row(1), whole("GPU-a"))
        event = await store.transition(ONE, 1, "became_ready", BOOTSTRAPPING, READY, 5.0, {"seconds": 4})
        assert (event.from_state, event.to_state, event.detail) == ("bootstrapping", "ready", {"seconds": 4})
        found = await store.get(ONE)
        assert found == row(1, phase=READY, changed_at=5.0, transitions={"bootstrapping": 1.0, "ready": 5.0})
        event = await store.transition(ONE, 1, "main_exited", READY, STOPPING_DIED, 6.0)
        assert event.detail == {"why": "died"}
        found = await store.get(ONE)
        assert found is not None
        assert found.phase == STOPPING_DIED
        assert await store.claims() == {ONE: tuple(whole("GPU-a"))}

    run(main())


def test_the_end_gives_the_gpus_back(store: LaunchStore) -> None:
    async def main() -> None:
        await store.create(row(1), whole("GPU-a"))
        await end(store, 1, 9.0)
        found = await store.get(ONE)
        assert found is not None
        assert (found.phase, found.ended_at, await store.claims()) == (STOPPED, 9.0, {})
        await store.create(row(2), whole("GPU-a"))

    run(main())


def test_claims_can_be_released_before_the_end(store: LaunchStore) -> None:
    async def main() -> None:
        await store.create(row(1), whole("GPU-a"))
        await store.transition(ONE, 1, "x", BOOTSTRAPPING, STOPPING_DIED, 2.0, release_claims=True)
        assert await store.claims() == {}

    run(main())


def test_a_restart_keeps_claims_and_failure_until_it_is_ready(store: LaunchStore) -> None:
    async def main() -> None:
        failure = {"failure_class": "engine_died", "lines": ["é"]}
        await store.create(row(1), whole("GPU-a"))
        await store.transition(ONE, 1, "main_exited", BOOTSTRAPPING, STOPPING_DIED, 2.0)
        event = await store.transition(
            ONE, 1, "released", STOPPING_DIED, BOOTSTRAPPING, 3.0, {}, failure=failure, new_attempt=2
        )
        assert event.attempt == 1
        found = await store.get(ONE)
        assert found is not None
        assert (found.attempt, found.failure, found.ended_at) == (2, failure, None)
        assert await store.claims() == {ONE: tuple(whole("GPU-a"))}
        await store.transition(ONE, 2, "became_ready", BOOTSTRAPPING, READY, 4.0)
        found = await store.get(ONE)
        assert found is not None
        assert found.failure is None

    run(main())


def test_claims_are_parked_in_sleep_and_taken_again_on_waking(store: LaunchStore) -> None:
    async def main() -> None:
        one, two = launch_id(1), launch_id(2)
        await store.create(row(1), whole("GPU-a", "GPU-b"))
        await store.transition(one, 1, "became_ready", BOOTSTRAPPING, READY, 2.0)
        await store.transition(one, 1, "sleep_begun", READY, FALLING_ASLEEP, 3.0)
        assert (await store.get(one)).phase == FALLING_ASLEEP
        assert set(await store.claims()) == {one}
        await store.transition(one, 1, "fell_asleep", FALLING_ASLEEP, ASLEEP, 4.0, residues={"GPU-a": 5, "GPU-c": 6})
        assert await store.claims() == {}
        a, b = whole("GPU-a", "GPU-b")
        assert await store.parked() == {one: (Parked(a, 5), Parked(b, 0))}
        await store.create(row(2), whole("GPU-a"))
        with pytest.raises(GpuConflict, match=two):
            await store.transition(one, 1, "wake_begun", ASLEEP, WAKING, 5.0)
        assert (await store.get(one)).phase == ASLEEP
        assert await store.parked() == {one: (Parked(a, 5), Parked(b, 0))}
        await end(store, 2, 6.0)
        await store.transition(one, 1, "wake_begun", ASLEEP, WAKING, 7.0)
        assert (await store.get(one)).phase == WAKING
        assert await store.parked() == {}
        assert set(await store.claims()) == {one}
        await store.transition(one, 1, "stayed_asleep", WAKING, ASLEEP, 8.0, residues={"GPU-b": 7})
        assert await store.parked() == {one: (Parked(a, 0), Parked(b, 7))}
        await store.transition(one, 1, "stop_requested", ASLEEP, STOPPING[Why.OPERATOR], 9.0)
        assert set(await store.parked()) == {one}
        await store.transition(one, 1, "released", STOPPING[Why.OPERATOR], STOPPED, 10.0)
        assert await store.parked() == {}

    run(main())


def test_waking_is_estimated_by_level(store: LaunchStore) -> None:
    async def main() -> None:
        kind = ("m", "vllm", "1 x H200", "hash")
        for seconds in (9.0, 1.0, 2.0, 3.0, 4.0, 5.0):
            await store.record_wake(*kind, 1, seconds, 1.0)
        await store.record_wake(*kind, 2, 60.0, 1.0)
        assert await store.estimate_wake(*kind, 1) == 3.0
        assert await store.estimate_wake(*kind, 2) == 60.0
        assert await store.estimate_wake("other", *kind[1:], 1) is None

    run(main())


def test_the_failure_of_an_ended_launch_stays(store: LaunchStore) -> None:
    async def main() -> None:
        await store.create(row(1), [])
        await store.transition(ONE, 1, "main_exited", BOOTSTRAPPING, STOPPING_DIED, 2.0, failure={"a": 1})
        await store.transition(ONE, 1, "released", STOPPING_DIED, FAILED, 3.0)
        found = await store.get(ONE)
        assert found is not None
        assert found.failure == {"a": 1}

    run(main())


@pytest.mark.parametrize(
    ("attempt", "frm", "found"),
    [(1, READY, "bootstrapping in attempt 1"), (2, BOOTSTRAPPING, "bootstrapping in attempt 1")],
)
def test_a_transition_from_elsewhere_is_refused(store: LaunchStore, attempt: int, frm: Phase, found: str) -> None:
    async def main() -> None:
        await store.create(row(1), whole("GPU-a"))
        with pytest.raises(StaleTransition) as caught:
            await store.transition(ONE, attempt, "released", frm, STOPPED, 2.0)
        assert caught.value.found == found
        assert await store.get(ONE) == row(1)
        assert len(await store.events(ONE)) == 1
        assert set(await store.claims()) == {ONE}

    run(main())


def test_the_reason_for_stopping_counts_as_well(store: LaunchStore) -> None:
    async def main() -> None:
        await store.create(row(1), [])
        await store.transition(ONE, 1, "main_exited", BOOTSTRAPPING, STOPPING_DIED, 2.0)
        with pytest.raises(
            StaleTransition, match=r"expected stopping \(operator\) in attempt 1, found stopping \(died\)"
        ):
            await store.transition(ONE, 1, "released", STOPPING_OPERATOR, STOPPED, 3.0)

    run(main())


def test_a_launch_that_does_not_exist_does_not_move(store: LaunchStore) -> None:
    with pytest.raises(StaleTransition, match="no such launch"):
        run(store.transition(ONE, 1, "x", BOOTSTRAPPING, READY, 2.0))
    with pytest.raises(StaleTransition, match="no such launch"):
        run(store.note(ONE, 1, "x", 2.0))


# History


def test_notes_are_history_without_a_change(store: LaunchStore) -> None:
    async def main() -> None:
        await store.create(row(1), [])
        note = await store.note(ONE, 1, "unresponsive", 2.0, {"for_s": 20})
        assert (note.from_state, note.to_state, note.detail) == ("bootstrapping", "bootstrapping", {"for_s": 20})
        assert await store.get(ONE) == row(1)

    run(main())


def test_history_is_read_in_pieces_and_in_order(store: LaunchStore) -> None:
    async def main() -> None:
        await store.create(row(1), [])
        await store.create(row(2), [])
        notes = [await store.note(ONE, 1, f"note{n}", float(n)) for n in range(4)]
        seqs = [note.seq for note in notes]
        assert seqs == sorted(set(seqs))
        assert await store.events(ONE, notes[0].seq, 2) == notes[1:3]
        assert await store.events(ONE, notes[-1].seq) == []
        assert await store.events(ONE, 10**30) == []

    run(main())


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE launch_events SET event = 'forged'", "append-only"),
        ("DELETE FROM launch_events", "only with its launch"),
        (FORGED_EVENT, "only with its launch"),
        ("UPDATE gpu_claims SET share_milli = 1, shared = 1", "never changed"),
        ("INSERT OR REPLACE INTO gpu_claims SELECT * FROM gpu_claims", "gpu_conflict"),
        ("DELETE FROM launches", "only an ended launch"),
        ("UPDATE launches SET state = 'stopped', ended_at = 3", "gives its GPUs back"),
        ("UPDATE launches SET state = 'stopped'", "CHECK"),
        ("UPDATE launches SET state = 'stopping'", "CHECK"),
        ("UPDATE launches SET state = 'resting'", "CHECK"),
        ("INSERT INTO gpu_claims VALUES ('local', 'GPU-b', 'launch', 'nobody', 1000, 0, 0)", "has not ended"),
        ("INSERT INTO gpu_claims VALUES ('local', 'GPU-b', 'friend', 'nobody', 1000, 0, 0)", "CHECK"),
        ("INSERT INTO gpu_claims VALUES ('local', 'GPU-b', 'parked', 'nobody', 1000, 0, 0)", "has not ended"),
        ("INSERT INTO gpu_claims SELECT 'local', 'GPU-b', 'parked', id, 1000, 0, 0 FROM launches", "parked or held"),
        ("INSERT INTO gpu_claims SELECT 'local', 'GPU-b', 'launch', id, 500, 0, 0 FROM launches", "CHECK"),
        ("INSERT INTO gpu_claims SELECT 'local', 'GPU-b', 'launch', id, 0, 1, 0 FROM launches", "CHECK"),
        ("INSERT INTO gpu_claims SELECT 'local', 'GPU-b', 'launch', id, 1000, 0, 5 FROM launches", "CHECK"),
        ("UPDATE launches SET step = 'waking'", "CHECK"),
        ("UPDATE launches SET step = 'yawning'", "CHECK"),
        ("INSERT INTO attempts (launch_id, attempt) VALUES ('nobody', 1)", "FOREIGN KEY"),
    ],
)  # fmt: skip
def test_the_database_itself_refuses_what_must_not_be(
    store: LaunchStore, db: Database, statement: str, message: str
) -> None:
    async def main() -> None:
        await store.create(row(1), whole("GPU-a"))
        with pytest.raises(sqlite3.IntegrityError, match=message):
            await db.write(lambda conn: conn.execute(statement).rowcount)

    run(main())


# Attempts


def test_attempts_are_made_and_changed_column_by_column(store: LaunchStore) -> None:
    async def main() -> None:
        await store.create(row(1), [])
        await store.save_attempt(ONE, 1, started_at=1.5, baseline={"GPU-a": 7})
        stored = await store.save_attempt(ONE, 1, handle={"identity": {"pid": 5}})
        assert stored == AttemptRow(ONE, 1, handle={"identity": {"pid": 5}}, started_at=1.5, baseline={"GPU-a": 7})
        await store.save_attempt(ONE, 2)
        assert await store.attempts(ONE) == [stored, AttemptRow(ONE, 2)]
        with pytest.raises(TypeError, match="no color"):
            await store.save_attempt(ONE, 1, color="red")

    run(main())


# Listing


def test_listing_is_newest_first_in_pages(store: LaunchStore) -> None:
    async def main() -> None:
        for number in range(1, 6):
            await store.create(row(number), [])
        await end(store, 3, 9.0)
        assert [r.id for r in await store.list()] == [launch_id(n) for n in (5, 4, 2, 1)]
        assert [r.id for r in await store.list(active_only=False, limit=2)] == [launch_id(5), launch_id(4)]
        assert [r.id for r in await store.list(active_only=False, after=launch_id(4), limit=2)] == [THREE, TWO]
        assert [r.id for r in await store.list(after=launch_id(4))] == [TWO, ONE]

    run(main())


def test_unfinished_launches_come_with_their_current_attempt(store: LaunchStore) -> None:
    async def main() -> None:
        for number in (1, 2, 3):
            await store.create(row(number), [])
        await end(store, 1, 9.0)
        await store.save_attempt(TWO, 1, started_at=2.0)
        await store.transition(TWO, 1, "begun_again", BOOTSTRAPPING, BOOTSTRAPPING, 3.0, new_attempt=2)
        current = await store.save_attempt(TWO, 2, started_at=3.0)
        found = await store.unfinished()
        assert [(r.id, r.attempt, attempt) for r, attempt in found] == [(TWO, 2, current), (THREE, 1, None)]

    run(main())


def test_members_of_a_group_are_found(store: LaunchStore) -> None:
    async def main() -> None:
        await store.create(row(1, group_id="g1"), [])
        await store.create(row(2, group_id="g1"), [])
        await store.create(row(3), [])
        assert [r.id for r in await store.group("g1")] == [ONE, TWO]
        assert await store.group("g2") == []

    run(main())


# Forgetting


def test_only_ended_launches_are_deleted_with_all_that_is_theirs(store: LaunchStore, db: Database) -> None:
    async def main() -> None:
        await store.create(row(1), whole("GPU-a"), ("alice", "key", "hash"))
        await store.create(row(2), [])
        await store.save_attempt(ONE, 1, started_at=1.0)
        with pytest.raises(Conflict, match="is bootstrapping: stop it"):
            await store.delete(ONE)
        await end(store, 1, 9.0)
        assert await store.delete(ONE)
        assert not await store.delete(ONE)
        assert await store.get(ONE) is None
        assert (await store.events(ONE), await store.attempts(ONE)) == ([], [])
        assert await store.idempotent("alice", "key") is None
        assert len(await store.events(TWO)) == 1

    run(main())


def test_pruning_keeps_those_that_ended_last(store: LaunchStore) -> None:
    async def main() -> None:
        for number in range(1, 6):
            await store.create(row(number), [])
        for number, at in ((1, 50.0), (2, 20.0), (3, 30.0), (4, 40.0)):
            await end(store, number, at)
        assert sorted(await store.prune(2)) == [TWO, THREE]
        assert await store.prune(2) == []
        assert [r.id for r in await store.list(active_only=False)] == [launch_id(n) for n in (5, 4, 1)]

    run(main())


# Unsettled GPUs and earlier starts


def test_unsettled_gpus_are_remembered_until_cleared(store: LaunchStore, tmp_path: Path, db: Database) -> None:
    async def main() -> None:
        await store.mark_unsettled("GPU-a", 100, "first", 1.0)
        await store.mark_unsettled("GPU-a", 200, "again", 2.0)
        await store.mark_unsettled("GPU-b", 0, "other", 3.0)
        assert await store.unsettled() == {"GPU-a": (200, "again"), "GPU-b": (0, "other")}
        assert await LaunchStore(db, "far").unsettled() == {}
        await store.clear_unsettled("GPU-a")
        await store.clear_unsettled("GPU-a")
        assert await store.unsettled() == {"GPU-b": (0, "other")}

    run(main())


def test_an_estimate_is_the_median_of_the_last_five_starts_of_that_kind(store: LaunchStore, db: Database) -> None:
    async def main() -> None:
        kind = ("org/model", "vllm", "1 x H200", "abc")
        assert await store.estimate(*kind) is None
        await store.record_start(*kind, 100.0, {"load": 60.0}, 1.0)
        assert await store.estimate(*kind) == 100.0
        for seconds in (10.0, 50.0, 20.0, 40.0, 30.0):
            await store.record_start(*kind, seconds, {}, 2.0)
        assert await store.estimate(*kind) == 30.0
        for other in range(4):
            changed = tuple("other" if n == other else part for n, part in enumerate(kind))
            assert await store.estimate(*changed) is None
        for _ in range(STARTS_KEPT):
            await store.record_start(*kind, 1.0, {}, 3.0)
        rows = await db.read(lambda conn: conn.execute("SELECT COUNT(*) FROM start_durations").fetchone()[0])
        assert rows == STARTS_KEPT

    run(main())


def test_everything_is_there_again_after_a_restart(tmp_path: Path) -> None:
    first = Database.open(tmp_path / "state.db")
    run(LaunchStore(first).create(row(1), whole("GPU-a")))
    first.close()
    second = Database.open(tmp_path / "state.db")
    store = LaunchStore(second)
    assert [found for found, _ in run(store.unfinished())] == [row(1)]
    assert run(store.claims()) == {ONE: tuple(whole("GPU-a"))}
    second.close()
