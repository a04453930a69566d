"""Launches, attempts, history and claims as the columns of their tables, both ways. PURE: values in, values out.

Invariant: what was written is read back equal. A state that the schema does not name is kept as another one with a
step: a launch that falls asleep as ready, one that wakes as asleep (see the migrations).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from vllm_bootstrap.gpus.ledger import Claim
from vllm_bootstrap.launches.lifecycle import Phase, State, Why
from vllm_bootstrap.launches.records import AttemptRow, LaunchRow
from vllm_bootstrap.launches.types import EventView

Row = Any  # sqlite3.Row: a mapping by column name, which mypy does not take it for
_LAUNCH_JSON = ("spec", "labels", "restart", "placement", "failure", "transitions")
_ATTEMPT_JSON = ("handle", "engine", "baseline", "placement", "endpoint", "exit", "sleep")
_STEPS: Mapping[State, State] = {State.FALLING_ASLEEP: State.READY, State.WAKING: State.ASLEEP}


def stored_phase(prefix: str, phase: Phase) -> dict[str, str | None]:
    """The columns ``state``, ``step`` and ``why``, with ``prefix`` before their names."""
    return {
        f"{prefix}state": _STEPS.get(phase.state, phase.state).value,
        f"{prefix}step": phase.state.value if phase.state in _STEPS else None,
        f"{prefix}why": phase.why and phase.why.value,
    }


def launch_values(row: LaunchRow) -> dict[str, Any]:
    values = {f.name: getattr(row, f.name) for f in fields(row) if f.name != "phase"}
    values.update({name: dump(values[name]) for name in _LAUNCH_JSON})
    return {**values, **stored_phase("", row.phase)}


def to_launch(row: Row) -> LaunchRow:
    values = dict(row)
    state, why, step = (values.pop(name) for name in ("state", "why", "step"))
    values.update({name: _load(values[name]) for name in _LAUNCH_JSON})
    return LaunchRow(phase=Phase(State(step or state), None if why is None else Why(why)), **values)


def attempt_values(row: AttemptRow) -> dict[str, Any]:
    values = asdict(row)
    return {**values, **{name: dump(values[name]) for name in _ATTEMPT_JSON}}


def to_attempt(row: Row) -> AttemptRow:
    values = dict(row)
    return AttemptRow(**{**values, **{name: _load(values[name]) for name in _ATTEMPT_JSON}})


def to_event(row: Row) -> EventView:
    return EventView(**{**dict(row), "detail": _load(row["detail"])})


def to_claim(row: Row) -> Claim:
    return Claim(row["gpu_uuid"], row["share_milli"], bool(row["shared"]))


def phase_name(phase: Phase) -> str:
    return phase.state.value if phase.why is None else f"{phase.state.value} ({phase.why.value})"


def dump(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _load(text: str | None) -> Any:
    return None if text is None else json.loads(text)
