"""How much of a launch batch may use right now. PURE: events with their time in, an allowance out.

Invariant: the allowance is between 0 and slots minus the realtime reserve; batch that waits is due after a minute
without any (``overdue``); and some seconds after the last realtime request the allowance is back at its top.

The allowance, the first case that applies (docs/scheduling.md has the reasons):

1. realtime is idle                 -> up from the cap, twice as much every quarter of a second, to all but the reserve
2. realtime is active, unknown yet  -> nothing, for some seconds, until its answers alone have been seen; and once more
                                       after the first of all, or where they began later than known
3. realtime is active               -> the least of
   a. what the engine's memory holds: less when its cache is nearly full or it preempts, slowly back up
   b. the slots that realtime and its reserve leave
   c. the cap, which follows the time to realtime's first byte against its own baseline (``budget_cap``)

Beside the number:

4. pacing: while realtime is active one batch prompt is let in after the other, not just before a realtime answer
   begins, and with rests where they make realtime late nevertheless (``budget_pacing``)
5. taking back: while realtime is active, what runs beyond one and a half times the allowance
6. the floor: batch has had too little for a minute   -> one request may go although realtime waits (``budget_floor``)

Nothing here knows clocks, engines or who the requests belong to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import log

from vllm_bootstrap.scheduler.budget_cap import SETTLE_S, Cap
from vllm_bootstrap.scheduler.budget_floor import Floor
from vllm_bootstrap.scheduler.budget_listening import Listening
from vllm_bootstrap.scheduler.budget_pacing import Pacing, grown, ratio
from vllm_bootstrap.scheduler.ports import BatchBudget, BudgetReport, EngineSignals

# Realtime counts as active for some of its usual pauses after its last sign of life, within bounds. Where it was
# thought idle and was not, the engine is full for as long as batch answers take: where that is long, for more of them.
PAUSES, LONGEST_HOLD_S, GAP_WEIGHT, MISJUDGED, ANSWER_WEIGHT = 4.0, 10.0, 0.125, 0.0025, 1 / 16
# The pace is the geometric mean of some thirty pauses: a single one does not move it far.
PACE_WEIGHT, SHORTEST_GAP_S = 1 / 32, 0.001
RAMP_S = 0.25
_QUICKEST = math.log(SHORTEST_GAP_S)
KV_FULL, KV_EASY = 0.95, 0.85
TOLD_REST_S = 1.0


@dataclass(frozen=True, slots=True)
class BudgetPolicy:
    """``reserve_share``: the part of all slots that is kept free for realtime to come. ``floor_share``: the part of
    the time for which batch that wants to runs, come what may. ``ttft_factor``: how much later than without batch a
    realtime answer may begin. ``idle_after_s``: the shortest time after its last sign of life that realtime counts as
    active. ``pacing``, ``cap``: whether cases 4 and 3c are in force (the bench measures without)."""

    reserve_share: float = 0.1
    floor_share: float = 0.05
    ttft_factor: float = 1.5
    idle_after_s: float = 2.0
    pacing: bool = True
    cap: bool = True


class Budget(BatchBudget):
    """The batch budget of one launch with ``slots`` sequence slots."""

    def __init__(self, policy: BudgetPolicy, slots: int) -> None:
        self._policy = policy
        self._cap = Cap(policy.ttft_factor)
        self._baseline = self._cap.baseline
        self._listening = Listening(self._baseline)
        self._floor = Floor(policy.floor_share)
        self._pacing = Pacing()
        self._slots = self._reserve = self._memory = 0
        self._realtime = self._batch = 0
        self._running: dict[int, float] = {}
        self._waits = False
        self._batch_over_at = -math.inf
        self._arrived_at: float | None = None
        self._gap_s = 0.0
        self._pauses = PAUSES
        self._hold_s = self._least_hold_s = min(policy.idle_after_s, LONGEST_HOLD_S)
        self._active_until = -math.inf
        # Logarithm of the seconds between two arrivals, lately.
        self._pace: float | None = None
        self._last = EngineSignals()
        self._step_s: float | None = None
        self._promotions = 0
        self.resize(slots)

    def resize(self, slots: int) -> None:
        self._slots = slots
        share = math.ceil(slots * self._policy.reserve_share)
        self._reserve = min(max(1, share), slots - 1) if slots > 1 else 0
        self._memory = slots - self._reserve

    # Realtime

    def realtime_arrived(self, now: float) -> None:
        arrived_at, self._arrived_at = self._arrived_at, now
        if arrived_at is not None:
            gap, hold_s, usual = now - arrived_at, self._hold_s, self._gap_s
            if gap < hold_s:  # else realtime was idle meanwhile
                pace, before = log(gap) if gap > SHORTEST_GAP_S else _QUICKEST, self._pace
                self._pace = pace if before is None else before + PACE_WEIGHT * (pace - before)
            else:
                gap = min(gap, LONGEST_HOLD_S)
                if not self._active(now):
                    self._listening.idle(now)
            self._gap_s = usual = usual + GAP_WEIGHT * (gap - usual)
            if hold_s != self._least_hold_s or self._pauses * usual > hold_s:
                self._hold_s = min(max(self._least_hold_s, self._pauses * usual), LONGEST_HOLD_S)
        self._listening.arrived(self._pace, self._batch, now)
        self._active_until = now + self._hold_s

    def realtime_granted(self, sequences: int, prompt_tokens: int, now: float) -> None:  # noqa: ARG002
        self._realtime += sequences
        baseline_s = self._baseline.median_s
        if baseline_s is not None:
            self._pacing.realtime(baseline_s, now)
        self._active_until = now + self._hold_s

    def realtime_began(self, ttft_s: float, now: float) -> None:
        self._active_until = now + self._hold_s
        listening = self._listening
        listening.began(now)
        usual_s = self._baseline.median_s
        if usual_s is not None:
            batch = self._batch > 0 or self._waits
            self._pacing.answered(now - ttft_s, ttft_s - usual_s, self._cap.is_late(ttft_s), now, batch=batch)
        if now >= listening.until:
            self._baseline.settle(now)
        if not listening.alone(self._batch, self._slots, now):
            self._cap.beside(ttft_s, self._batch, self._top, now)
        elif now - self._batch_over_at >= SETTLE_S:
            self._baseline.hear(ttft_s, now)
            listening.heard(self._pace)
            self._cap.recover(self._top, now)

    def realtime_ended(self, sequences: int, now: float) -> None:
        self._realtime = max(0, self._realtime - sequences)
        self._active_until = now + self._hold_s

    def _active(self, now: float) -> bool:
        return self._realtime > 0 or now < self._active_until

    # Batch

    def batch_granted(self, request: int, sequences: int, prompt_tokens: int, now: float) -> None:
        self._running[request] = now
        self._batch += sequences
        self._pacing.granted(request, prompt_tokens, now, beside=self._active(now))
        self._floor.runs(running=True, now=now)

    def batch_began(self, request: int, now: float) -> None:
        self._pacing.over(request, now)

    def batch_ended(self, request: int, sequences: int, now: float, *, worked: bool = True) -> None:
        granted_at = self._running.pop(request, None)
        if granted_at is not None and worked:
            self._batch_took(now - granted_at)
        self._batch = max(0, self._batch - sequences)
        self._pacing.over(request, now, worked=worked)
        self._pacing.wanted(now)
        if not self._running:
            self._batch_over_at = now
            self._listening.ran_out(now)
            self._floor.runs(running=False, now=now)

    def _batch_took(self, seconds: float) -> None:
        listening, gap_s = self._listening, self._gap_s
        before = listening.answer_s or seconds
        listening.answer_s = answer_s = before + ANSWER_WEIGHT * (seconds - before)
        if gap_s > 0 and answer_s > 0:
            # Where chance makes the pauses, e^-k of them are longer than k usual ones, and one that was misjudged is
            # felt by all requests within one batch answer.
            self._pauses = max(PAUSES, log(answer_s / gap_s / MISJUDGED))

    def batch_waits(self, waiting: bool, now: float) -> None:
        self._waits = waiting
        self._floor.waits(waiting, now)

    # The engine

    def signals(self, signals: EngineSignals, now: float) -> None:
        last, self._last = self._last, signals
        self._pacing.signals(last, signals)
        self._step_s = (
            ratio(
                grown(last.inter_token_seconds_sum, signals.inter_token_seconds_sum),
                grown(last.inter_token_count, signals.inter_token_count),
            )
            or self._step_s
        )
        usage = signals.kv_usage
        if (usage is not None and usage > KV_FULL) or grown(last.preemptions, signals.preemptions):
            self._memory = max(1, min(self._memory, self._batch or self._memory) * 4 // 5)
        elif usage is None or usage < KV_EASY:
            self._memory = min(self._slots - self._reserve, self._memory + max(1, self._slots // 16))
        # More waits inside the engine than the reserve is for: slots or cache are short there.
        if self._active(now) and signals.waiting is not None and signals.waiting > self._reserve:
            self._cap.shrink(now)

    # What batch may do

    @property
    def _top(self) -> int:
        return min(self._slots - self._reserve, self._memory)

    def allowance(self, now: float) -> int:
        top = self._top
        if not self._active(now):  # 1
            return min(top, self._ramp(now))
        if self._policy.cap and self._listening.wants_silence(now):  # 2
            return 0
        room = self._slots - self._reserve - self._realtime
        cap = self._cap.value(self._slots - self._reserve) if self._policy.cap else top
        return max(0, min(top, room, cap))  # 3

    def _ramp(self, now: float) -> int:
        full = self._slots - self._reserve
        steps = (now - self._active_until) / RAMP_S
        start = max(self._cap.value(full), full // 16, 1)
        return full if steps >= 16 or not self._policy.cap else min(full, start * 2 ** int(steps))

    def paced_until(self, now: float) -> float | None:
        if not self._policy.pacing or not self._active(now):
            return None
        until = self._pacing.until(now)  # 4
        return self._pacing.until(now, rest=False) if until is not None and self.overdue(now) else until

    def take_back(self, now: float) -> int:
        if not self._active(now) or not self._policy.cap:
            return 0
        allowance = self.allowance(now)
        return max(0, self._batch - allowance - allowance // 2)  # 5

    def overdue(self, now: float) -> bool:
        due = self._floor.due_at
        return due is not None and now >= due  # 6

    def promoted(self, now: float) -> None:  # noqa: ARG002
        self._promotions += 1

    def next_change(self, now: float) -> float | None:
        times = [self._floor.due_at, self.paced_until(now)]
        if not self._active(now):
            if self.allowance(now) < self._top:
                grows = self._active_until + RAMP_S * (int((now - self._active_until) / RAMP_S) + 1)
                times.append(grows if grows > now else grows + RAMP_S)  # rounding
        else:
            times += [self._listening.until] if self._realtime else [self._listening.until, self._active_until]
        return min((time for time in times if time is not None and time > now), default=None)

    def report(self, now: float) -> BudgetReport:
        return BudgetReport(
            slots=self._slots,
            reserve=self._reserve,
            allowance=self.allowance(now),
            batch_sequences=self._batch,
            realtime_sequences=self._realtime,
            reason=self._reason(now),
            ttft_baseline_s=self._baseline.median_s,
            ttft_recent_s=self._cap.recent_s,
            step_s=self._step_s,
            promotions=self._promotions,
        )

    def _reason(self, now: float) -> str:
        allowance, top = self.allowance(now), self._top
        if not self._active(now):
            if allowance < top:
                return "Realtime has just become idle: batch grows."
            if top < self._slots - self._reserve:
                return "Realtime is idle, but the engine's memory is full: batch is held back."
            return "Realtime is idle: batch may use all but the reserve."
        if allowance == 0 and now < self._listening.until:
            return "Realtime is active and not known yet: batch pauses while its answers are timed."
        if allowance == self._slots - self._reserve - self._realtime or allowance == 0:
            return "Realtime is active and leaves these slots."
        if allowance == top:
            return "Realtime is active, and the engine's memory holds no more batch."
        if self._policy.pacing and (rest_s := self._pacing.rest_s) >= TOLD_REST_S:
            return f"Realtime is active, and batch prompts make it late: after each, batch rests for {rest_s:.0f} s."
        return "Realtime is active: batch is held to what its answers bear."
