"""Warming the page cache with models' files, so that the next model loads from memory while the current one serves.

Invariants: one prefetch of a model at a time; nothing is begun that would push programs, or what was just warmed, out
of memory. The work is a helper's: cancelling kills it, and the loop never waits for a disk.

Must not know: where models lie, HTTP.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_bootstrap.errors import NotEnoughMemory, NotFound
from vllm_bootstrap.models import helper
from vllm_bootstrap.models.residency import available_bytes
from vllm_bootstrap.models.types import PrefetchView

PROGRAM = "vllm_bootstrap.models.warming"
RESERVE_BYTES = 1024**3
KEPT = 100
"""So many prefetches that have ended are remembered."""


class _Running:
    def __init__(self, view: PrefetchView, now: float) -> None:
        self.view, self.since = view, now
        self.task: asyncio.Task[None] | None = None


class Prefetches:
    """``env``: what helpers inherit; vmtouch is looked for on its PATH. ``reserve_bytes`` of memory stay free.
    ``available``: bytes of memory that may be used, None where that cannot be told (then nothing is refused)."""

    def __init__(
        self,
        env: Mapping[str, str],
        *,
        reserve_bytes: int = RESERVE_BYTES,
        available: Callable[[], int | None] = available_bytes,
    ) -> None:
        self._env, self._reserve, self._available = env, reserve_bytes, available
        self._all: dict[str, _Running] = {}

    def begin(self, model: str, files: Sequence[Path], total: int) -> PrefetchView:
        """Read ``files`` (``total`` bytes) into the page cache, or join who does. Raises ``NotEnoughMemory``."""
        known = self._all.get(model)
        if known is not None and known.view.state == "running":
            return self.state(model)
        promised = sum(
            one.view.bytes_total - one.view.bytes_done for one in self._all.values() if one.view.state == "running"
        )
        available = self._available()
        if available is not None and total > available - promised - self._reserve:
            raise NotEnoughMemory(
                f"{model} has {total} bytes; {available} bytes of memory are available, {promised} of them promised to "
                f"other prefetches and {self._reserve} kept free. It would push out what others use: load it directly.",
                should_retry=False,
                details={"needed_bytes": total, "available_bytes": available, "reserve_bytes": self._reserve},
            )
        vmtouch = shutil.which("vmtouch", path=self._env.get("PATH", os.defpath))
        view = PrefetchView(model, "running", total, 0, 0.0, "vmtouch" if vmtouch else "readahead")
        self._all.pop(model, None)
        one = self._all[model] = _Running(view, time.monotonic())
        task = {"files": [str(path) for path in files], "vmtouch": vmtouch, "parent": os.getpid()}
        one.task = asyncio.create_task(self._run(one, task), name=f"prefetch {model}")
        self._forget_old()
        return view

    def state(self, model: str) -> PrefetchView:
        """The last prefetch of a model. Raises ``NotFound``."""
        one = self._all.get(model)
        if one is None:
            raise NotFound(f"Nothing was prefetched for {model!r}.", param="name")
        if one.view.state == "running":
            return replace(one.view, seconds=time.monotonic() - one.since)
        return one.view

    def all(self) -> list[PrefetchView]:
        return [self.state(model) for model in self._all]

    def is_running(self, model: str) -> bool:
        return model in self._all and self._all[model].view.state == "running"

    async def cancel(self, model: str) -> PrefetchView:
        """Stop; what is in memory stays there for now. Raises ``NotFound``; nothing happens to one that has ended."""
        self.state(model)
        one = self._all[model]
        if one.task is not None and one.view.state == "running":
            one.task.cancel()
            await asyncio.wait({one.task})
        return self.state(model)

    async def wait(self, model: str) -> PrefetchView:
        """Until the prefetch has ended. Raises ``NotFound``."""
        self.state(model)
        task = self._all[model].task
        if task is not None:
            await asyncio.wait({task})
        return self.state(model)

    async def close(self) -> None:
        """Kill the helpers. Idempotent."""
        for model in list(self._all):
            await self.cancel(model)

    async def _run(self, one: _Running, task: Mapping[str, Any]) -> None:
        state: Any = "failed"
        error: str | None = None
        try:
            ended = await helper.run(PROGRAM, task, self._env, lambda said: self._said(one, said))
            if ended.said.get("done"):
                state = "completed"
            else:
                error = str(ended.said.get("failure") or ended.complaint)
        except OSError as exc:
            error = f"The helper could not be started: {exc}"
        except asyncio.CancelledError:
            state = "cancelled"
            raise
        finally:
            one.view = replace(one.view, state=state, error=error, seconds=time.monotonic() - one.since)

    def _said(self, one: _Running, said: Mapping[str, Any]) -> None:
        if "bytes" in said:
            one.view = replace(one.view, bytes_done=min(one.view.bytes_total, int(said["bytes"])))

    def _forget_old(self) -> None:
        ended = [model for model, one in self._all.items() if one.view.state != "running"]
        for model in ended[: max(0, len(ended) - KEPT)]:
            with suppress(KeyError):
                del self._all[model]
