"""One engine on its way to sleep and back. All IO of it; posts what came of it to the launch's owner.

Invariant: ``fell_asleep`` is posted only after the GPUs were seen free, the lock files were given up and the facts of
the sleep were stored; ``woke`` and ``stayed_awake`` only after the engine answered a request of its task (and at level
2 said the same as before). What fails on the way to sleep is undone: the launch serves again, or ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from vllm_bootstrap.engines import probe, sleeping
from vllm_bootstrap.engines.base import FailureClass, LaunchSpec, Placement, Traits
from vllm_bootstrap.launches.durably import durably
from vllm_bootstrap.launches.gpu_release import GpuUse
from vllm_bootstrap.launches.lifecycle import Event
from vllm_bootstrap.launches.posts import Post
from vllm_bootstrap.launches.process import Shim, ShimLost, ShimRefused
from vllm_bootstrap.launches.resting import GpuLook, SleepFacts, not_asleep
from vllm_bootstrap.serving import Endpoint

log = logging.getLogger(__name__)

# The driver gives memory back a moment after the engine says that it sleeps.
FREED_WITHIN_S = 5.0
FREED_POLL_S = 0.1
INTERRUPTED = "the daemon was restarted while it fell asleep"


class Sleepy(Protocol):
    """What is needed of an attempt."""

    launch_id: str
    number: int
    spec: LaunchSpec
    placement: Placement
    traits: Traits
    deps: Any
    awake: asyncio.Event
    sleep: SleepFacts | None
    trouble: tuple[FailureClass, str] | None
    post: Callable[[Post], None]


@dataclass(frozen=True, slots=True)
class Bed:
    """An attempt whose engine runs, with what is certain of it then."""

    attempt: Sleepy
    shim: Shim
    endpoint: Endpoint
    baseline: dict[str, int]

    @property
    def patience_s(self) -> float:
        """Weights go to the host and come back, or are loaded again: as long as a start may take."""
        return float(self.attempt.deps.config.start_timeout_s)

    def fail(self, message: str) -> None:
        log.warning("launch %s did not wake: %s", self.attempt.launch_id, message)
        self.attempt.trouble = (FailureClass.WAKE_FAILED, message)
        self.say(Event.WAKE_FAILED, message=message)

    def say(self, event: Event, facts: SleepFacts | None = None, **detail: object) -> None:
        attempt = self.attempt
        residues = facts.residues if facts is not None else {}
        attempt.post(Post(attempt.number, event, detail=detail, residues=residues))


class _NotAsleep(Exception):
    """It did not fall asleep, and why."""


async def fall_asleep(bed: Bed, level: int) -> None:
    """Send it to sleep and see that it does. Never raises but on storage failure."""
    began = time.monotonic()
    facts = SleepFacts(level)
    try:
        facts = SleepFacts(level, answer=await _answer_before(bed, level))
        facts = await _sleep(bed, facts)
        await bed.shim.unlock_gpus()
    except (probe.ProbeError, _NotAsleep, ShimRefused, ShimLost) as exc:
        log.warning("launch %s did not fall asleep: %s", bed.attempt.launch_id, exc)
        await stay_awake(bed, facts, str(exc))
        return
    bed.attempt.sleep = facts
    await _store(bed, facts)
    freed = sum(facts.freed.values())
    seconds = round(time.monotonic() - began, 3)
    bed.say(Event.FELL_ASLEEP, facts, level=level, seconds=seconds, bytes_freed=freed)


async def _answer_before(bed: Bed, level: int) -> str | None:
    if level != 2:
        return None
    answer = await _first_token(bed)
    if answer is None:
        raise _NotAsleep(
            "level 2 is for models that continue texts: of others nobody could tell whether they woke well"
        )
    return answer


async def _sleep(bed: Bed, facts: SleepFacts) -> SleepFacts:
    attempt = bed.attempt
    before = await attempt.deps.gpus.use(attempt.launch_id, attempt.placement)
    await sleeping.fall_asleep(bed.endpoint, facts.level, bed.patience_s)
    deadline = time.monotonic() + FREED_WITHIN_S
    while True:
        looks = _looks(bed, before, await attempt.deps.gpus.use(attempt.launch_id, attempt.placement))
        reasons = [reason for reason in map(not_asleep, looks) if reason is not None]
        if not reasons:
            break
        if time.monotonic() >= deadline:
            raise _NotAsleep("; ".join(reasons))
        await asyncio.sleep(FREED_POLL_S)
    return replace(
        facts,
        freed={look.gpu.uuid: (look.before or 0) - (look.after or 0) for look in looks},
        residues={look.gpu.uuid: look.used(look.after or 0) for look in looks},
    )


def _looks(bed: Bed, before: dict[str, GpuUse], after: dict[str, GpuUse]) -> list[GpuLook]:
    return [
        GpuLook(
            gpu, bed.baseline.get(gpu.uuid), before[gpu.uuid].used_bytes, after[gpu.uuid].used_bytes,
            after[gpu.uuid].others_milli, after[gpu.uuid].others_bytes,
        )
        for gpu in bed.attempt.placement.gpus
    ]  # fmt: skip


async def stay_awake(bed: Bed, facts: SleepFacts | None, reason: str) -> None:
    """Undo a sleep that failed or of which nobody knows how far it came. ``facts`` None: unknown."""
    try:
        await bed.shim.lock_gpus()
        why = await _awaken(bed, facts)
    except (ShimRefused, ShimLost) as exc:
        why = str(exc)
    if why is not None:
        bed.fail(f"{reason}; then {why}")
        return
    await _forget(bed)
    bed.attempt.awake.set()
    bed.say(Event.STAYED_AWAKE, reason=reason)


async def wake(bed: Bed, facts: SleepFacts | None) -> None:
    """Wake it and see that it works. Never raises but on storage failure."""
    began = time.monotonic()
    try:
        await bed.shim.lock_gpus()
    except (ShimRefused, ShimLost) as exc:
        bed.say(Event.STAYED_ASLEEP, facts, reason=str(exc))
        return
    why = await _awaken(bed, facts)
    if why is not None:
        bed.fail(why)
        return
    await _forget(bed)
    bed.attempt.awake.set()
    level = facts.level if facts is not None else 0
    bed.say(Event.WOKE, level=level, seconds=round(time.monotonic() - began, 3))


async def _awaken(bed: Bed, facts: SleepFacts | None) -> str | None:
    """None when the engine is awake and works, else why not. Not knowing how it sleeps, weights are loaded again."""
    attempt = bed.attempt
    level = facts.level if facts is not None else max(attempt.traits.sleep_levels, default=1)
    config, name = attempt.deps.config, attempt.spec.served_model_name
    try:
        if await sleeping.is_sleeping(bed.endpoint, bed.patience_s):
            await sleeping.wake(bed.endpoint, level, bed.patience_s)
        why = await probe.ready(bed.endpoint, name, config.probe_timeout_s, health_path=attempt.traits.health_path)
        if why is None and facts is not None and facts.answer is not None:
            said = await _first_token(bed)
            if said != facts.answer:
                why = (
                    f"it answers {said!r} where it said {facts.answer!r} before it slept: its weights are not the same"
                )
    except probe.ProbeError as exc:
        why = str(exc)
    return why


async def _first_token(bed: Bed) -> str | None:
    return await sleeping.first_token(bed.endpoint, bed.attempt.spec.served_model_name, probe.TASK_TIMEOUT_S)


async def _forget(bed: Bed) -> None:
    if bed.attempt.sleep is not None:
        bed.attempt.sleep = None
        await _store(bed, None)


async def _store(bed: Bed, facts: SleepFacts | None) -> None:
    attempt, stored = bed.attempt, asdict(facts) if facts is not None else None
    store = attempt.deps.store
    await durably(attempt.launch_id, lambda: store.save_attempt(attempt.launch_id, attempt.number, sleep=stored))
