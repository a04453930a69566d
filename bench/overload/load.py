"""The load of the overload bench, in a process of its own: an open loop with random arrivals.

``python -m bench.overload.load PORT KEY RATE SECONDS SEED TOKENS``

Requests arrive as a Poisson process of RATE a second, whatever has become of the earlier ones; every second one asks
for a stream. Each goes on an idle kept connection or opens a new one. RATE 0 measures capacity instead: a closed loop
of CLOSED connections. Times run from the moment at which a request was due, so that a late load hides nothing; how late
each was sent is told too (``late``). Prints one JSON object; times in ms.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any

import httptools
import uvloop

CLOSED = 96
# A request that has not ended so long after the last arrival counts as hung.
PATIENCE_S = 60.0


class Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.transport: Any = None
        self.parser = httptools.HttpResponseParser(self)
        self.due: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self, request: bytes, due: float) -> None:
        self.due, self.first, self.retry_after = due, 0.0, 0
        self.tail, self.events = b"", 0
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self.retry_after = int(value)

    def on_body(self, body: bytes) -> None:
        self.first = self.first or time.perf_counter()
        self.events += body.count(b"data: {")
        self.tail = (self.tail + body)[-4096:]

    def on_message_complete(self) -> None:
        status, keep = self.parser.get_status_code(), self.parser.should_keep_alive()
        self.parser = httptools.HttpResponseParser(self)
        due, self.due = self.due, None
        assert due is not None
        self.run.answered(self, status, due)
        if keep:
            self.run.idle.append(self)
        else:
            self.transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        if self in self.run.idle:
            self.run.idle.remove(self)
        if self.due is not None:
            self.run.count("lost")


class Run:
    """``finished``: (time of arrival since the start, time to the first byte if streamed, to the end, tokens) of good
    answers; ``refused``: (time to the end, status, Retry-After)."""

    def __init__(self, port: int, key: str, tokens: int) -> None:
        self.port, self.tokens = port, tokens
        self.idle: list[Client] = []
        self.pending = 0
        self.others: Counter[str] = Counter()
        self.finished: list[tuple[float, float | None, float, int]] = []
        self.refused: list[tuple[float, int, int]] = []
        self.late: list[float] = []
        self.began = time.perf_counter()
        self.changed = asyncio.Event()
        self.requests = [self._request(key, stream=stream) for stream in (False, True)]

    def _request(self, key: str, *, stream: bool) -> bytes:
        asked: dict[str, Any] = {"model": "bench", "prompt": "hello " * 16, "max_tokens": self.tokens}
        body = json.dumps({**asked, "ignore_eos": True, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAuthorization: Bearer {key}\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    async def send(self, number: int, due: float) -> None:
        self.pending += 1
        self.late.append((time.perf_counter() - due) * 1000)
        try:
            client = self.idle.pop() if self.idle else await self._connect()
        except OSError:
            self.count("no connection")
        else:
            client.ask(self.requests[number % 2], due)

    async def _connect(self) -> Client:
        _, client = await asyncio.get_running_loop().create_connection(lambda: Client(self), "127.0.0.1", self.port)
        return client

    def answered(self, client: Client, status: int, due: float) -> None:
        now = time.perf_counter()
        took = (now - due) * 1000
        # The simulator answers with as many tokens as were asked for; a stream proves it by its end.
        whole = client.tail.endswith(b"data: [DONE]\n\n") if client.events else b'"usage"' in client.tail
        if status == 200 and whole and b'"error"' not in client.tail:
            first = (client.first - due) * 1000 if client.events else None
            self.finished.append((due - self.began, first, took, self.tokens))
        elif status in (429, 503):
            self.refused.append((took, status, client.retry_after))
        else:
            self.others[str(status) if status != 200 else "broken"] += 1
        self._ended()

    def count(self, what: str) -> None:
        self.others[what] += 1
        self._ended()

    def _ended(self) -> None:
        self.pending -= 1
        self.changed.set()

    async def quiet(self) -> None:
        deadline = time.perf_counter() + PATIENCE_S
        while self.pending and time.perf_counter() < deadline:
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), 1)
            except TimeoutError:
                continue
        if self.pending:
            self.others["hung"] += self.pending


async def open_loop(run: Run, rate: float, seconds: float, seed: int) -> int:
    """Send at random moments; how many were sent."""
    arrivals, sent, due = random.Random(seed), 0, run.began
    tasks: set[asyncio.Task[None]] = set()
    while (due := due + arrivals.expovariate(rate)) < run.began + seconds:
        if (ahead := due - time.perf_counter()) > 0:
            await asyncio.sleep(ahead)
        task = asyncio.create_task(run.send(sent, due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        sent += 1
    if tasks:
        await asyncio.wait(tasks)
    return sent


async def closed_loop(run: Run, seconds: float) -> int:
    sent = 0
    while time.perf_counter() < run.began + seconds:
        while run.pending < CLOSED:
            await run.send(sent, time.perf_counter())
            sent += 1
        run.changed.clear()
        await run.changed.wait()
    return sent


async def main() -> None:
    port, key, rate, seconds, seed, tokens = sys.argv[1:]
    run = Run(int(port), key, int(tokens))
    began = time.perf_counter()
    if float(rate):
        sent = await open_loop(run, float(rate), float(seconds), int(seed))
    else:
        sent = await closed_loop(run, float(seconds))
    lasted = time.perf_counter() - began
    await run.quiet()
    seen = {"finished": run.finished, "refused": run.refused, "late": run.late, "others": run.others}
    print(json.dumps({"sent": sent, "seconds": lasted, **seen}))


if __name__ == "__main__":
    uvloop.run(main())
