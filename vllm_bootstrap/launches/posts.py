"""What an attempt tells the launch's owner. PURE values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_bootstrap.launches.ending import Outcome
from vllm_bootstrap.launches.lifecycle import Event


@dataclass(frozen=True, slots=True)
class Post:
    """A fact for the owner: an event of the lifecycle with its attempt, and what belongs to it. ``residues``: what a
    launch that sleeps still uses, in bytes by GPU."""

    attempt: int
    event: Event | None = None
    outcome: Outcome | None = None
    unresponsive: bool | None = None
    detail: dict[str, object] = field(default_factory=dict)
    residues: Mapping[str, int] = field(default_factory=dict)
