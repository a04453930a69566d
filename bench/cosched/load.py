"""Load for the co-scheduling bench, as a process of its own: realtime streams that arrive at random, beside a batch.

Realtime: a Poisson process of streamed completions with short prompts; arrivals do not wait for answers. When they come
and what they ask is settled by the seed before the first is sent, whatever the engine does. Batch: a fixed number of
whole answers in flight at all times, each with a longer prompt. No two prompts share a beginning, so that no prefix
cache helps. Reads one JSON object (``Work``) from stdin, writes one (``Found``) to stdout.

Measured are ``seconds``, after ``warmup_s``; the same load goes on for ``cooldown_s`` more. Of realtime, what was sent
in the measured time counts; an answer that has not begun by the end counts as one that begins then, so it does not
drop out. Of batch, complete answers count, by the part of their life that lay in the measured time: work that was
thrown away counts nothing. Where ``x-queue-ms`` says how long a request waited before anything was sent to an engine,
its life begins after that.
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
LAST_PART = b"data: [DONE]\n\n"  # no token


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
    seed: int = 1


@dataclass
class Found:
    """What was seen in the measured time. Times in seconds. ``unanswered``: of ``ttft``, answers that never began."""

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    realtime_tokens: int = 0
    realtime_done: int = 0
    unanswered: int = 0
    batch_tokens: float = 0
    batch_done: int = 0
    refused: dict[str, int] = field(default_factory=dict)


class Answer(asyncio.Protocol):
    """One connection with at most one request on it. ``on_part(time, bytes)`` is told of each part of a body."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.done: asyncio.Future[int] | None = None
        self.on_part: Callable[[float, bytes], None] = lambda _at, _part: None
        self._parser: Any = None
        self.retry_after = self.queued_s = 0.0

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
        self.retry_after = self.queued_s = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        return self.done

    # httptools
    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self.retry_after = float(value)
        elif name.lower() == b"x-queue-ms":
            self.queued_s = int(value) / 1000

    def on_body(self, part: bytes) -> None:
        self.on_part(time.perf_counter(), part)

    def on_message_complete(self) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_result(self._parser.get_status_code())


class Asked:
    """One realtime request and the times at which parts of its answer came."""

    def __init__(self, sent: float, tokens: int) -> None:
        self.sent, self.tokens = sent, tokens
        self.times: list[float] = []
        self.done = self.refused = False

    def part(self, at: float, part: bytes) -> None:
        if part != LAST_PART:
            self.times.append(at)


class Load:
    def __init__(self, work: Work) -> None:
        self.work, self.found = work, Found()
        self._idle: list[Answer] = []
        self._refused: Counter[str] = Counter()
        chance = random.Random(0)
        self._words = ["".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(4000)]
        self._from = self._until = self._end = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked: list[Asked] = []

    async def run(self) -> Found:
        work = self.work
        trace = self._trace()
        start = time.perf_counter()
        self._from = start + work.warmup_s
        self._until = self._from + work.seconds
        self._end = self._until + work.cooldown_s
        jobs = [self._batch_worker(number) for number in range(work.batch)]
        jobs += [self._realtime_client(number) for number in range(work.realtime_clients)]
        tasks = [asyncio.create_task(job) for job in jobs]
        await self._arrivals(start, trace)
        await asyncio.sleep(max(0.0, self._end - time.perf_counter()))
        for task in [*tasks, *self._tasks]:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, *self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        self._realtime_found()
        self.found.refused = dict(self._refused)
        return self.found

    def _trace(self) -> list[tuple[float, bytes, int]]:
        """All realtime requests to come: seconds after the start, body, tokens of the answer."""
        work, chance = self.work, random.Random(f"{self.work.seed} realtime")
        trace: list[tuple[float, bytes, int]] = []
        at, end = 0.0, work.warmup_s + work.seconds + work.cooldown_s
        while work.realtime_rate and (at := at + chance.expovariate(work.realtime_rate)) < end:
            trace.append((at, *self._body(chance, work.realtime_words, work.realtime_tokens, stream=True)))
        return trace

    def _body(
        self, chance: random.Random, words: tuple[int, int], tokens: tuple[int, int], *, stream: bool
    ) -> tuple[bytes, int]:
        chosen = chance.choices(self._words, k=chance.randint(*words))
        most = chance.randint(*tokens)
        body = {
            "model": self.work.model, "prompt": " ".join(chosen), "max_tokens": most,
            "ignore_eos": True, "stream": stream, "temperature": 0,
        }  # fmt: skip
        return json.dumps(body).encode(), most

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

    async def _arrivals(self, start: float, trace: list[tuple[float, bytes, int]]) -> None:
        for at, body, tokens in trace:
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            task = asyncio.create_task(self._realtime(body, tokens))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()

    async def _realtime_client(self, number: int) -> None:
        chance = random.Random(f"{self.work.seed} client {number}")
        await asyncio.sleep(number * 0.003)
        while True:
            await self._realtime(*self._body(chance, self.work.realtime_words, self.work.realtime_tokens, stream=True))

    async def _realtime(self, body: bytes, tokens: int) -> None:
        answer = self._idle.pop() if self._idle else await self._connect()
        if answer.transport is None:
            answer = await self._connect()
        asked = Asked(time.perf_counter(), tokens)
        self._asked.append(asked)
        answer.on_part = asked.part
        status = await answer.ask(self._head(self.work.realtime_headers), body)
        asked.done, asked.refused = status == 200, status != 200
        if status != 200:
            self._refused[f"realtime {status}"] += 1
            await asyncio.sleep(0.05)
        if answer.transport is not None:
            self._idle.append(answer)

    def _realtime_found(self) -> None:
        found, now = self.found, time.perf_counter()
        for asked in self._asked:
            if asked.refused:
                continue
            found.realtime_tokens += sum(self._from <= at < self._until for at in asked.times)
            if not self._from <= asked.sent < self._until:
                continue
            found.ttft.append((asked.times[0] if asked.times else now) - asked.sent)
            found.unanswered += not asked.times
            found.gaps += [after - before for before, after in itertools.pairwise(asked.times)]
            found.realtime_done += asked.done

    # Batch

    async def _batch_worker(self, number: int) -> None:
        chance = random.Random(f"{self.work.seed} batch {number}")
        await asyncio.sleep(number * 0.002)
        answer = await self._connect()
        head = self._head(self.work.batch_headers)
        while True:
            if answer.transport is None:
                answer = await self._connect()
            body, tokens = self._body(chance, self.work.batch_words, self.work.batch_tokens, stream=False)
            sent = time.perf_counter()
            status = await answer.ask(head, body)
            if status == 200:
                self._batch_done(sent + answer.queued_s, tokens)
            else:
                self._refused[f"batch {status}"] += 1
                await asyncio.sleep(min(max(0.1, answer.retry_after), RETRY_AT_MOST_S))

    def _batch_done(self, began: float, tokens: int) -> None:
        now = time.perf_counter()
        inside = max(0.0, min(now, self._until) - max(began, self._from))
        self.found.batch_tokens += tokens * inside / (now - began)
        self.found.batch_done += inside > 0


def main() -> None:
    given: dict[str, Any] = json.load(sys.stdin)
    found = uvloop.run(Load(Work(**given)).run())
    json.dump(asdict(found), sys.stdout)


if __name__ == "__main__":
    main()
