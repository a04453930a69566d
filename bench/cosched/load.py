"""Load for the co-scheduling bench, as a process of its own: realtime streams that arrive at random, beside a batch.

Realtime: a Poisson process of streamed completions with short prompts; arrivals do not wait for answers. Batch: a fixed
number of whole answers in flight at all times, each with a longer prompt. No two prompts share a beginning, so that no
prefix cache helps. Reads one JSON object (``Work``) from stdin, writes one (``Found``) to stdout.

The first ``warmup_s`` seconds are not counted. Batch tokens are counted when their answer is complete: work that was
thrown away counts nothing. With ``cooldown_s`` the load goes on for so long after the measured time, and an answer that
lay only partly in it counts in part: without it, a throughput of few long answers depends on where the time was cut.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import httptools
import uvloop

PATH = "/v1/completions"
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeio"]
RETRY_AT_MOST_S = 2.0


@dataclass(frozen=True)
class Work:
    """What to do. ``realtime_rate`` is requests a second, ``batch`` how many batch requests are kept in flight.
    ``words`` are the lengths of prompts, ``tokens`` those of answers: (least, most), evenly spread."""

    seconds: float
    port: int = 0
    uds: str = ""
    model: str = "tiny"
    warmup_s: float = 3.0
    cooldown_s: float = 0.0
    realtime_rate: float = 0.0
    realtime_clients: int = 0
    realtime_words: tuple[int, int] = (10, 30)
    realtime_tokens: tuple[int, int] = (32, 96)
    realtime_headers: dict[str, str] = field(default_factory=dict)
    batch: int = 0
    batch_words: tuple[int, int] = (40, 120)
    batch_tokens: tuple[int, int] = (64, 192)
    batch_headers: dict[str, str] = field(default_factory=dict)
    batch_streamed: bool = False
    seed: int = 1


@dataclass
class Found:
    """What was seen after the warm-up. Times in seconds."""

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    realtime_tokens: int = 0
    realtime_done: int = 0
    batch_tokens: float = 0
    batch_prompt_tokens: int = 0
    batch_done: int = 0
    batch_seconds: list[float] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    started: list[float] = field(default_factory=list)


class Answer(asyncio.Protocol):
    """One connection with at most one request on it. ``on_part(time, bytes)`` is told of each part of a body."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.done: asyncio.Future[int] | None = None
        self.on_part: Callable[[float, bytes], None] = lambda _at, _part: None
        self._parser: Any = None
        self.retry_after = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._parser is not None:
            self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's interface
        self.transport = None
        if self.done is not None and not self.done.done():
            self.done.set_result(0)

    def ask(self, head: bytes, body: bytes) -> asyncio.Future[int]:
        assert self.transport is not None
        self.done = asyncio.get_running_loop().create_future()
        self.retry_after = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        return self.done

    # httptools
    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self.retry_after = float(value)

    def on_body(self, part: bytes) -> None:
        self.on_part(time.perf_counter(), part)

    def on_message_complete(self) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_result(self._parser.get_status_code())


class Load:
    def __init__(self, work: Work) -> None:
        self.work, self.found = work, Found()
        self._random = random.Random(work.seed)
        self._idle: list[Answer] = []
        self._refused: Counter[str] = Counter()
        self._words = ["".join(self._random.choices(SYLLABLES, k=self._random.randint(1, 4))) for _ in range(4000)]
        self._from = self._until = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> Found:
        work = self.work
        self._from = time.perf_counter() + work.warmup_s
        self._until = self._from + work.seconds
        jobs = [self._batch_worker(number) for number in range(work.batch)]
        jobs += [self._realtime_client(number) for number in range(work.realtime_clients)]
        tasks = [asyncio.create_task(job) for job in jobs]
        if work.realtime_rate:
            await self._arrivals()
        await asyncio.sleep(max(0.0, self._until + work.cooldown_s - time.perf_counter()))
        for task in [*tasks, *self._tasks]:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, *self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        self.found.refused = dict(self._refused)
        return self.found

    def _counts(self, at: float) -> bool:
        return self._from <= at < self._until

    def _body(self, words: tuple[int, int], tokens: tuple[int, int], *, stream: bool) -> bytes:
        chosen = self._random.choices(self._words, k=self._random.randint(*words))
        body = {
            "model": self.work.model, "prompt": " ".join(chosen), "max_tokens": self._random.randint(*tokens),
            "ignore_eos": True, "stream": stream, "temperature": 0,
        }  # fmt: skip
        return json.dumps(body).encode()

    @staticmethod
    def _head(headers: dict[str, str]) -> bytes:
        lines = [f"POST {PATH} HTTP/1.1", "host: localhost", "content-type: application/json"]
        return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), ""]).encode()

    async def _connect(self) -> Answer:
        loop, work = asyncio.get_running_loop(), self.work
        if work.uds:
            return (await loop.create_unix_connection(Answer, work.uds))[1]
        return (await loop.create_connection(Answer, "127.0.0.1", work.port))[1]

    # Realtime

    async def _arrivals(self) -> None:
        at = time.perf_counter()
        while True:
            at += self._random.expovariate(self.work.realtime_rate)
            if at >= self._until:
                return
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            task = asyncio.create_task(self._realtime())
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()

    async def _realtime_client(self, number: int) -> None:
        await asyncio.sleep(number * 0.003)
        while True:
            await self._realtime()

    async def _realtime(self) -> None:
        answer = self._idle.pop() if self._idle else await self._connect()
        if answer.transport is None:
            answer = await self._connect()
        times: list[float] = []
        answer.on_part = lambda at, _part: times.append(at)
        body = self._body(self.work.realtime_words, self.work.realtime_tokens, stream=True)
        sent = time.perf_counter()
        status = await answer.ask(self._head(self.work.realtime_headers), body)
        if status != 200:
            self._refused[f"realtime {status}"] += 1
            await asyncio.sleep(0.05)
        elif self._counts(sent):
            self.found.ttft.append(times[0] - sent)
            self.found.started.append(sent - self._from)
            self.found.gaps += [after - before for before, after in itertools.pairwise(times)]
            self.found.realtime_done += 1
            self.found.realtime_tokens += json.loads(body)["max_tokens"]
        if answer.transport is not None:
            self._idle.append(answer)

    # Batch

    async def _batch_worker(self, number: int) -> None:
        await asyncio.sleep(number * 0.002)
        answer = await self._connect()
        head = self._head(self.work.batch_headers)
        while True:
            if answer.transport is None:
                answer = await self._connect()
            parts: list[bytes] = []
            answer.on_part = lambda _at, part, parts=parts: parts.append(part)  # type: ignore[misc]
            body = self._body(self.work.batch_words, self.work.batch_tokens, stream=self.work.batch_streamed)
            sent = time.perf_counter()
            status = await answer.ask(head, body)
            if status == 200:
                self._batch_done(sent, parts, json.loads(body)["max_tokens"])
            else:
                self._refused[f"batch {status}"] += 1
                await asyncio.sleep(min(max(0.1, answer.retry_after), RETRY_AT_MOST_S))

    def _batch_done(self, sent: float, parts: list[bytes], tokens: int) -> None:
        now = time.perf_counter()
        if self.work.cooldown_s:
            inside = max(0.0, min(now, self._until) - max(sent, self._from))
            self.found.batch_tokens += tokens * inside / (now - sent)
            self.found.batch_done += inside > 0
            return
        if not self._counts(now):
            return
        self.found.batch_done += 1
        self.found.batch_seconds.append(now - sent)
        self.found.batch_tokens += tokens
        if not self.work.batch_streamed:
            self.found.batch_prompt_tokens += json.loads(b"".join(parts))["usage"]["prompt_tokens"]


def main() -> None:
    given: dict[str, Any] = json.load(sys.stdin)
    found = uvloop.run(Load(Work(**given)).run())
    json.dump(asdict(found), sys.stdout)


if __name__ == "__main__":
    main()
