"""The load: streams of completions over a Unix socket, with the time of every event. As cheap as it can be.

Prompts go as token ids, so that an engine and the simulator read the same number of tokens; ``ignore_eos`` makes the
answers as long as asked. A connection is used again when it was idle for less than the engines' keep-alive time.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httptools

from bench.simfit import trace

REUSE_WITHIN_S = 3.0


@dataclass(slots=True)
class Outcome:
    """One request as its client saw it. Times are seconds of ``perf_counter``; ``events`` one for each SSE event."""

    request: trace.Request
    sent: float = 0.0
    events: list[float] = field(default_factory=list)
    ended: float = 0.0
    status: int = 0

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.ended > 0 and len(self.events) > 0

    @property
    def ttft(self) -> float:
        return self.events[0] - self.sent


class Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.idle_since = 0.0
        self._outcome: Outcome | None = None
        self._done: asyncio.Future[bool] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.closed = False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.closed = True
        self._finish(kept=False)

    async def ask(self, body: bytes, outcome: Outcome) -> bool:
        """Send and read the whole answer. True when the connection may be used again."""
        self._parser = httptools.HttpResponseParser(self)
        self._outcome = outcome
        self._done = asyncio.get_running_loop().create_future()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json\r\n"
        outcome.sent = time.perf_counter()
        self.transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        return await self._done

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if self._outcome is not None:
            count = body.count(b"data: {")
            if count:
                self._outcome.events += [time.perf_counter()] * count

    def on_message_complete(self) -> None:
        if self._outcome is not None:
            self._outcome.status = self._parser.get_status_code()
            self._outcome.ended = time.perf_counter()
        self._finish(kept=self._parser.should_keep_alive())

    def _finish(self, *, kept: bool) -> None:
        self._outcome = None
        self.idle_since = time.perf_counter()
        if self._done is not None and not self._done.done():
            self._done.set_result(kept)


class Client:
    """``model`` is asked for at the engine that listens on ``uds``."""

    def __init__(self, uds: str, model: str, *, seed: int = 0) -> None:
        self._uds, self._model, self._seed = uds, model, seed
        self._idle: list[Connection] = []
        self._sent = 0

    async def ask(
        self, request: trace.Request, body: bytes | None = None, *, into: list[Outcome] | None = None
    ) -> Outcome:
        """Send one request and read its answer. ``into``: a list that shows the outcome as it grows."""
        outcome = Outcome(request)
        if into is not None:
            into.append(outcome)
        body = body or self.body(request)
        connection = await self._connection()
        if await connection.ask(body, outcome) and not connection.closed:
            self._idle.append(connection)
        return outcome

    def body(self, request: trace.Request) -> bytes:
        self._sent += 1
        fields = {
            "model": self._model, "prompt": trace.prompt_ids(request, self._sent, self._seed), "temperature": 0,
            "max_tokens": request.output_tokens, "ignore_eos": True, "stream": True, "priority": request.priority,
        }  # fmt: skip
        return json.dumps(fields).encode()

    async def replay(self, requests: Sequence[trace.Request]) -> list[Outcome]:
        """Send each at its time, whatever the others do. All prompts are made before the first is sent."""
        bodies = [self.body(request) for request in requests]
        began = time.perf_counter() + 0.05

        async def one(request: trace.Request, body: bytes) -> Outcome:
            await asyncio.sleep(max(0.0, began + request.at - time.perf_counter()))
            return await self.ask(request, body)

        return await asyncio.gather(*map(one, requests, bodies))

    async def together(self, requests: Sequence[trace.Request]) -> list[Outcome]:
        """All at once."""
        bodies = [self.body(request) for request in requests]
        return await asyncio.gather(*map(self.ask, requests, bodies))

    async def closed_loop(self, requests: Sequence[trace.Request], streams: int) -> list[Outcome]:
        """``streams`` clients that each send the next request when their last was answered."""
        left = list(zip(requests, map(self.body, requests), strict=True))[::-1]
        outcomes: list[Outcome] = []

        async def one() -> None:
            while left:
                outcomes.append(await self.ask(*left.pop()))

        await asyncio.gather(*(one() for _ in range(streams)))
        return outcomes

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and time.perf_counter() - connection.idle_since < REUSE_WITHIN_S:
                return connection
            connection.transport.close()
        _, connection = await asyncio.get_running_loop().create_unix_connection(Connection, self._uds)
        return connection

    def close(self) -> None:
        for connection in self._idle:
            connection.transport.close()
