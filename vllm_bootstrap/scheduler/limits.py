"""What one key may do at once and per minute. PURE: time is an input.

Invariant: within any 60 seconds no more requests of a key are accepted than it has ``requests_per_minute``, and never
more than ``max_parallel`` of them are queued or running; both exactly, however many arrive together. A request that
is refused costs nothing. Nothing here knows queues, engines or HTTP.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import ceil

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import ConcurrencyLimit, TooManyRequests

WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class RateState:
    """What a key has left of its requests per minute. ``reset_s``: until the window is empty again."""

    limit: int
    remaining: int
    reset_s: float

    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """The ``x-ratelimit-*`` headers OpenAI clients know."""
        return (
            (b"x-ratelimit-limit-requests", b"%d" % self.limit),
            (b"x-ratelimit-remaining-requests", b"%d" % self.remaining),
            (b"x-ratelimit-reset-requests", b"%ds" % ceil(self.reset_s)),
        )


class KeyLimits:
    """Counts of all keys. Keys without limits cost one dictionary look-up."""

    def __init__(self) -> None:
        self._accepted: dict[str, deque[float]] = {}
        self._parallel: dict[str, int] = {}

    def check(self, principal: Principal, now: float) -> None:
        """Raise if one more request of ``principal`` would break its limits. Changes nothing."""
        most = principal.max_parallel
        if most is not None and self._parallel.get(principal.name, 0) >= most:
            raise ConcurrencyLimit(f"This key may run {most} requests at once and does", retry_after=1)
        rate = principal.requests_per_minute
        if rate is not None:
            recent = self._recent(principal.name, now)
            if len(recent) >= rate:
                # The place of the rate-th last request becomes free first; the limit may have been lowered meanwhile.
                wait = (recent[len(recent) - rate] + WINDOW_S - now) if rate else WINDOW_S
                raise TooManyRequests(f"This key may send {rate} requests a minute and has", retry_after=wait)

    def enter(self, principal: Principal, now: float) -> None:
        """Count one accepted request."""
        self._parallel[principal.name] = self._parallel.get(principal.name, 0) + 1
        if principal.requests_per_minute is not None:
            self._recent(principal.name, now).append(now)

    def leave(self, name: str) -> None:
        """One request of the key ``name`` has ended."""
        left = self._parallel[name] - 1
        if left:
            self._parallel[name] = left
        else:
            del self._parallel[name]

    def rate(self, principal: Principal, now: float) -> RateState | None:
        """What is left of the key's minute, None for a key without that limit."""
        limit = principal.requests_per_minute
        if limit is None:
            return None
        recent = self._recent(principal.name, now)
        reset = recent[-1] + WINDOW_S - now if recent else 0.0
        return RateState(limit, max(0, limit - len(recent)), reset)

    def parallel(self, name: str) -> int:
        """Requests of the key ``name`` that are queued or running."""
        return self._parallel.get(name, 0)

    def _recent(self, name: str, now: float) -> deque[float]:
        times = self._accepted.setdefault(name, deque())
        while times and times[0] <= now - WINDOW_S:
            times.popleft()
        return times
