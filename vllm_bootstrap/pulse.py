"""When looks that come again and again are due: at the same moments for all of them. PURE.

Invariant: between two pulses of a period lies that period, and pulses of periods that are multiples of each other fall
together. A daemon that has nothing to do wakes once for all its looks then, with warm caches, instead of once for each.
"""

from __future__ import annotations


def until_pulse(period_s: float, now: float) -> float:
    """Seconds from ``now`` to the next pulse, at least half a period: who wakes a moment early does not look twice.
    ``now`` is of any clock that never goes back, the same one for all."""
    left = period_s - now % period_s
    return left if 2 * left > period_s else left + period_s
