"""Who waits how long when requests for three models meet a box with room for one: ours against first come.

Requests arrive at random (Poisson) for models a, b, c, a, b, c and so on, the same ones at the same times for each
contender. *First come* is a client's driver over the same daemon: it takes requests strictly in the order in which they
came, and where another model is needed unloads what is there and loads that (``POST /models/{name}/unload|load``).
Everybody else sends at once and lets the daemon decide, with different times that a model stays at least and that a
request waits at most.

A wait is from the moment at which a request was due until the first byte of its answer.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bench.common import median, percentile, table
from bench.models.box import KEY, daemon
from tests.support.daemon import DaemonProcess

NAMES = ("a", "b", "c")
LOAD_S = 2.0
TOKENS, TOKENS_S = 20, 50
AT_ONCE = 6
SEED = 1
HEADS = [
    "", "loads", "mean wait, s", "median, s", "p95, s", "longest, s", "a load takes, s", "until all were answered, s"
]  # fmt: skip


class Case(NamedTuple):
    """So many requests, so many a second on average."""

    requests: int
    rate: float


CASES = (Case(45, 1.0), Case(24, 0.25))


@dataclass(frozen=True)
class Contender:
    """``settings`` of its daemon; ``driven``: by the client, in the order of arrival; ``everywhere``: in all cases, not
    in the first one only."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    driven: bool = False
    everywhere: bool = True


def ours(min_loaded_s: float, max_wait_s: float, note: str = "", *, everywhere: bool = False) -> Contender:
    settings = {"model_min_loaded_s": min_loaded_s, "model_max_wait_s": max_wait_s}
    return Contender(
        f"ours, stays at least {min_loaded_s:g} s, waits at most {max_wait_s:g} s{note}",
        settings,
        everywhere=everywhere,
    )


CONTENDERS = (
    Contender("first come, first served", {"on_demand": "off"}, driven=True),
    ours(2, 15, " (default)", everywhere=True),
    ours(10, 15, everywhere=True),
    ours(2, 3),
    ours(0, 0),
    ours(30, 15),
)


@dataclass
class Outcome:
    """Seconds: each request's wait, until all were answered, and what a load took on average."""

    waits: list[float]
    loads: int
    seconds: float
    load_s: float


def arrivals(count: int, rate: float, seed: int) -> list[tuple[float, str]]:
    """When, and for which model."""
    chance, at, found = random.Random(seed), 0.0, []
    for number in range(count):
        found.append((at, NAMES[number % len(NAMES)]))
        at += chance.expovariate(rate)
    return found


class Client:
    """Sends requests to one daemon; keeps what they waited."""

    def __init__(self, one: DaemonProcess) -> None:
        self.host, self.port = one.address
        self.waits: list[float] = []

    async def ask(self, model: str, due: float) -> None:
        body = {"model": model, "prompt": "hello", "max_tokens": TOKENS, "stream": True}
        reader, writer = await self._send("POST", "/v1/completions", body)
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head[:15]:
            raise SystemExit((head + await reader.read(2000)).decode(errors="replace"))
        await reader.readexactly(1)
        self.waits.append(time.monotonic() - due)
        await reader.read()
        writer.close()

    async def call(self, method: str, path: str) -> bytes:
        """The whole answer. Ends the bench when it is a refusal."""
        reader, writer = await self._send(method, path, None)
        answer = await reader.read()
        writer.close()
        if not answer.startswith(b"HTTP/1.1 2"):
            raise SystemExit(answer.decode(errors="replace"))
        return answer

    async def _send(self, method: str, path: str, body: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        raw = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
        kind = "Content-Type: application/json\r\n" if raw else ""
        writer.write(f"{head}{kind}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        return reader, writer


async def leave_it_to_the_daemon(client: Client, plan: list[tuple[float, str]], began: float) -> None:
    async with asyncio.TaskGroup() as group:
        for at, model in plan:
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            group.create_task(client.ask(model, began + at))


async def first_come(client: Client, plan: list[tuple[float, str]], began: float) -> None:
    """Requests for the model that is loaded join those that run; another model waits until they have ended."""
    loaded: str | None = None
    running: list[asyncio.Task[None]] = []
    for at, model in plan:
        await asyncio.sleep(max(0.0, began + at - time.monotonic()))
        if model != loaded:
            await asyncio.gather(*running)
            running.clear()
            if loaded is not None:
                await client.call("POST", f"/models/{loaded}/unload")
            await client.call("POST", f"/models/{model}/load?wait=true")
            loaded = model
        running.append(asyncio.create_task(client.ask(model, began + at)))
    await asyncio.gather(*running)


def measure(contender: Contender, plan: list[tuple[float, str]]) -> Outcome:
    knobs = {"boot-delay": LOAD_S, "tokens-per-second": TOKENS_S}
    entry = {"gpus": {"count": 1}, "extra_args": knobs}
    catalogue = {name: {"source": f"org/{name}", **entry} for name in NAMES}
    settings = {"cold_start_hold_s": 3600, "max_in_flight_requests": 10_000, **contender.settings}
    with daemon(catalogue, devices="mock:1", **settings) as one:
        client = Client(one)
        drive = first_come if contender.driven else leave_it_to_the_daemon
        began = time.monotonic() + 0.1
        asyncio.run(drive(client, plan, began))
        seconds = time.monotonic() - began
        text = one.request("GET", "/metrics").body.decode()
        loads = _sum(text, "model_loads_total", 'outcome="loaded"')
        return Outcome(client.waits, round(loads), seconds, _sum(text, "model_load_seconds_sum") / loads)


def _sum(text: str, beginning: str, having: str = "") -> float:
    lines = [line for line in text.splitlines() if line.startswith(f"vllm_bootstrap_{beginning}{{") and having in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def run() -> Iterator[str]:
    """They mostly wait for clocks, so they are measured side by side, each on a box of its own."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        begun = [
            (case, contender, pool.submit(measure, contender, arrivals(case.requests, case.rate, SEED)))
            for case in CASES
            for contender in CONTENDERS
            if contender.everywhere or case is CASES[0]
        ]
        for case in CASES:
            rows = [_row(contender, of.result()) for at, contender, of in begun if at is case]
            yield f"{case.requests} requests, {case.rate:g} a second:\n\n{table(HEADS, rows)}\n"


def _row(contender: Contender, found: Outcome) -> list[str]:
    waits = found.waits
    shown = [sum(waits) / len(waits), median(waits), percentile(waits, 95), max(waits), found.load_s]
    return [contender.name, str(found.loads), *(f"{one:.1f}" for one in shown), f"{found.seconds:.0f}"]
