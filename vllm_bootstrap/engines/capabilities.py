"""Which flags a vLLM version has and how each takes its value, read from a recorded table. No process is started.

Invariant: a version between two recorded ones is treated as the nearest lower one, so a flag is never assumed before
it was seen. Which of the known flags a launch may use is not decided here (see ``policy``).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_bootstrap.engines.versions import Version, parse, show

DATA = Path(__file__).parent / "data"
OLDEST: Version = (0, 8, 0)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The flags of one vLLM. ``basis`` is the recorded version they come from; ``verified``: recorded from that very
    release as installed, not from its unpacked sources or from an older neighbour."""

    version: Version
    basis: Version
    verified: bool
    kinds: Mapping[str, str]

    def has(self, flag: str) -> bool:
        return flag in self.kinds

    def kind(self, flag: str) -> str | None:
        """How ``flag`` takes its value, None when this version does not have it."""
        return self.kinds.get(flag)


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((DATA / "vllm_flags.json").read_text())
    return table


def recorded_versions() -> list[Version]:
    """The versions whose flags are known, oldest first."""
    return [parse(text) for text in _table()["versions"]]


def known_flags() -> frozenset[str]:
    """Every flag that any recorded version has."""
    return frozenset(_table()["flags"])


@functools.lru_cache(maxsize=8)
def capabilities(version: Version) -> Capabilities:
    """The flags of ``version``. Raises ``ValueError`` when it is older than anything that is supported."""
    if version < OLDEST:
        raise ValueError(f"vLLM {show(version)} is too old: {show(OLDEST)} is the oldest that is supported")
    recorded = recorded_versions()
    basis = max((known for known in recorded if known <= version), default=recorded[0])
    kinds = {}
    for flag, changes in _table()["flags"].items():
        kind = [how for since, how in changes.items() if parse(since) <= basis]
        if kind and kind[-1] is not None:
            kinds[flag] = kind[-1]
    verified = version == basis and bool(_table()["versions"][show(basis)]["verified"])
    return Capabilities(version, basis, verified, kinds)


def lifetime(flag: str) -> str:
    """In words, which recorded versions have ``flag``: "vLLM 0.10.2 and newer"."""
    changes = _table()["flags"].get(flag)
    if changes is None:
        return "no recorded version of vLLM"
    first = next(iter(changes))
    gone = next((since for since, how in changes.items() if how is None), None)
    return f"vLLM {first} and newer" if gone is None else f"vLLM {first} up to before {gone}"
