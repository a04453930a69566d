"""Scopes as a table: what each one allows, and the one question asked of it. PURE.

Invariant: ``admin`` allows everything; any other scope allows what a rule names and nothing more. The table in
docs/api.md is made from ``SCOPES`` (a test fails when it is stale).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ADMIN = "admin"
REALTIME = "realtime"
BATCH = "batch"
UPLOAD = "upload"
EVAL = "eval"
MONITOR = "monitor"
LOGS = "logs"


@dataclass(frozen=True, slots=True)
class Scope:
    """``built`` False: a key may carry the scope, but no route grants anything for it yet."""

    name: str
    allows: str
    built: bool = True


SCOPES: Mapping[str, Scope] = {
    scope.name: scope
    for scope in (
        Scope(ADMIN, "everything, among it launching, stopping and deleting launches, and the catalogue of models"),
        Scope(REALTIME, "inference in the realtime class"),
        Scope(
            BATCH,
            "inference in the batch class; upload batch inputs; create, read, pause, resume, cancel, retry own batches "
            "and read their files",
        ),
        Scope(UPLOAD, "own files: upload, list, read, delete; own adapters: upload, list, delete"),
        Scope(EVAL, "evaluation tasks", built=False),
        Scope(
            MONITOR,
            "status, launches, models, GPUs, queues, requests and their history, metrics, API description, dashboard "
            "data",
        ),
        Scope(LOGS, "engine logs and the log lines inside a failure (they can hold prompts)"),
    )
}

ALL = frozenset(SCOPES)
INFERENCE = frozenset({REALTIME, BATCH})


def allows(have: frozenset[str], needed: frozenset[str]) -> bool:
    """Whether a key with the scopes ``have`` may do what any one of ``needed`` allows."""
    return ADMIN in have or not have.isdisjoint(needed)


def describe(needed: frozenset[str]) -> str:
    """``needed`` in words, for a refusal: "the scope 'logs'" or "one of the scopes 'batch', 'realtime'"."""
    names = ", ".join(f"'{name}'" for name in sorted(needed))
    return f"the scope {names}" if len(needed) == 1 else f"one of the scopes {names}"


def table() -> str:
    """The scopes as a Markdown table, for the docs."""
    unbuilt = " (not built yet: grants nothing)"
    rows = [f"| `{s.name}` | {s.allows}{'' if s.built else unbuilt} |" for s in SCOPES.values()]
    return "\n".join(["| scope | allows |", "| --- | --- |", *rows])
