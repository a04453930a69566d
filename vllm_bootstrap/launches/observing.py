"""Looks at one engine from outside: its health and counters, its start-up log, its download. Reads, decides nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from vllm_bootstrap.engines import probe
from vllm_bootstrap.engines.base import Engine, Traits
from vllm_bootstrap.launches.downloads import cached_bytes
from vllm_bootstrap.launches.liveness import Sample
from vllm_bootstrap.launches.logs import LogReader
from vllm_bootstrap.launches.progress import StartProgress
from vllm_bootstrap.serving import Endpoint

log = logging.getLogger(__name__)
PROGRESS_POLL_S = 1.0


async def sample(
    endpoint: Endpoint,
    traits: Traits,
    timeout_s: float,
    on_counters: Callable[[probe.Counters], None] = lambda _counters: None,
) -> Sample:
    """One look at a ready engine; takes up to twice ``timeout_s``. What cannot be read is None, never an error. All
    its counters, where they could be read, go to ``on_counters`` as well: the engine is asked once for everybody."""
    healthy = await probe.healthy(endpoint, timeout_s, health_path=traits.health_path)
    counters = await probe.counters(endpoint, timeout_s) if traits.has_metrics else None
    if counters is None:
        return Sample(time.monotonic(), healthy, traits.has_metrics)
    on_counters(counters)
    known = [c for c in (counters.generation_tokens, counters.prompt_tokens) if c is not None]
    return Sample(time.monotonic(), healthy, traits.has_metrics, counters.running, sum(known) if known else None)


async def follow_start(
    reader: LogReader, engine: Engine, progress: StartProgress, blobs: Path | None, is_ready: Callable[[], bool]
) -> None:
    """Read log and download cache into ``progress`` until ready. For people to look at: trouble is logged, the launch
    goes on without it."""
    measuring = asyncio.create_task(_measure_download(progress, blobs, is_ready))
    try:
        async for line in reader.follow_lines(is_ready):
            found = engine.progress(line)
            if found is not None:
                progress.on_line(found, time.monotonic())
    except Exception:
        log.exception("a start-up log cannot be followed")
    finally:
        measuring.cancel()


async def _measure_download(progress: StartProgress, blobs: Path | None, is_ready: Callable[[], bool]) -> None:
    while blobs is not None and not is_ready():
        size = await asyncio.to_thread(cached_bytes, blobs)
        if size is not None:
            progress.on_downloaded(size, time.monotonic())
        await asyncio.sleep(PROGRESS_POLL_S)
