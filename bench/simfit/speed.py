"""Whether the simulator can be the bottleneck: many streams at once on one core, at a rate no engine asks of it."""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

from bench.simfit import engines, trace
from bench.simfit.client import Client, Outcome

OFFERED = 40_000
# Batches continuously, in steps that take what the offered rate leaves them.
FAST = {"name": "fast", "source": "no engine", "measured": False, "kv_blocks": 1_000_000}
OUTPUT_TOKENS = 20_000


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "fast.json"
        for streams in sorted({64, args.streams}):
            profile.write_text(json.dumps({**FAST, "step_base_s": streams / OFFERED}))
            with engines.simulator(str(profile), [f"--max-num-seqs={streams}", "--max-model-len=32768"]) as running:
                rate, cpu_us = asyncio.run(measure(running, streams, args.seconds))
            print(f"{streams} streams, {OFFERED:,} chunks/s offered: {rate:,.0f} received by the client;")
            print(f"  {cpu_us:.1f} µs CPU a chunk in the simulator: one core is good for {1e6 / cpu_us:,.0f} chunks/s")


async def measure(running: engines.Running, streams: int, seconds: float) -> tuple[float, float]:
    """Chunks a second that reached the client while all streams ran, and the simulator's CPU time for each."""
    client = Client(running.uds, engines.MODEL)
    outcomes: list[Outcome] = []
    asking = [
        asyncio.ensure_future(client.ask(trace.Request(0.0, 8, OUTPUT_TOKENS), into=outcomes)) for _ in range(streams)
    ]
    loop = asyncio.get_running_loop()
    await asyncio.sleep(1.0)
    before, cpu, began = _received(outcomes), running.cpu_s(), loop.time()
    await asyncio.sleep(seconds)
    chunks, cpu, took = _received(outcomes) - before, running.cpu_s() - cpu, loop.time() - began
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    return chunks / took, cpu / max(1, chunks) * 1e6


def _received(outcomes: list[Outcome]) -> int:
    return sum(len(outcome.events) for outcome in outcomes)
