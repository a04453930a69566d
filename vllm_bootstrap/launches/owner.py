"""The one task that owns a launch. All others post facts or ask for outcomes; only this one advances the state.

Invariant: ``phase`` changes only through ``lifecycle.advance``, and each change is written with its history row in
one transaction. Facts of an attempt that is over are dropped. Effects that protect (withdrawing from traffic, killing)
come before the write, effects that give away (GPUs, a new attempt) after it, so that neither a full disk nor a crash
in between gives a GPU to two owners or leaves an engine running that should die.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_bootstrap.engines.base import Engine, Failure, FailureClass, LaunchSpec, Placement
from vllm_bootstrap.errors import ApiError, Conflict, GpuConflict, SleepFailed, WakeFailed
from vllm_bootstrap.gpus.ledger import Ledger, LedgerConflict
from vllm_bootstrap.launches import lifecycle, restart
from vllm_bootstrap.launches.attempt import Attempt
from vllm_bootstrap.launches.durably import durably
from vllm_bootstrap.launches.ending import Outcome, explain_end
from vllm_bootstrap.launches.lifecycle import Event, State, Why
from vllm_bootstrap.launches.posts import Post
from vllm_bootstrap.launches.spec_hash import args_hash, device_name
from vllm_bootstrap.launches.store import NO_RESIDUES, AttemptRow, LaunchRow, LaunchStore
from vllm_bootstrap.launches.types import EventView, StopOutcome

log = logging.getLogger(__name__)

# Several workers may each print a traceback after the line that tells the cause.
LOG_LINES_READ = 1500


@dataclass(frozen=True, slots=True)
class StopWish:
    """Somebody wants the launch gone. Not bound to an attempt."""

    force: bool


@dataclass(frozen=True, slots=True)
class RestWish:
    """Somebody wants the launch asleep (``level`` 1 or 2) or awake (0). ``done``: why not, or None, once known."""

    level: int
    done: asyncio.Future[ApiError | None]


@dataclass(frozen=True, slots=True)
class BackoffOver:
    attempt: int


@dataclass(frozen=True, slots=True)
class Broken:
    """The attempt's own task failed: a bug or a dead disk, never something an engine did."""

    cause: BaseException


@dataclass(frozen=True, slots=True)
class OwnerDeps:
    """``claims``: where claims are parked and taken again. ``make_attempt(owner, number)`` builds a fresh attempt.
    ``on_change``: anything readers see has changed. ``on_event``: a history row was written. ``on_ended``: terminal;
    claims are gone from the database."""

    store: LaunchStore
    claims: Ledger
    limits: restart.RestartLimits
    make_attempt: Callable[[LaunchOwner], Awaitable[Attempt]]
    on_change: Callable[[LaunchOwner], None]
    on_event: Callable[[EventView], None]
    on_ended: Callable[[LaunchOwner], None]


class LaunchOwner:
    """``dead``: nothing of the current attempt lives and its GPUs are settled or given up, written down or not.
    ``ended``: the launch is terminal and that is on disk."""

    def __init__(self, deps: OwnerDeps, row: LaunchRow, spec: LaunchSpec, placement: Placement, engine: Engine) -> None:
        self.row, self.spec, self.placement, self.engine = row, spec, placement, engine
        self.attempt: Attempt | None = None
        self.unresponsive = False
        self.withdrawn = False  # its end is certain, though it may not be written down yet
        self._stop_wished = False
        self.next_attempt_at: float | None = None
        self.outcome: Outcome | None = None
        self.dead = asyncio.Event()
        self.ended = asyncio.Event()
        self._deps = deps
        self._name = f"launch {row.id}"
        self._inbox: asyncio.Queue[Post | StopWish | RestWish | BackoffOver | Broken] = asyncio.Queue()
        self._rest_wish: RestWish | None = None
        self._journey: asyncio.Task[None] | None = None
        self._backoff: asyncio.TimerHandle | None = None

    @property
    def phase(self) -> lifecycle.Phase:
        return self.row.phase

    @property
    def heading_for(self) -> lifecycle.Phase:
        """What traffic is told: ``phase``, or where the wish to stop will take it as soon as the task comes to that."""
        return lifecycle.advance(self.phase, Event.STOP_REQUESTED) if self._stop_wished else self.phase

    # -- what others may ask ------------------------------------------------------------------------------------

    def wish_stop(self, *, force: bool) -> None:
        """Ask for the end without waiting. It begins at once, also while the task waits for a full disk. Idempotent."""
        self._stop_wished = True  # before anybody hears of it: who is turned away now is told why
        self._withdraw()
        if self.attempt is not None:
            self.attempt.request_stop(force=force)
        self._inbox.put_nowait(StopWish(force))

    async def rest(self, level: int) -> None:
        """Fall asleep at ``level``, or wake (0); returns when it has. Raises ``Conflict`` when it is not in the state
        for it or did not get there, ``GpuConflict`` when its GPUs are others' by now. Cancelling the caller changes
        nothing."""
        wish = RestWish(level, asyncio.get_running_loop().create_future())
        self._inbox.put_nowait(wish)
        ended = asyncio.ensure_future(self.ended.wait())
        either: set[asyncio.Future[Any]] = {wish.done, ended}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        why = wish.done.result() if wish.done.done() else Conflict(f"Launch {self.row.id} has ended meanwhile.")
        if why is not None:
            raise why

    async def stopped(self) -> StopOutcome:
        """Wait for the end. Cancelling the caller does not cancel the stop."""
        await self.ended.wait()
        return self.stop_outcome()

    def stop_outcome(self) -> StopOutcome:
        outcome = self.outcome
        return StopOutcome(
            self.row.id,
            self.phase.state.value,
            outcome.forced if outcome else None,
            outcome.unsettled if outcome else (),
        )

    # -- the task -----------------------------------------------------------------------------------------------

    async def run(self, first: Attempt) -> None:
        """Own the launch until it is terminal. Cancelled when the daemon leaves; the engine stays."""
        try:
            self._begin(first)
            while self.phase.state not in lifecycle.TERMINAL:
                await self._handle(await self._inbox.get())
        finally:
            if self._backoff is not None:
                self._backoff.cancel()
            if self._journey is not None and not self._journey.done():
                self._journey.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._journey
        self.ended.set()
        self._deps.on_ended(self)

    def post(self, post: Post) -> None:
        """Where attempts put their facts."""
        if post.outcome is not None:
            self.dead.set()
        if post.event in {Event.MAIN_EXITED, Event.SHIM_LOST} and post.attempt == self.row.attempt:
            self._withdraw()
        self._inbox.put_nowait(post)

    def _begin(self, attempt: Attempt) -> None:
        self.attempt, self.next_attempt_at, self._backoff = attempt, None, None
        self.withdrawn = False
        self.dead.clear()
        self._journey = asyncio.create_task(attempt.run(), name=f"attempt {self.row.id}/{attempt.number}")
        self._journey.add_done_callback(self._journey_over)
        attempt.rest(self.phase.state)  # where an earlier daemon had left it half asleep
        self._deps.on_change(self)

    def _journey_over(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (cause := task.exception()) is not None:
            self._inbox.put_nowait(Broken(cause))

    def _withdraw(self) -> None:
        if not self.ended.is_set():
            self.withdrawn = True
            self._deps.on_change(self)

    async def _handle(self, message: Post | StopWish | RestWish | BackoffOver | Broken) -> None:
        if isinstance(message, Broken):
            raise message.cause
        if isinstance(message, StopWish):
            await self._on_stop_wish(message)
        elif isinstance(message, RestWish):
            await self._on_rest_wish(message)
        elif lifecycle.is_stale(message.attempt, self.row.attempt):
            log.debug("launch %s: dropped a fact of attempt %d", self.row.id, message.attempt)
        elif isinstance(message, BackoffOver):
            if self.attempt is None:
                self._begin(await durably(self._name, lambda: self._deps.make_attempt(self)))
        elif message.outcome is not None:
            await self._on_released(message.outcome)
        elif message.unresponsive is not None:
            await self._on_unresponsive(unresponsive=message.unresponsive)
        elif message.event is not None:
            await self._on_event(message.event, message.detail, message.residues)

    async def _on_stop_wish(self, wish: StopWish) -> None:
        if self.attempt is not None:
            self.attempt.request_stop(force=wish.force)
        await self._on_event(Event.STOP_REQUESTED, {"force": wish.force})
        if self.attempt is None:  # between two attempts: nothing runs, nothing is to be waited for
            if self._backoff is not None:
                self._backoff.cancel()
            await self._on_released(Outcome(record=None, forced=False))

    async def _on_rest_wish(self, wish: RestWish) -> None:
        wanted = State.READY if wish.level else State.ASLEEP
        if self.phase.state is not wanted or self.withdrawn or self.unresponsive or self.attempt is None:
            state = "unresponsive" if self.unresponsive else self.phase.state.value
            wish.done.set_result(Conflict(f"Launch {self.row.id} is {state}, not {wanted.value}."))
            return
        if not wish.level:
            try:
                self._deps.claims.unpark(self.row.id)
            except LedgerConflict as exc:
                owned = [{"uuid": exc.uuid, "owners": list(exc.owners)}]
                wish.done.set_result(GpuConflict(f"Its GPU {exc}.", param="gpu_ids", details={"gpus": owned}))
                return
        self._rest_wish = wish
        detail: dict[str, object] = {"level": wish.level} if wish.level else {}
        await self._on_event(Event.SLEEP_BEGUN if wish.level else Event.WAKE_BEGUN, detail)
        self.attempt.rest(self.phase.state, wish.level)

    def _rest_over(self, event: Event, detail: Mapping[str, object]) -> None:
        wish, self._rest_wish = self._rest_wish, None
        if wish is None or wish.done.done():
            return
        reached = event in {Event.FELL_ASLEEP, Event.WOKE}
        why = detail.get("reason") or detail.get("message") or event.value
        failed = (SleepFailed if wish.level else WakeFailed)(
            f"Launch {self.row.id} is {self.phase.state.value}: {why}."
        )
        wish.done.set_result(None if reached else failed)

    async def _on_unresponsive(self, *, unresponsive: bool) -> None:
        if self.phase.state is not State.READY:
            return
        self.unresponsive = unresponsive
        self._deps.on_change(self)
        name = "unresponsive" if unresponsive else "responsive"
        log.warning("launch %s is %s", self.row.id, name)
        await durably(self._name, lambda: self._deps.store.note(self.row.id, self.row.attempt, name, time.time(), {}))

    async def _on_event(
        self, event: Event, detail: dict[str, object], residues: Mapping[str, int] = NO_RESIDUES
    ) -> None:
        before = self.phase
        after = lifecycle.advance(before, event)
        if after == before:
            return
        if after.state is not State.READY:
            self.unresponsive = False
        self._enter(after)
        if event in {Event.BOOT_TIMED_OUT, Event.PROBES_FAILED, Event.WAKE_FAILED} and self.attempt is not None:
            self.attempt.request_stop(force=False)
        if after.state is State.READY:
            self.row = replace(self.row, failure=None)
        await self._write(before, after, event, detail, residues=residues)
        if after.state is State.ASLEEP:
            self._deps.claims.park(self.row.id, residues)
        if event is Event.BECAME_READY:
            await self._record_start(detail)
        elif event is Event.WOKE:
            await self._record_wake(detail)
        if after.state not in {State.FALLING_ASLEEP, State.WAKING}:
            self._rest_over(event, detail)

    async def _on_released(self, outcome: Outcome) -> None:
        before = self.phase
        self.outcome = outcome
        failure = await self._explain(outcome)
        decision = await self._restart_decision(outcome, failure)
        after = lifecycle.advance(before, Event.RELEASED, restart=decision.restart)
        again = after.state is State.BOOTSTRAPPING
        detail: dict[str, object] = {"forced": outcome.forced, "unsettled": list(outcome.unsettled)}
        if before.why is not Why.OPERATOR:
            detail["restart"] = decision.reason
        if failure is not None:
            detail["class"] = failure.failure_class.value
        await self._write(before, after, Event.RELEASED, detail, failure=failure, again=again)
        if self.attempt is not None:
            await self.attempt.bury()
        self.attempt = None
        if again:
            self.row = replace(self.row, attempt=self.row.attempt + 1)
            self.next_attempt_at = time.time() + decision.delay_s
            over = BackoffOver(self.row.attempt)
            self._backoff = asyncio.get_running_loop().call_later(decision.delay_s, self._inbox.put_nowait, over)
        self.row = replace(self.row, failure=asdict(failure) if failure is not None else self.row.failure)
        self._enter(after)

    async def _restart_decision(self, outcome: Outcome, failure: Failure | None) -> restart.RestartDecision:
        policy = str(self.row.restart.get("policy", restart.NEVER))
        if self._deps.claims.parked(self.row.id):
            return restart.RestartDecision(
                restart=False, delay_s=0.0, reason="it slept: its GPUs may be others' by now"
            )
        if failure is not None and failure.failure_class is FailureClass.HOST_REBOOTED:
            again = restart.relaunch_after_reboot(policy)
            return restart.RestartDecision(again, 0.0, f"the machine was restarted and the restart policy is {policy}")
        limits = _limits_of(self.row.restart, self._deps.limits)
        attempts = await durably(self._name, lambda: self._deps.store.attempts(self.row.id))
        earlier = [_ready_seconds(a) for a in attempts if a.attempt < self.row.attempt]
        row = restart.failures_in_a_row([*earlier, outcome.ran_s], limits.reset_s)
        permanent = failure is not None and failure.permanent
        return restart.decide(restart.RestartFacts(policy, row, permanent), limits)

    async def _explain(self, outcome: Outcome) -> Failure | None:
        if self.phase.why is Why.OPERATOR or self.phase.why is None or self.attempt is None:
            return None
        lines = await asyncio.to_thread(self.attempt.log_reader().last_lines, LOG_LINES_READ)
        return explain_end(self.phase.why, outcome, self.engine, lines)

    def _enter(self, phase: lifecycle.Phase) -> None:
        now = time.time()
        transitions = {**self.row.transitions, phase.state.value: now}
        self.row = replace(self.row, phase=phase, changed_at=now, transitions=transitions)
        log.info("launch %s is %s%s", self.row.id, phase.state, f" ({phase.why})" if phase.why else "")
        self._deps.on_change(self)

    async def _write(
        self,
        before: lifecycle.Phase,
        after: lifecycle.Phase,
        event: Event,
        detail: dict[str, object],
        *,
        failure: Failure | None = None,
        again: bool = False,
        residues: Mapping[str, int] = NO_RESIDUES,
    ) -> None:
        store, row = self._deps.store, self.row
        view = await durably(
            self._name,
            lambda: store.transition(
                row.id,
                row.attempt,
                event.value,
                before,
                after,
                time.time(),
                detail,
                failure=asdict(failure) if failure is not None else None,
                residues=residues,
                new_attempt=row.attempt + 1 if again else None,
            ),
        )
        self._deps.on_event(view)

    async def _record_start(self, detail: dict[str, object]) -> None:
        seconds, phases = detail.get("seconds"), detail.get("phases")
        if not isinstance(seconds, float) or not isinstance(phases, dict):
            return
        store, row, spec = self._deps.store, self.row, self.spec
        key = (spec.model, spec.engine, device_name(self.placement), args_hash(spec))
        await durably(self._name, lambda: store.record_start(*key, seconds, phases, time.time()))
        await durably(self._name, lambda: store.save_attempt(row.id, row.attempt, ready_at=time.time()))

    async def _record_wake(self, detail: dict[str, object]) -> None:
        seconds, level = detail.get("seconds"), detail.get("level")
        if isinstance(seconds, float) and isinstance(level, int):
            store, spec = self._deps.store, self.spec
            key = (spec.model, spec.engine, device_name(self.placement), args_hash(spec))
            await durably(self._name, lambda: store.record_wake(*key, level, seconds, time.time()))


def _limits_of(spec: Mapping[str, Any], defaults: restart.RestartLimits) -> restart.RestartLimits:
    """The daemon's limits with what this launch asked for instead."""
    own = {name: spec[name] for name in ("max_attempts", "backoff_s") if name in spec}
    return replace(defaults, **own)


def _ready_seconds(attempt: AttemptRow) -> float:
    if attempt.ready_at is None or attempt.ended_at is None:
        return 0.0
    return max(0.0, attempt.ended_at - attempt.ready_at)
