"""The load of the proxy bench, in a process of its own.

``python -m bench.proxy.load PORT PATH KEY requests|streams N TOTAL``

``requests``: N connections send TOTAL requests, each the next as soon as the last was answered. ``streams``: N streams
at once, started evenly over half a second. Prints one JSON object: counts, seconds, times to first byte in ms.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import httptools
import uvloop


class Client(asyncio.Protocol):
    def __init__(self, request: bytes, run: Run) -> None:
        self.request, self.run = request, run
        self.parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        self.began, self.first = time.perf_counter(), True
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if self.first:
            self.first = False
            self.run.first_byte_ms.append((time.perf_counter() - self.began) * 1000)
        self.run.events += body.count(b"data: x")

    def on_message_complete(self) -> None:
        status = self.parser.get_status_code()
        self.parser = httptools.HttpResponseParser(self)
        if self.run.answered(ok=status == 200):
            self.send()
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.run.lost(exc)


class Run:
    """Counts of one run. ``answered`` says whether its connection is to send another request."""

    def __init__(self, total: int, connections: int) -> None:
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


async def main() -> None:
    port, path, key, kind, connections, total = sys.argv[1:]
    body = json.dumps({"model": "bench", "prompt": "hello", "stream": kind == "streams"}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\n"
    request = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    run = Run(int(total), int(connections))
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    for _ in range(int(connections)):
        await loop.create_connection(lambda: Client(request, run), "127.0.0.1", int(port))
        if kind == "streams":
            await asyncio.sleep(0.5 / int(connections))
    await run.over.wait()
    seconds = time.perf_counter() - began
    result = {"done": run.done, "failed": run.failed, "events": run.events, "seconds": seconds}
    print(json.dumps({**result, "first_byte_ms": sorted(run.first_byte_ms)}))


if __name__ == "__main__":
    uvloop.run(main())
