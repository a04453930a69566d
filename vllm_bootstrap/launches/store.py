"""Launches, attempts, history, claims on GPUs and what is remembered for later starts, in SQLite.

Invariants: a state and its history row change in one transaction; GPUs are claimed with the launch that wants them
and given back no later than it ends; what a method returned is on disk. The schema's triggers hold these once more.

It decides nothing: states come from ``lifecycle``, claims from ``placement``. It knows no processes and no clock.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import Conflict
from vllm_bootstrap.gpus.ledger import Claim, Parked
from vllm_bootstrap.launches.claim_rows import SQL, claim, park, unpark
from vllm_bootstrap.launches.lifecycle import TERMINAL, Phase, State
from vllm_bootstrap.launches.records import (
    AttemptRow,
    IdempotentReplay,
    LaunchRow,
    NewLaunch,
    StaleTransition,
    median,
)
from vllm_bootstrap.launches.rows import (
    attempt_values,
    dump,
    launch_values,
    phase_name,
    stored_phase,
    to_attempt,
    to_claim,
    to_event,
    to_launch,
)
from vllm_bootstrap.launches.types import EventView

__all__ = ["AttemptRow", "Claim", "IdempotentReplay", "LaunchRow", "LaunchStore", "NewLaunch", "StaleTransition"]

STARTS_COUNTED, STARTS_KEPT = 5, 20
LARGEST_SEQ = 2**63 - 1  # callers may ask for more than SQLite can count
NO_DETAIL: Mapping[str, Any] = {}
NO_RESIDUES: Mapping[str, int] = {}

# Named here because the class has a method called list.
Launches = list[LaunchRow]
Unfinished = list[tuple[LaunchRow, AttemptRow | None]]
Events = list[EventView]
LaunchIds = list[str]
_ATTEMPT_COLUMNS = frozenset(f.name for f in fields(AttemptRow)) - {"launch_id", "attempt"}


class LaunchStore:
    """All methods are durable when they return and raise ``StorageFull`` or ``StorageFailed`` as ``Database.write``."""

    def __init__(self, db: Database, node_id: str = "local") -> None:
        self._db = db
        self._node_id = node_id

    async def create(
        self,
        row: LaunchRow,
        claims: Sequence[Claim],
        idempotency: tuple[str, str, str] | None = None,
        *,
        placement: Mapping[str, Any] | None = None,
        event: str = "created",
        detail: Mapping[str, Any] = NO_DETAIL,
    ) -> EventView:
        """``create_all`` for a single launch."""
        made = await self.create_all([NewLaunch(row, claims, placement)], idempotency, event=event, detail=detail)
        return made[0]

    async def create_all(
        self,
        launches: Sequence[NewLaunch],
        idempotency: tuple[str, str, str] | None = None,
        *,
        event: str = "created",
        detail: Mapping[str, Any] = NO_DETAIL,
    ) -> Events:
        """Store launches, their claims, first history rows and the (owner, key, request hash) of an Idempotency-Key,
        all or nothing.

        Raises ``GpuConflict`` naming the owners, ``IdempotentReplay`` when the key was used before.
        """

        def work(conn: sqlite3.Connection) -> Events:
            if idempotency is not None:
                _refuse_replay(conn, idempotency)
            told = []
            for row, claims, placement in launches:
                stored = row if placement is None else replace(row, placement=placement)
                conn.execute(SQL["insert_launch"], launch_values(stored))
                claim(conn, row, claims)
                told.append(_append(conn, row.id, row.attempt, row.created_at, event, None, row.phase, detail))
            if idempotency is not None:
                owner, key, request_hash = idempotency
                first = launches[0].row
                values = {"owner_id": owner, "key": key, "request_hash": request_hash}
                conn.execute(SQL["remember_key"], {**values, "launch_id": first.id, "created_at": first.created_at})
            return told

        return await self._db.write(work)

    async def idempotent(self, owner: str, key: str) -> tuple[str, str] | None:
        """(request hash, launch id) of an earlier create with this key, None when there was none. Of a group, the id
        is that of one of its launches."""
        row = await self._one("remembered_key", owner_id=owner, key=key)
        return None if row is None else (row["request_hash"], row["launch_id"])

    async def transition(
        self,
        launch_id: str,
        attempt: int,
        event: str,
        frm: Phase,
        to: Phase,
        at: float,
        detail: Mapping[str, Any] = NO_DETAIL,
        *,
        failure: Mapping[str, Any] | None = None,
        release_claims: bool = False,
        residues: Mapping[str, int] = NO_RESIDUES,
        new_attempt: int | None = None,
    ) -> EventView:
        """Move a launch from ``frm`` to ``to``, with its history row.

        ``failure`` None keeps the stored one, but becoming ready clears it. Claims are released when ``to`` is
        terminal or ``release_claims``, parked when it is asleep (``residues``: bytes the launch still uses, by GPU),
        taken again when it begins to wake. ``new_attempt`` begins the next attempt; the history row still speaks of
        ``attempt``. Raises ``StaleTransition`` when the launch is not in ``frm`` and ``attempt``, ``GpuConflict`` when
        parked claims cannot be taken again.
        """

        def work(conn: sqlite3.Connection) -> EventView:
            row = _launch(conn, launch_id)
            if row is None or (row.phase, row.attempt) != (frm, attempt):
                found = None if row is None else f"{phase_name(row.phase)} in attempt {row.attempt}"
                raise StaleTransition(launch_id, f"{phase_name(frm)} in attempt {attempt}", found)
            if release_claims or to.state in TERMINAL:
                conn.execute(SQL["release_claims"], {"owner_id": launch_id})
            elif to.state is State.ASLEEP:
                park(conn, row, residues)
            elif to.state is State.WAKING:
                unpark(conn, row)
            kept = None if to.state is State.READY else row.failure
            conn.execute(SQL["move_launch"], {
                "id": launch_id, "attempt": attempt, "at": at,
                **stored_phase("from_", frm),
                **stored_phase("to_", to),
                "new_attempt": attempt if new_attempt is None else new_attempt,
                "ended_at": at if to.state in TERMINAL else None,
                "failure": dump(kept if failure is None else failure),
                "transitions": dump({**row.transitions, to.state.value: at}),
            })  # fmt: skip
            return _append(conn, launch_id, attempt, at, event, frm, to, detail)

        return await self._db.write(work)

    async def note(
        self, launch_id: str, attempt: int, event: str, at: float, detail: Mapping[str, Any] = NO_DETAIL
    ) -> EventView:
        """A history row without a change of state. Raises ``StaleTransition`` when the launch does not exist."""

        def work(conn: sqlite3.Connection) -> EventView:
            row = _launch(conn, launch_id)
            if row is None:
                raise StaleTransition(launch_id, "a launch", None)
            return _append(conn, launch_id, attempt, at, event, row.phase, row.phase, detail)

        return await self._db.write(work)

    async def save_attempt(self, launch_id: str, attempt: int, **changed: Any) -> AttemptRow:
        """Make the attempt's row or change the given columns of it; what is stored now. Idempotent."""
        if unknown := changed.keys() - _ATTEMPT_COLUMNS:
            raise TypeError(f"an attempt has no {', '.join(sorted(unknown))}")

        def work(conn: sqlite3.Connection) -> AttemptRow:
            row = replace(_attempt(conn, launch_id, attempt) or AttemptRow(launch_id, attempt), **changed)
            conn.execute(SQL["save_attempt"], attempt_values(row))
            return row

        return await self._db.write(work)

    async def attempts(self, launch_id: str) -> list[AttemptRow]:
        """All attempts of a launch, oldest first."""
        return [to_attempt(row) for row in await self._all("attempts", launch_id=launch_id)]

    async def get(self, launch_id: str) -> LaunchRow | None:
        row = await self._one("launch", id=launch_id)
        return None if row is None else to_launch(row)

    async def group(self, group_id: str) -> Launches:
        """The launches that share a group id, oldest first."""
        return [to_launch(row) for row in await self._all("group_members", group_id=group_id)]

    async def list(self, *, active_only: bool = True, after: str | None = None, limit: int = 100) -> Launches:
        """Launches, newest first, beginning behind the id ``after``."""
        name = "active_launches_newest_first" if active_only else "launches_newest_first"
        return [to_launch(row) for row in await self._all(name, after=after, limit=limit)]

    async def unfinished(self) -> Unfinished:
        """This node's launches that have not ended, oldest first, each with the row of its current attempt where one
        was stored: what a new daemon has to look after."""

        def work(conn: sqlite3.Connection) -> Unfinished:
            rows = [to_launch(row) for row in conn.execute(SQL["unfinished_launches"], {"node_id": self._node_id})]
            return [(row, _attempt(conn, row.id, row.attempt)) for row in rows]

        return await self._db.read(work)

    async def placement(self, launch_id: str) -> Mapping[str, Any] | None:
        """What was stored with the launch when its GPUs were claimed."""
        row = await self.get(launch_id)
        return None if row is None else row.placement

    async def claims(self) -> dict[str, tuple[Claim, ...]]:
        """This node's claims by owner, as ``Ledger.restore`` takes them."""
        held: dict[str, tuple[Claim, ...]] = {}
        for row in await self._all("claims", node_id=self._node_id, owner_kind="launch"):
            held[row["owner_id"]] = (*held.get(row["owner_id"], ()), to_claim(row))
        return held

    async def parked(self) -> dict[str, tuple[Parked, ...]]:
        """This node's parked claims by owner, as ``Ledger.restore_parked`` takes them."""
        found: dict[str, tuple[Parked, ...]] = {}
        for row in await self._all("claims", node_id=self._node_id, owner_kind="parked"):
            parked = Parked(to_claim(row), row["residue_bytes"])
            found[row["owner_id"]] = (*found.get(row["owner_id"], ()), parked)
        return found

    async def events(self, launch_id: str, after_seq: int = 0, limit: int = 1000) -> Events:
        """History rows of a launch behind ``after_seq``, oldest first."""
        rows = await self._all("events", launch_id=launch_id, after_seq=min(after_seq, LARGEST_SEQ), limit=limit)
        return [to_event(row) for row in rows]

    async def group_events(self, group_id: str, after_seq: int = 0, limit: int = 1000) -> Events:
        """Likewise of all launches of a group."""
        rows = await self._all("group_events", group_id=group_id, after_seq=min(after_seq, LARGEST_SEQ), limit=limit)
        return [to_event(row) for row in rows]

    async def delete(self, *launch_ids: str) -> bool:
        """Forget ended launches with attempts and history, all or none. False when there is none; ``Conflict`` while
        one lives."""

        def work(conn: sqlite3.Connection) -> bool:
            for launch_id in launch_ids:
                row = _launch(conn, launch_id)
                if row is not None and row.phase.state not in TERMINAL:
                    raise Conflict(f"Launch {launch_id} is {row.phase.state.value}: stop it before deleting it.")
            return sum(_forget(conn, launch_id) for launch_id in launch_ids) > 0

        return await self._db.write(work)

    async def prune(self, keep_ended: int) -> LaunchIds:
        """Forget all but the ``keep_ended`` launches that ended last; the ids that went."""

        def work(conn: sqlite3.Connection) -> LaunchIds:
            gone = [row["id"] for row in conn.execute(SQL["ended_beyond"], {"keep": keep_ended})]
            for launch_id in gone:
                _forget(conn, launch_id)
            return gone

        return await self._db.write(work)

    async def mark_unsettled(self, uuid: str, baseline_bytes: int, reason: str, at: float) -> None:
        """Remember that a GPU's memory did not come back. Replaces what was remembered before."""
        values = {"node_id": self._node_id, "gpu_uuid": uuid, "baseline_bytes": baseline_bytes}
        await self._run("mark_unsettled", {**values, "reason": reason, "at": at})

    async def clear_unsettled(self, uuid: str) -> None:
        """The GPU is free again. Idempotent."""
        await self._run("clear_unsettled", {"node_id": self._node_id, "gpu_uuid": uuid})

    async def unsettled(self) -> dict[str, tuple[int, str]]:
        """This node's GPUs whose memory had not come back: UUID to (baseline bytes, reason)."""
        rows = await self._all("unsettled", node_id=self._node_id)
        return {row["gpu_uuid"]: (row["baseline_bytes"], row["reason"]) for row in rows}

    async def record_start(
        self,
        model: str,
        engine: str,
        device: str,
        args_hash: str,
        total_s: float,
        phases: Mapping[str, float],
        at: float,
    ) -> None:
        """Remember how long a start took until ready, in all and by phase. Only the newest few are kept."""
        kind = {"model": model, "engine": engine, "device": device, "args_hash": args_hash}

        def work(conn: sqlite3.Connection) -> None:
            conn.execute(SQL["record_start"], {**kind, "total_s": total_s, "phases": dump(phases), "at": at})
            conn.execute(SQL["forget_old_starts"], {**kind, "limit": STARTS_KEPT})

        await self._db.write(work)

    async def estimate(self, model: str, engine: str, device: str, args_hash: str) -> float | None:
        """Seconds a start of this kind takes: the median of the last five, None when there was none."""
        kind = {"model": model, "engine": engine, "device": device, "args_hash": args_hash}
        return median([row["total_s"] for row in await self._all("recent_starts", **kind, limit=STARTS_COUNTED)])

    async def record_wake(
        self, model: str, engine: str, device: str, args_hash: str, level: int, total_s: float, at: float
    ) -> None:
        """Remember how long it took from asleep at ``level`` to ready. Only the newest few are kept."""
        kind = {"model": model, "engine": engine, "device": device, "args_hash": args_hash, "level": level}

        def work(conn: sqlite3.Connection) -> None:
            conn.execute(SQL["record_wake"], {**kind, "total_s": total_s, "at": at})
            conn.execute(SQL["forget_old_wakes"], {**kind, "limit": STARTS_KEPT})

        await self._db.write(work)

    async def estimate_wake(self, model: str, engine: str, device: str, args_hash: str, level: int) -> float | None:
        """Seconds until such a launch is awake: the median of the last five times, None when there was none."""
        kind = {"model": model, "engine": engine, "device": device, "args_hash": args_hash, "level": level}
        return median([row["total_s"] for row in await self._all("recent_wakes", **kind, limit=STARTS_COUNTED)])

    async def _run(self, name: str, values: Mapping[str, Any]) -> None:
        await self._db.write(lambda conn: conn.execute(SQL[name], values).rowcount)

    async def _all(self, name: str, **values: Any) -> Sequence[sqlite3.Row]:
        return await self._db.read(lambda conn: conn.execute(SQL[name], values).fetchall())

    async def _one(self, name: str, **values: Any) -> sqlite3.Row | None:
        found = await self._all(name, **values)
        return found[0] if found else None


def _refuse_replay(conn: sqlite3.Connection, idempotency: tuple[str, str, str]) -> None:
    owner, key, _ = idempotency
    found = conn.execute(SQL["remembered_key"], {"owner_id": owner, "key": key}).fetchone()
    if found is not None:
        raise IdempotentReplay(found["launch_id"], found["request_hash"])


def _forget(conn: sqlite3.Connection, launch_id: str) -> int:
    conn.execute(SQL["hand_keys_on"], {"id": launch_id})
    return conn.execute(SQL["delete_launch"], {"id": launch_id}).rowcount


def _append(
    conn: sqlite3.Connection,
    launch_id: str,
    attempt: int,
    at: float,
    event: str,
    frm: Phase | None,
    to: Phase,
    detail: Mapping[str, Any],
) -> EventView:
    told = dict(detail) if to.why is None else {"why": to.why.value, **detail}
    view = EventView(0, launch_id, attempt, at, event, None if frm is None else frm.state.value, to.state.value, told)
    cursor = conn.execute(SQL["insert_event"], {**asdict(view), "detail": dump(told)})
    return replace(view, seq=int(cursor.lastrowid or 0))


def _attempt(conn: sqlite3.Connection, launch_id: str, attempt: int) -> AttemptRow | None:
    row = conn.execute(SQL["attempt"], {"launch_id": launch_id, "attempt": attempt}).fetchone()
    return None if row is None else to_attempt(row)


def _launch(conn: sqlite3.Connection, launch_id: str) -> LaunchRow | None:
    row = conn.execute(SQL["launch"], {"id": launch_id}).fetchone()
    return None if row is None else to_launch(row)
