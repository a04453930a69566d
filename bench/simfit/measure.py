"""What a step takes: sweeps over running sequences, contexts and prompts; then one trace at several loads.

Decode samples are the time between tokens while a known number of streams decodes and nothing else happens; prefill
samples are times to the first token of a lone request, so they hold one passage through the API server as well. The
API server's CPU time for a token and a request is read from the kernel. No two prompts have the same length: the CPU
build prepares its matrix products anew for each number of tokens, and with real traffic nearly every number is new.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from bench.simfit import trace
from bench.simfit.client import Client, Outcome
from bench.simfit.engines import MODEL, Running

DECODE_STREAMS = (1, 2, 4, 8, 16, 24, 32)
DECODE_PROMPTS = (16, 256, 512, 1024)
PREFILL_PROMPTS = (4, 32, 64, 128, 256, 512, 1024, 1536)
DECODE_TOKENS = 100
PREFILL_ROUNDS = 15
MIXED_STREAMS = (4, 16, 28)
MIXED_PROMPTS = (32, 128, 512, 1024)
MIXED_ROUNDS = 7
MIXED_TOKENS = 1000
AROUND_S = 0.015
# Between the lengths of prompts; chosen so that few sums with the numbers of streams above are the same.
STRIDE = 5
SLOTS = 32
# Streams and how many requests they send in all; the first are all slots.
BUSY = {SLOTS: 400, 8: 120}
LOADS = (0.2, 0.6, 0.95)
LOAD_SECONDS = 30.0
SEED = 5


async def sweep(running: Running) -> dict[str, Any]:
    """Samples and CPU times. About half a minute on the CPU build."""
    client = Client(running.uds, MODEL, seed=11)
    await client.together([_request(64, 16)] * 4)  # the first requests of an engine are slow
    decode = [
        await _decode(running, client, streams, prompt) for prompt in DECODE_PROMPTS for streams in DECODE_STREAMS
    ]
    prefill = [await _prefill(running, client, prompt) for prompt in PREFILL_PROMPTS]
    mixed = [sample for streams in MIXED_STREAMS for sample in await _mixed(client, streams)]
    size, blocks = running.cache()
    client.close()
    return {"decode": decode, "prefill": prefill, "mixed": mixed, "block_size": size, "kv_blocks": blocks}


async def _decode(running: Running, client: Client, streams: int, prompt: int) -> dict[str, float]:
    cpu = running.cpu_s()
    outcomes = await client.together([_request(prompt, DECODE_TOKENS)] * streams)
    cpu = running.cpu_s() - cpu
    began, ended = max(o.events[0] for o in outcomes), min(o.events[-1] for o in outcomes)
    steps = sum(began < at <= ended for o in outcomes for at in o.events) / streams
    tokens_each = DECODE_TOKENS - steps / 2  # at the middle of the window
    return {
        "decodes": streams,
        "context": streams * (prompt + tokens_each),
        "step_s": (ended - began) / steps if steps else 0.0,
        "prompt": prompt,
        "step_cpu_s": cpu / DECODE_TOKENS,
        "requests_a_step": streams / DECODE_TOKENS,
    }


async def _prefill(running: Running, client: Client, prompt: int) -> dict[str, float]:
    cpu = running.cpu_s()
    times: list[float] = []
    lengths = [prompt + STRIDE * i for i in range(PREFILL_ROUNDS)]
    for length in lengths:
        outcome: Outcome = await client.ask(_request(length, 1))
        times.append(outcome.ttft)
        await asyncio.sleep(0.02)
    spent = (running.cpu_s() - cpu) / PREFILL_ROUNDS
    return {"prompt": statistics.median(lengths), "ttft_s": statistics.median(times), "request_cpu_s": spent}


async def _mixed(client: Client, streams: int) -> list[dict[str, float]]:
    """Prompts read beside decoding streams. The step with the prompt in it is taken to be a usual one and all the time
    that the streams lost around it: coming and going cost something in the steps before and after, too."""
    watched = [asyncio.ensure_future(client.ask(_request(64, MIXED_TOKENS))) for _ in range(streams)]
    await client.ask(_request(64, 30))  # by its end all of them decode
    injected: list[Outcome] = []
    for prompt in MIXED_PROMPTS:
        for length in range(prompt, prompt + STRIDE * MIXED_ROUNDS, STRIDE):
            injected.append(await client.ask(_request(length, 1)))
            await asyncio.sleep(2 * AROUND_S)
    outcomes = await asyncio.gather(*watched)
    found = []
    for prompt in MIXED_PROMPTS:
        lengths = range(prompt, prompt + STRIDE * MIXED_ROUNDS, STRIDE)
        ones = [o for o in injected if o.request.prompt_tokens in lengths and o.ended < outcomes[0].ended]
        if ones:
            pauses = [statistics.median(_pause(outcome, one) for outcome in outcomes) for one in ones]
            before = statistics.mean(sum(at < one.sent for at in outcomes[0].events) for one in ones)
            found.append(
                {
                    "decodes": streams,
                    "context": streams * (64 + before),
                    "prompt": statistics.median(one.request.prompt_tokens for one in ones),
                    "step_s": statistics.median(pauses),
                    "ttft_s": statistics.median(one.ttft for one in ones),
                }
            )
    return found


def _pause(outcome: Outcome, during: Outcome) -> float:
    """A usual gap of about then, and what the gaps around the request have beyond it."""
    usual = statistics.median(_gaps(outcome, during, 0.1))
    return usual + max(0.0, sum(gap - usual for gap in _gaps(outcome, during, AROUND_S)))


def _gaps(outcome: Outcome, during: Outcome, around: float) -> list[float]:
    pairs = itertools.pairwise(outcome.events)
    return [b - a for a, b in pairs if a < during.ended + around and b > during.sent - around]


async def busy(running: Running) -> list[dict[str, float]]:
    """The trace's mix with so many streams all the time: what was in all steps together, and how long they took."""
    found = []
    for streams, number in BUSY.items():
        client = Client(running.uds, MODEL, seed=12 + streams)
        requests = trace.poisson(number, 2.0, seed=SEED)[:number]
        before = running.metrics()["iteration_tokens_total_count"]
        outcomes = await client.closed_loop(requests, streams)
        steps = running.metrics()["iteration_tokens_total_count"] - before
        client.close()
        ends = sorted(o.ended for o in outcomes)
        middle = ends[streams:-streams]
        lengths = [(r.prompt_tokens, r.output_tokens) for r in requests]
        found.append(
            {
                "streams": streams,
                "steps": steps,
                "seconds": ends[-1] - min(o.sent for o in outcomes),
                "decodes": sum(output - 1 for _, output in lengths),
                "context": sum((output - 1) * (prompt + output / 2) for prompt, output in lengths),
                "requests": len(requests),
                "prefill": sum(prompt for prompt, _ in lengths),
                "pairs": sum(prompt**2 / 2 for prompt, _ in lengths),
                "requests_per_s": (len(middle) - 1) / (middle[-1] - middle[0]),
            }
        )
    return found


async def loads(running: Running, rates: Sequence[float], seconds: float) -> list[dict[str, Any]]:
    """The same traffic at each rate, one after the other."""
    client = Client(running.uds, MODEL, seed=13)
    await client.together([_request(64, 16)] * 4)
    found = []
    for rate in rates:
        requests = trace.poisson(rate, seconds, seed=SEED)
        found.append({"rate": rate, **summary(await client.replay(requests))})
        await asyncio.sleep(0.5)
    client.close()
    return found


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What a run came to. Throughput is tokens of answers between the first sending and the last end."""
    done = [o for o in outcomes if o.ok]
    seconds = max(o.ended for o in done) - min(o.sent for o in outcomes)
    spaces = [(o.events[-1] - o.events[0]) / (o.request.output_tokens - 1) for o in done if o.request.output_tokens > 1]
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(done),
        "seconds": seconds,
        "tokens_per_s": sum(o.request.output_tokens for o in done) / seconds,
        "ttft_s": sorted(o.ttft for o in done),
        "realtime_ttft_s": sorted(o.ttft for o in done if o.request.cls == "realtime"),
        "token_gap_s": sorted(spaces),
    }


def _request(prompt: int, output: int) -> trace.Request:
    return trace.Request(0.0, prompt, output)
