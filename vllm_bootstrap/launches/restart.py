"""Shall a launch that ended be started again? Facts in, decision out. PURE.

Every input resolves to exactly one outcome:

1. policy ``never`` → no
2. the failure is permanent (a bad flag stays bad) → no
3. as many failures in a row as allowed → no
4. otherwise yes, after a delay that doubles with each failure in a row, up to a cap

A run that was ready for ``reset_s`` or longer clears the row: its own end is the first failure of a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NEVER = "never"


@dataclass(frozen=True, slots=True)
class RestartFacts:
    """``failures_in_a_row`` includes the one just seen; ``permanent`` as the engine's explanation says."""

    policy: str
    failures_in_a_row: int
    permanent: bool


@dataclass(frozen=True, slots=True)
class RestartLimits:
    """``max_attempts`` counts starts in a row, the first one included. Times in seconds."""

    max_attempts: int
    backoff_s: float
    backoff_max_s: float
    reset_s: float


@dataclass(frozen=True, slots=True)
class RestartDecision:
    """``delay_s`` is 0 when there is no restart. ``reason`` is plain English, for the history."""

    restart: bool
    delay_s: float
    reason: str


def failures_in_a_row(healthy_s: Sequence[float], reset_s: float) -> int:
    """Length of the row of failures that ends with the last run.

    ``healthy_s``: for each ended run, oldest first, the seconds it was ready (0 when it never was).
    """
    row = 0
    for seconds in reversed(healthy_s):
        row += 1
        if seconds >= reset_s:
            break
    return row


def decide(facts: RestartFacts, limits: RestartLimits) -> RestartDecision:
    """The decision tree of the module's docstring."""
    row = facts.failures_in_a_row
    if facts.policy == NEVER:
        return _no("the restart policy is never")  # 1
    if facts.permanent:
        return _no("the failure is permanent: the same start would fail again")  # 2
    if row >= limits.max_attempts:
        return _no(f"{row} starts in a row have failed, {limits.max_attempts} are allowed")  # 3
    delay = backoff(row, limits)
    return RestartDecision(
        restart=True, delay_s=delay, reason=f"failure {row} in a row, next start in {delay:g} s"
    )  # 4


def backoff(failures: int, limits: RestartLimits) -> float:
    """Seconds to wait after so many failures in a row (1 and up): doubling, capped."""
    # The exponent is bounded first: 2.0 ** 5000 overflows, and any sane cap is reached long before 60 doublings.
    return min(limits.backoff_s * 2.0 ** min(max(failures, 1) - 1, 60), limits.backoff_max_s)


def relaunch_after_reboot(policy: str) -> bool:
    """Whether a launch that was running when the machine went down is started again: any policy but ``never``."""
    return policy != NEVER


def _no(reason: str) -> RestartDecision:
    return RestartDecision(restart=False, delay_s=0.0, reason=reason)
