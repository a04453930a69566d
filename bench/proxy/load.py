"""The load of the proxy bench, in a process of its own.

``python -m bench.proxy.load PORT KEY WORK``, where WORK is one of

* ``requests N TOTAL [PATH MODEL [numbered]]``: N connections send TOTAL requests, each the next as soon as the last was
  answered; ``numbered``: no two of them have the same head;
* ``paced N TOTAL``: the same, but each connection sends one request every 100 ms, all of them evenly spread;
* ``streams N EVENTS MS IDLE``: N streams at once, begun within half a second, beside IDLE connections that have had one
  answer each and say nothing more. With IDLE it prints ``ready`` once they are there and waits for a line before.

Prints one JSON object: counts, seconds, times to first byte in ms.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time

import httptools
import uvloop

PACE_S = 0.1
# A chunk of the backend as it comes when nothing delayed it: counted without a parser.
EVENT_START = b"data: x"


class Run:
    """Counts of one run. ``answered`` says whether its connection is to send another request."""

    def __init__(self, request: bytes, total: int, connections: int, *, pace_s: float = 0.0) -> None:
        self.request = self.plain = request
        self.pace_s, self.sent = pace_s, 0
        self.left, self.open = total - connections, connections
        self.done = self.failed = self.events = 0
        self.first_byte_ms: list[float] = []
        self.over = asyncio.Event()

    def answered(self, *, ok: bool) -> bool:
        self.done += ok
        self.failed += not ok
        self.left -= 1
        return self.left >= 0

    def lost(self, exc: Exception | None) -> None:
        self.failed += exc is not None
        self.open -= 1
        if self.open == 0:
            self.over.set()


class Client(asyncio.Protocol):
    def __init__(self, run: Run) -> None:
        self.run = run
        self.loop = asyncio.get_running_loop()
        self.parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.due = self.loop.time()
        self.send()

    def send(self) -> None:
        self.began, self.first = time.perf_counter(), True
        self.transport.write(self.run.request)

    def data_received(self, data: bytes) -> None:
        if self.first:
            self.first = False
            self.run.first_byte_ms.append((time.perf_counter() - self.began) * 1000)
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.run.events += body.count(EVENT_START)

    def on_message_complete(self) -> None:
        status = self.parser.get_status_code()
        self.parser = httptools.HttpResponseParser(self)
        if not self.run.answered(ok=status == 200):
            self.transport.close()
        elif self.run.pace_s:
            self.due += self.run.pace_s
            self.loop.call_at(self.due, self.send)
        else:
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        self.run.lost(exc)


class Numbering(Client):
    """Gives each request a head of its own, as a client that is traced does."""

    def send(self) -> None:
        run = self.run
        run.sent += 1
        trace = b"\r\ntraceparent: 00-%032x-%016x-01\r\n\r\n" % (run.sent, run.sent)
        run.request = run.plain.replace(b"\r\n\r\n", trace, 1)
        super().send()


class Idler(Client):
    """Has one answer and stays."""

    def on_message_complete(self) -> None:
        self.run.done += 1


def request(port: int, key: str, *, stream: str = "", path: str = "/v1/completions", model: str = "bench") -> bytes:
    body = json.dumps({"model": model, "prompt": stream or "hello", "stream": bool(stream)}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def idle(port: int, key: str, count: int) -> None:
    """Open connections that stay open, and wait until the caller has looked at them."""
    run = Run(request(port, key), count, count)
    for _ in range(count):
        await asyncio.get_running_loop().create_connection(lambda: Idler(run), "127.0.0.1", port)
    while run.done < count:
        await asyncio.sleep(0.01)
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


async def main() -> None:
    port, key, kind, connections, *rest = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), *sys.argv[5:]
    client: type[Client] = Client
    if kind == "streams":
        events, interval_ms, idlers = map(int, rest)
        if idlers:
            await idle(int(port), key, idlers)
        run = Run(request(int(port), key, stream=f"events/ms {events}/{interval_ms}"), connections, connections)
        spread_s = 0.5 if connections > 1 else 0.0
    else:
        asked = request(int(port), key, **dict(zip(("path", "model"), rest[1:3], strict=False)))
        client = Numbering if rest[3:] == ["numbered"] else Client
        run = Run(asked, int(rest[0]), connections, pace_s=PACE_S if kind == "paced" else 0.0)
        spread_s = PACE_S if kind == "paced" else 0.0
    loop = asyncio.get_running_loop()
    gc.disable()
    began, due = time.perf_counter(), loop.time()
    for _ in range(connections):
        await loop.create_connection(lambda: client(run), "127.0.0.1", int(port))
        if spread_s:
            due += spread_s / connections
            await asyncio.sleep(due - loop.time())
    await run.over.wait()
    seconds = time.perf_counter() - began
    result = {"done": run.done, "failed": run.failed, "events": run.events, "seconds": seconds}
    print(json.dumps({**result, "first_byte_ms": sorted(run.first_byte_ms)}))


if __name__ == "__main__":
    uvloop.run(main())
