"""What is stored about launches, as plain values. PURE.

Times are unix seconds, sizes bytes. Dicts hold JSON values. Nothing here knows SQL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm_bootstrap.gpus.ledger import Claim
from vllm_bootstrap.launches.lifecycle import Phase


@dataclass(frozen=True, slots=True)
class LaunchRow:
    """A launch. ``transitions``: for each state, when it was entered last. ``ended_at`` is set exactly when the state
    is terminal. ``owner_id`` is the name of the key that made it, ``placement`` what its GPUs were when claimed."""

    id: str
    node_id: str
    owner_id: str
    group_id: str
    model: str
    engine: str
    served_model_name: str
    spec: Mapping[str, Any]
    phase: Phase
    attempt: int
    created_at: float
    changed_at: float
    labels: Mapping[str, str] = field(default_factory=dict)
    restart: Mapping[str, Any] = field(default_factory=dict)
    placement: Mapping[str, Any] | None = None
    ended_at: float | None = None
    failure: Mapping[str, Any] | None = None
    transitions: Mapping[str, float] = field(default_factory=dict)


class NewLaunch(NamedTuple):
    """A launch about to be stored, with what it owns; ``placement`` is stored with the row."""

    row: LaunchRow
    claims: Sequence[Claim] = ()
    placement: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """One start of a launch. ``handle`` finds the shim again, ``engine`` is the main process (pid, start_ticks,
    boot_id), ``baseline`` the memory in use on each GPU (by UUID) before the start, ``sleep`` how it sleeps (see
    ``sleep_facts``)."""

    launch_id: str
    attempt: int
    handle: Mapping[str, Any] | None = None
    engine: Mapping[str, Any] | None = None
    baseline: Mapping[str, int] = field(default_factory=dict)
    placement: Mapping[str, Any] | None = None
    endpoint: Mapping[str, Any] | None = None
    exit: Mapping[str, Any] | None = None
    sleep: Mapping[str, Any] | None = None
    started_at: float | None = None
    ready_at: float | None = None
    ended_at: float | None = None


class IdempotentReplay(Exception):
    """A create with this owner and Idempotency-Key was accepted before; ``launch_id`` is what it made.

    When ``request_hash`` differs from the new request's, the caller reused a key for another request.
    """

    def __init__(self, launch_id: str, request_hash: str) -> None:
        super().__init__(f"already accepted as {launch_id}")
        self.launch_id = launch_id
        self.request_hash = request_hash


class StaleTransition(Exception):
    """The stored launch is not in the phase and attempt the transition starts from: a bug in the caller, which is the
    launch's only writer. ``found`` is None when the launch does not exist."""

    def __init__(self, launch_id: str, expected: str, found: str | None) -> None:
        super().__init__(f"{launch_id}: expected {expected}, found {found or 'no such launch'}")
        self.launch_id = launch_id
        self.expected = expected
        self.found = found


def median(values: Sequence[float]) -> float | None:
    """The middle of some durations, None of none."""
    # By hand: the statistics module would bring decimal and fractions into every daemon's memory.
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2 if ordered else None
