"""Launches, attempts, history, claims on GPUs and what is remembered for later starts, in SQLite.

Invariants: a state and its history row change in one transaction; GPUs are claimed with the launch that wants them
and given back no later than it ends; what a method returned is on disk. The schema's triggers hold these once more.

It decides nothing: states come from ``lifecycle``, claims from ``placement``. It knows no processes and no clock.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from vllm_bootstrap.db import Database, load_queries
from vllm_bootstrap.errors import Conflict, GpuConflict
from vllm_bootstrap.gpus.ledger import Claim
from vllm_bootstrap.launches.lifecycle import TERMINAL, Phase, State, Why, owns_gpus
from vllm_bootstrap.launches.records import AttemptRow, IdempotentReplay, LaunchRow, NewLaunch, StaleTransition
from vllm_bootstrap.launches.types import EventView

__all__ = ["AttemptRow", "Claim", "IdempotentReplay", "LaunchRow", "LaunchStore", "NewLaunch", "StaleTransition"]

SQL = load_queries(Path(__file__).with_name("queries.sql"))
STARTS_COUNTED, STARTS_KEPT = 5, 20
LARGEST_SEQ = 2**63 - 1  # callers may ask for more than SQLite can count
NO_DETAIL: Mapping[str, Any] = {}

# Named here because the class has a method called list.
Launches = list[LaunchRow]
Unfinished = list[tuple[LaunchRow, AttemptRow | None]]
Events = list[EventView]
LaunchIds = list[str]
_LAUNCH_JSON = ("spec", "labels", "restart", "placement", "failure", "transitions")
_ATTEMPT_JSON = ("handle", "engine", "baseline", "placement", "endpoint", "exit")
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
                conn.execute(SQL["insert_launch"], _launch_values(stored))
                _claim(conn, row, claims)
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
        new_attempt: int | None = None,
    ) -> EventView:
        """Move a launch from ``frm`` to ``to``, with its history row.

        ``failure`` None keeps the stored one, but becoming ready clears it. Claims are released when ``to`` is
        terminal or ``release_claims``. ``new_attempt`` begins the next attempt; the history row still speaks of
        ``attempt``. Raises ``StaleTransition`` when the launch is not in ``frm`` and ``attempt``.
        """

        def work(conn: sqlite3.Connection) -> EventView:
            row = _launch(conn, launch_id)
            if row is None or (row.phase, row.attempt) != (frm, attempt):
                found = None if row is None else f"{_phase_name(row.phase)} in attempt {row.attempt}"
                raise StaleTransition(launch_id, f"{_phase_name(frm)} in attempt {attempt}", found)
            if release_claims or not owns_gpus(to):
                conn.execute(SQL["release_claims"], {"owner_id": launch_id})
            kept = None if to.state is State.READY else row.failure
            conn.execute(SQL["move_launch"], {
                "id": launch_id, "attempt": attempt, "at": at,
                "from_state": frm.state.value, "from_why": frm.why and frm.why.value,
                "to_state": to.state.value, "to_why": to.why and to.why.value,
                "new_attempt": attempt if new_attempt is None else new_attempt,
                "ended_at": at if to.state in TERMINAL else None,
                "failure": _dump(kept if failure is None else failure),
                "transitions": _dump({**row.transitions, to.state.value: at}),
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
            values = asdict(row)
            conn.execute(SQL["save_attempt"], {**values, **{name: _dump(values[name]) for name in _ATTEMPT_JSON}})
            return row

        return await self._db.write(work)

    async def attempts(self, launch_id: str) -> list[AttemptRow]:
        """All attempts of a launch, oldest first."""
        return [_to_attempt(row) for row in await self._all("attempts", launch_id=launch_id)]

    async def get(self, launch_id: str) -> LaunchRow | None:
        row = await self._one("launch", id=launch_id)
        return None if row is None else _to_launch(row)

    async def group(self, group_id: str) -> Launches:
        """The launches that share a group id, oldest first."""
        return [_to_launch(row) for row in await self._all("group_members", group_id=group_id)]

    async def list(self, *, active_only: bool = True, after: str | None = None, limit: int = 100) -> Launches:
        """Launches, newest first, beginning behind the id ``after``."""
        name = "active_launches_newest_first" if active_only else "launches_newest_first"
        return [_to_launch(row) for row in await self._all(name, after=after, limit=limit)]

    async def unfinished(self) -> Unfinished:
        """This node's launches that have not ended, oldest first, each with the row of its current attempt where one
        was stored: what a new daemon has to look after."""

        def work(conn: sqlite3.Connection) -> Unfinished:
            rows = [_to_launch(row) for row in conn.execute(SQL["unfinished_launches"], {"node_id": self._node_id})]
            return [(row, _attempt(conn, row.id, row.attempt)) for row in rows]

        return await self._db.read(work)

    async def placement(self, launch_id: str) -> Mapping[str, Any] | None:
        """What was stored with the launch when its GPUs were claimed."""
        row = await self.get(launch_id)
        return None if row is None else row.placement

    async def claims(self) -> dict[str, tuple[Claim, ...]]:
        """This node's claims by owner, as ``Ledger.restore`` takes them."""
        held: dict[str, tuple[Claim, ...]] = {}
        for row in await self._all("claims", node_id=self._node_id):
            claim = Claim(row["gpu_uuid"], row["share_milli"], bool(row["shared"]))
            held[row["owner_id"]] = (*held.get(row["owner_id"], ()), claim)
        return held

    async def events(self, launch_id: str, after_seq: int = 0, limit: int = 1000) -> Events:
        """History rows of a launch behind ``after_seq``, oldest first."""
        rows = await self._all("events", launch_id=launch_id, after_seq=min(after_seq, LARGEST_SEQ), limit=limit)
        return [_to_event(row) for row in rows]

    async def group_events(self, group_id: str, after_seq: int = 0, limit: int = 1000) -> Events:
        """Likewise of all launches of a group."""
        rows = await self._all("group_events", group_id=group_id, after_seq=min(after_seq, LARGEST_SEQ), limit=limit)
        return [_to_event(row) for row in rows]

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
            conn.execute(SQL["record_start"], {**kind, "total_s": total_s, "phases": _dump(phases), "at": at})
            conn.execute(SQL["forget_old_starts"], {**kind, "limit": STARTS_KEPT})

        await self._db.write(work)

    async def estimate(self, model: str, engine: str, device: str, args_hash: str) -> float | None:
        """Seconds a start of this kind takes: the median of the last five, None when there was none."""
        kind = {"model": model, "engine": engine, "device": device, "args_hash": args_hash}
        totals = sorted(row["total_s"] for row in await self._all("recent_starts", **kind, limit=STARTS_COUNTED))
        # By hand: the statistics module would bring decimal and fractions into every daemon's memory.
        return (totals[(len(totals) - 1) // 2] + totals[len(totals) // 2]) / 2 if totals else None

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


def _claim(conn: sqlite3.Connection, row: LaunchRow, claims: Sequence[Claim]) -> None:
    for claim in claims:
        where = {"node_id": row.node_id, "gpu_uuid": claim.uuid}
        what = {"owner_id": row.id, "share_milli": claim.share_milli, "shared": claim.shared}
        try:
            conn.execute(SQL["insert_claim"], {**where, **what})
        except sqlite3.IntegrityError as exc:
            if not str(exc).startswith("gpu_conflict"):
                raise
            owners = [found["owner_id"] for found in conn.execute(SQL["claim_owners"], where)]
            raise GpuConflict(
                f"GPU {claim.uuid} is owned by {', '.join(owners)}.",
                param="gpu_ids",
                details={"gpus": [{"uuid": claim.uuid, "owners": owners}]},
            ) from exc


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
    cursor = conn.execute(SQL["insert_event"], {**asdict(view), "detail": _dump(told)})
    return replace(view, seq=int(cursor.lastrowid or 0))


def _attempt(conn: sqlite3.Connection, launch_id: str, attempt: int) -> AttemptRow | None:
    row = conn.execute(SQL["attempt"], {"launch_id": launch_id, "attempt": attempt}).fetchone()
    return None if row is None else _to_attempt(row)


def _launch(conn: sqlite3.Connection, launch_id: str) -> LaunchRow | None:
    row = conn.execute(SQL["launch"], {"id": launch_id}).fetchone()
    return None if row is None else _to_launch(row)


def _launch_values(row: LaunchRow) -> dict[str, Any]:
    values = {f.name: getattr(row, f.name) for f in fields(row) if f.name != "phase"}
    values.update({name: _dump(values[name]) for name in _LAUNCH_JSON})
    return {**values, "state": row.phase.state.value, "why": row.phase.why and row.phase.why.value}


def _to_launch(row: sqlite3.Row) -> LaunchRow:
    values = dict(row)
    phase = Phase(State(values.pop("state")), None if row["why"] is None else Why(row["why"]))
    del values["why"]
    values.update({name: _load(values[name]) for name in _LAUNCH_JSON})
    return LaunchRow(phase=phase, **values)


def _to_attempt(row: sqlite3.Row) -> AttemptRow:
    values = dict(row)
    return AttemptRow(**{**values, **{name: _load(values[name]) for name in _ATTEMPT_JSON}})


def _to_event(row: sqlite3.Row) -> EventView:
    return EventView(**{**dict(row), "detail": _load(row["detail"])})


def _phase_name(phase: Phase) -> str:
    return phase.state.value if phase.why is None else f"{phase.state.value} ({phase.why.value})"


def _dump(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _load(text: str | None) -> Any:
    return None if text is None else json.loads(text)
