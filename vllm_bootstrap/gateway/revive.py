"""Bringing engines back that could not be connected to: asked with growing pauses until they answer.

Invariant: one task for each ejected launch, and none once it has answered, was withdrawn, or the gateway is closed.
Must not know: why an engine was ejected, requests, how slots are given out.
"""

from __future__ import annotations

import asyncio
import logging

from vllm_bootstrap.engines import probe
from vllm_bootstrap.scheduler.gate import Gate
from vllm_bootstrap.serving import Instance

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
PROBE_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


class Reviver:
    """Listens to ``gate``; needs nothing else until ``close``."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closed = False
        gate.on_ejected(self._ejected)
        gate.on_withdrawn(self._withdrawn)

    @property
    def watched(self) -> frozenset[str]:
        """Launches that are ejected now."""
        return frozenset(self._tasks)

    def close(self) -> None:
        """Ask nobody any more. Idempotent."""
        self._closed = True
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()

    def _ejected(self, instance: Instance) -> None:
        launch_id = instance.launch_id
        if self._closed:
            return
        self._withdrawn(launch_id)
        _log.warning("launch %s cannot be connected to: no requests go there until it answers", launch_id)
        self._tasks[launch_id] = asyncio.get_running_loop().create_task(self._ask(instance), name=f"revive {launch_id}")

    def _withdrawn(self, launch_id: str) -> None:
        task = self._tasks.pop(launch_id, None)
        if task is not None:
            task.cancel()

    async def _ask(self, instance: Instance) -> None:
        pause = FIRST_PAUSE_S
        while True:
            await asyncio.sleep(pause)
            if await probe.healthy(instance.endpoint, PROBE_TIMEOUT_S, health_path=instance.health_path):
                break
            pause = min(LONGEST_PAUSE_S, pause * 2)
        _log.info("launch %s answers again", instance.launch_id)
        del self._tasks[instance.launch_id]
        self._gate.reachable(instance.launch_id)
