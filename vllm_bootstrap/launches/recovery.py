"""What became of a launch while no daemon watched: facts in, one finding out. PURE.

The decision tree of ``find`` (every stored launch resolves to exactly one case):

1. external engine: nothing of ours can have died → ``Continue``
2. no shim was ever stored for this attempt: nothing was told to start → ``Again`` (``Finished`` while stopping)
3. other boot id: the machine was restarted, every pid is a stranger's → ``Lost(host_rebooted)``
4. the shim lives → ``Continue`` with it
5. the shim left an exit record → ``Finished``
6. the shim is gone without a record and the engine was never seen started → ``Again`` (``Finished`` while stopping)
7. the shim is gone without a record → ``Lost(shim_lost)``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_bootstrap.engines.base import FailureClass, LaunchSpec
from vllm_bootstrap.launches.types import ExitRecord, ProcessIdentity, ShimHandle


@dataclass(frozen=True, slots=True)
class Continue:
    """The engine may be alive: go on where the earlier daemon was."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The engine ended; this is how."""

    record: ExitRecord


@dataclass(frozen=True, slots=True)
class Lost:
    """Nobody can say how it ended."""

    failure_class: FailureClass
    message: str


@dataclass(frozen=True, slots=True)
class Again:
    """Nothing had been started: the attempt is begun anew, under the next number."""


Finding = Continue | Finished | Lost | Again


@dataclass(frozen=True, slots=True)
class Facts:
    external: bool
    stopping: bool
    handle: ShimHandle | None
    engine_seen: bool
    boot_id: str
    shim_alive: bool
    record: ExitRecord | None


def find(facts: Facts, *, now: float) -> Finding:
    """See the module's decision tree."""
    never_ran = ExitRecord(None, None, forced=False, stop_requested=True, ended_at=now)
    if facts.external:
        return Continue()  # 1
    if facts.handle is None:
        return Finished(never_ran) if facts.stopping else Again()  # 2
    if facts.handle.identity.boot_id != facts.boot_id:
        return Lost(FailureClass.HOST_REBOOTED, "The machine was restarted while this launch was running.")  # 3
    if facts.shim_alive:
        return Continue()  # 4
    if facts.record is not None:
        return Finished(facts.record)  # 5
    if not facts.engine_seen:
        return Finished(never_ran) if facts.stopping else Again()  # 6
    message = "The process that supervised the engine was gone when the daemon came back."
    return Lost(FailureClass.SHIM_LOST, message)  # 7


def spec_of(stored: Mapping[str, Any]) -> LaunchSpec:
    """A launch's spec from its stored form, which may be older than some of the fields."""
    return LaunchSpec(**{**stored, "aliases": tuple(stored.get("aliases", ()))})


def handle_of(stored: Mapping[str, Any] | None) -> ShimHandle | None:
    """A shim handle from its stored form."""
    if stored is None:
        return None
    identity = ProcessIdentity(**stored["identity"])
    return ShimHandle(**{**stored, "identity": identity})
