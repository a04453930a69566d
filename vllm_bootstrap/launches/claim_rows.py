"""Claims on GPUs inside a transaction: taken, parked while a launch sleeps, taken again.

Invariant: the schema's triggers have the last word on what fits; what they refuse becomes ``GpuConflict``. Nothing
here begins or ends a transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_bootstrap.db import load_queries
from vllm_bootstrap.errors import GpuConflict
from vllm_bootstrap.gpus.ledger import Claim
from vllm_bootstrap.launches.records import LaunchRow
from vllm_bootstrap.launches.rows import to_claim

SQL = load_queries(Path(__file__).with_name("queries.sql"))


def claim(conn: sqlite3.Connection, row: LaunchRow, claims: Sequence[Claim]) -> None:
    """Take GPUs for a launch. Raises ``GpuConflict`` naming the owners."""
    for each in claims:
        where = {"node_id": row.node_id, "gpu_uuid": each.uuid}
        what = {"owner_id": row.id, "share_milli": each.share_milli, "shared": each.shared}
        try:
            conn.execute(SQL["insert_claim"], {**where, **what})
        except sqlite3.IntegrityError as exc:
            if not str(exc).startswith("gpu_conflict"):
                raise
            owners = [found["owner_id"] for found in conn.execute(SQL["claim_owners"], where)]
            raise GpuConflict(
                f"GPU {each.uuid} is owned by {', '.join(owners)}.",
                param="gpu_ids",
                details={"gpus": [{"uuid": each.uuid, "owners": owners}]},
            ) from exc


def park(conn: sqlite3.Connection, row: LaunchRow, residues: Mapping[str, int]) -> None:
    """Turn what a launch holds into parked claims. ``residues``: bytes it still uses, by GPU."""
    held = conn.execute(SQL["claims_of"], {"owner_kind": "launch", "owner_id": row.id}).fetchall()
    conn.execute(SQL["release_claims"], {"owner_id": row.id})
    for each in held:
        conn.execute(SQL["park_claim"], {**dict(each), "residue_bytes": residues.get(each["gpu_uuid"], 0)})


def unpark(conn: sqlite3.Connection, row: LaunchRow) -> None:
    """Take again what a launch has parked. Raises ``GpuConflict``."""
    parked = conn.execute(SQL["claims_of"], {"owner_kind": "parked", "owner_id": row.id}).fetchall()
    conn.execute(SQL["release_claims"], {"owner_id": row.id})
    claim(conn, row, [to_claim(each) for each in parked])
