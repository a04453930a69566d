"""The stages of one request's journey. PURE.

Invariant: stages go forward only, but for a place in the scheduler that is lost, which leads back to ``QUEUED``.
"""

from __future__ import annotations

from enum import IntEnum

from vllm_bootstrap.gateway.inflight import State


class Stage(IntEnum):
    READING = 0
    QUEUED = 1
    CONNECTING = 2
    WAITING = 3
    RELAYING = 4
    TUNNEL = 5
    OVER = 6


# As plain names: looking a member up on its class costs more than a chunk's bookkeeping.
READING, QUEUED, CONNECTING, WAITING, RELAYING, TUNNEL, OVER = Stage

STATES: tuple[State, ...] = ("reading", "queued", "running", "running", "running", "running", "running")
"""What each is called where requests are listed."""
