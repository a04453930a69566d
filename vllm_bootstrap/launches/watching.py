"""Watches one engine: until it is ready, and while it is. Posts what it finds, decides nothing about states.

Invariant: an engine that sleeps, falls asleep or wakes is not judged: it does no work because it is told so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from vllm_bootstrap.engines import probe
from vllm_bootstrap.engines.base import LaunchSpec, Traits
from vllm_bootstrap.launches import observing
from vllm_bootstrap.launches.lifecycle import Event
from vllm_bootstrap.launches.liveness import Liveness, Verdict, boot_timed_out, unwatched_s
from vllm_bootstrap.launches.posts import Post
from vllm_bootstrap.launches.progress import StartProgress
from vllm_bootstrap.serving import Endpoint

READY_POLL_S = 0.25
# What a round of looking may take beyond its own pauses and time limits before it means that we were frozen.
SLACK_S = 1.0


class Watched(Protocol):
    """What is needed of an attempt. ``awake``: set but while it sleeps, falls asleep or wakes."""

    launch_id: str
    number: int
    spec: LaunchSpec
    traits: Traits
    endpoint: Endpoint | None
    progress: StartProgress
    ready_since: float | None
    deps: Any
    stopping: asyncio.Event
    awake: asyncio.Event
    post: Callable[[Post], None]


async def until_ready(watched: Watched) -> bool:
    """False when it was given up or is to stop."""
    config = watched.deps.config
    assert watched.endpoint is not None  # noqa: S101 - set by _start or adoption
    longest_look_s = 2 * config.probe_timeout_s + probe.TASK_TIMEOUT_S + READY_POLL_S + SLACK_S
    looked_at = time.monotonic()
    while not watched.stopping.is_set():
        name, path = watched.spec.served_model_name, watched.traits.health_path
        reason = await probe.ready(watched.endpoint, name, config.probe_timeout_s, health_path=path)
        now = time.monotonic()
        watched.progress.moved_at = min(now, watched.progress.moved_at + unwatched_s(looked_at, now, longest_look_s))
        looked_at = now
        if reason is None:
            watched.ready_since = now
            phases = watched.progress.finish(now)
            total = now - watched.progress.started_at
            watched.post(
                Post(watched.number, Event.BECAME_READY, detail={"seconds": round(total, 3), "phases": phases})
            )
            return True
        timed_out = boot_timed_out(
            elapsed_s=now - watched.progress.started_at,
            since_progress_s=now - watched.progress.moved_at,
            start_timeout_s=config.start_timeout_s,
            start_stall_timeout_s=config.start_stall_timeout_s,
        )
        if timed_out:
            watched.post(Post(watched.number, Event.BOOT_TIMED_OUT, detail={"last_probe": reason}))
            return False
        await asyncio.sleep(READY_POLL_S)
    return False


async def while_awake(watched: Watched) -> bool:
    """Until it is to stop or sleeps; False when it was given up."""
    config = watched.deps.config
    assert watched.endpoint is not None  # noqa: S101 - set by _start or adoption
    longest_gap_s = config.probe_interval_s + 2 * config.probe_timeout_s + SLACK_S
    liveness = Liveness(moved_at=time.monotonic(), longest_gap_s=longest_gap_s)
    flagged = False
    tell = partial(watched.deps.on_counters, watched.launch_id)
    while not watched.stopping.is_set():
        await asyncio.sleep(config.probe_interval_s)
        sample = await observing.sample(watched.endpoint, watched.traits, config.probe_timeout_s, tell)
        if not watched.awake.is_set():
            return True
        liveness = liveness.observe(sample)
        verdict = liveness.verdict(
            sample.at,
            unresponsive_after_s=config.unresponsive_after_s,
            unhealthy_after_s=config.unhealthy_after_s,
        )
        if verdict is Verdict.FAILED:
            watched.post(Post(watched.number, Event.PROBES_FAILED))
            return False
        if flagged != (verdict is Verdict.UNRESPONSIVE):
            flagged = not flagged
            watched.post(Post(watched.number, unresponsive=flagged))
    return True
