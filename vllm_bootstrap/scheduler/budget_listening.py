"""When batch pauses, so that realtime can be heard alone. PURE.

Invariant: once the baseline is firm, batch does not pause again for ``REST`` times as long as it cost it to run out,
from that moment on. Before there is any, it has next to nothing to lose.

A pause has two parts. First what runs of batch has to end. What has begun to answer is waited for: that takes as long
as batch answers are, and costs the places that become free meanwhile. What has not is taken back, and what was done of
it is lost, as much as a batch answer is long. Then realtime's answers are timed. One long answer must not keep a whole
engine waiting: after a while, few count as none, and then it is given up.
"""

from __future__ import annotations

import math

from vllm_bootstrap.scheduler.budget_baseline import GOOD_SAMPLES, Baseline

# How long realtime is listened to, or half as long as it took until that was possible; and how soon again.
LISTEN_S, LISTEN_EVERY_S = 5.0, 60.0
# How long batch is given to run out: until few are left, and at all. Few is this part of the slots, rounded.
DRAIN_S, PATIENCE_S, FEW, REST = 30.0, 120.0, 1 / 32, 5
# What realtime is like alone depends on how much of it there is: listen anew when arrivals are so many times closer
# together or further apart than they were.
PACE_CHANGED, LISTEN_ANEW_S = math.log(2), 20.0


class Listening:
    """``until``: when the pause is over at the latest. ``answer_s``: how long batch answers take, lately; whoever sees
    them end says so. Paces are logarithms of the seconds between two arrivals."""

    def __init__(self, baseline: Baseline) -> None:
        self._baseline = baseline
        self.until = self._began_at = self._again_at = self._rest_until = -math.inf
        self.answer_s = 0.0
        self._draining = False
        self._known_pace: float | None = None

    def wants_silence(self, now: float) -> bool:
        return now < self.until and not self._baseline.knows(now, GOOD_SAMPLES)

    def arrived(self, pace: float | None, batch: int, now: float) -> None:
        """A realtime request arrived beside so many batch sequences: a pause may begin."""
        baseline = self._baseline
        if now < self.until or now < self._rest_until:
            return
        if now >= self._again_at and not baseline.knows(now):
            pass
        elif now >= baseline.again_at:
            baseline.confirm()
        elif now >= self._began_at + LISTEN_ANEW_S and self._pace_changed(pace):
            baseline.replace()
        else:
            return
        # Not again, unless a first byte shows that realtime has any to time.
        self._began_at, self._known_pace, self._again_at = now, pace, math.inf
        self._draining = True
        self.until = now + PATIENCE_S
        self._rest_until = self.until if baseline.median_s is None else self.until + REST * PATIENCE_S
        if not batch:
            self.ran_out(now)

    def ran_out(self, now: float) -> None:
        """No batch runs any more."""
        if self._draining and now < self.until:
            took_s = now - self._began_at
            self._draining, self.until = False, now + max(LISTEN_S, took_s / 2)
            self._rest_until = now + REST * max(took_s, self.answer_s) if self._baseline.firm else now

    def idle(self, now: float) -> None:
        """Realtime was idle before it arrived now: batch has filled the engine again instead of running out."""
        if self._draining and now < self.until:
            self._draining, self.until = False, now
            self._rest_until = now + REST * (now - self._began_at) if self._baseline.firm else now
            if self._again_at < math.inf:  # else it has shown no first byte
                self._again_at = now

    def began(self, now: float) -> None:
        """Realtime has a first byte: what it is like alone can be timed."""
        self._again_at = min(self._again_at, now + LISTEN_EVERY_S)

    def heard(self, pace: float | None) -> None:
        """An answer that began alone was heard while realtime came at this pace."""
        self._known_pace = pace

    def alone(self, batch: int, slots: int, now: float) -> bool:
        """Whether an answer that began beside so many batch sequences counts as one that began alone."""
        if not batch:
            return True
        if not self.wants_silence(now) or now < self._began_at + DRAIN_S or batch > int(slots * FEW + 0.5):
            return False
        self.ran_out(now)
        return True

    def _pace_changed(self, lately: float | None) -> bool:
        if self._baseline.median_s is None or self._known_pace is None or lately is None:
            return False
        return abs(lately - self._known_pace) > PACE_CHANGED
