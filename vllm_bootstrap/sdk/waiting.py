"""The decisions of waiting for a launch or a batch and of following a stream across interruptions. No input or output.

Invariant: a daemon that is restarted under a client (its launches go on) looks like a pause, not like an end; one
that stays away is an error after ``RESTART_PATIENCE_S``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from vllm_bootstrap.sdk.failures import DaemonUnreachable, EndTimeout, LaunchFailed, WaitTimeout
from vllm_bootstrap.wire import LaunchGroup, LaunchStatus

RESTART_PATIENCE_S = 60.0
FIRST_POLL_S, SLOWEST_POLL_S = 0.1, 0.5
ENDED = frozenset({"stopped", "failed"})

SLOWEST_BATCH_POLL_S = 2.0

T = TypeVar("T")
OnProgress = Callable[[LaunchStatus], object]
Clock = Callable[[], float]


def is_over(status: LaunchStatus) -> bool:
    """Whether a launch has ended for good."""
    return status.state in ENDED


class Patience:
    """How long to put up with a daemon that does not answer any more. One that never did is an error at once."""

    def __init__(self, limit_s: float = RESTART_PATIENCE_S, clock: Clock = time.monotonic) -> None:
        self._limit_s, self._clock = limit_s, clock
        self._met = False
        self._since: float | None = None

    def answered(self) -> None:
        self._met, self._since = True, None

    def missed(self, error: DaemonUnreachable) -> float:
        """Seconds until the next try; raises ``error`` when it has been away too long."""
        if not self._met:
            raise error
        now = self._clock()
        self._since = now if self._since is None else self._since
        if now - self._since >= self._limit_s:
            raise error
        return SLOWEST_POLL_S


class ReadyWait:
    """One ``wait_ready``. The caller polls: ``saw`` or ``missed`` after each poll, then ``pause``."""

    def __init__(
        self, launch_id: str, timeout_s: float | None, on_progress: OnProgress | None, clock: Clock = time.monotonic
    ) -> None:
        self._launch_id, self._timeout_s, self._on_progress = launch_id, timeout_s, on_progress
        self._clock, self._began = clock, clock()
        self._patience = Patience(clock=clock)
        self._last: LaunchStatus | None = None
        self._poll_s = FIRST_POLL_S

    def saw(self, status: LaunchStatus) -> bool:
        """Whether the waiting is over. Raises ``LaunchFailed`` when the launch is."""
        self._patience.answered()
        self._last = status
        if self._on_progress is not None:
            self._on_progress(status)
        if is_over(status):
            raise LaunchFailed(status)
        return status.state == "ready"

    def saw_group(self, group: LaunchGroup) -> bool:
        """Whether every replica is ready. Raises ``LaunchFailed`` with the first one that has ended."""
        ready = [self._is_ready(status) for status in group.replicas]
        for status in group.replicas:
            if is_over(status):
                raise LaunchFailed(status)
        return all(ready)

    def _is_ready(self, status: LaunchStatus) -> bool:
        self._patience.answered()
        ready = status.state == "ready"
        if not ready:
            self._last = status
        if self._on_progress is not None:
            self._on_progress(status)
        return ready

    def missed(self, error: DaemonUnreachable) -> None:
        """The poll found nobody. Raises ``error`` when that lasts."""
        self._patience.missed(error)

    def pause(self) -> float:
        """Seconds until the next poll. Raises ``WaitTimeout``."""
        self._poll_s = min(SLOWEST_POLL_S, self._poll_s * 1.5)
        if self._timeout_s is None:
            return self._poll_s
        left = self._timeout_s - (self._clock() - self._began)
        if left <= 0:
            raise WaitTimeout(self._last, self._launch_id, self._timeout_s)
        return min(self._poll_s, left)


class EndWait(Generic[T]):
    """Waiting until something has ended, whatever way. The caller polls: ``saw`` or ``missed`` after each poll, then
    ``pause``. ``over`` says whether what was seen has ended; it may raise. ``slowest_s``: longest between polls."""

    def __init__(
        self,
        what: str,
        timeout_s: float | None,
        over: Callable[[T], bool],
        on_progress: Callable[[T], object] | None = None,
        clock: Clock = time.monotonic,
        slowest_s: float = SLOWEST_BATCH_POLL_S,
    ) -> None:
        self._what, self._timeout_s, self._over, self._on_progress = what, timeout_s, over, on_progress
        self._slowest_s = slowest_s
        self._clock, self._began = clock, clock()
        self._patience = Patience(clock=clock)
        self._poll_s = FIRST_POLL_S

    def saw(self, now: T) -> bool:
        """Whether the waiting is over."""
        self._patience.answered()
        if self._on_progress is not None:
            self._on_progress(now)
        return self._over(now)

    def missed(self, error: DaemonUnreachable) -> None:
        """The poll found nobody. Raises ``error`` when that lasts."""
        self._patience.missed(error)

    def left(self, most: float) -> float:
        """Seconds that are left, at most ``most``. Raises ``EndTimeout`` when there are none."""
        if self._timeout_s is None:
            return most
        left = self._timeout_s - (self._clock() - self._began)
        if left <= 0:
            raise EndTimeout(self._what, self._timeout_s)
        return min(most, left)

    def pause(self) -> float:
        """Seconds until the next poll. Raises ``EndTimeout``."""
        self._poll_s = min(self._slowest_s, self._poll_s * 1.5)
        return self.left(self._poll_s)
