"""The floor of the proxy bench: what a splice in Python costs that does nothing but parse and pass on.

``python -m bench.proxy.splice PORT BACKEND_PORT``: each client's connection has one of its own to the backend. Both
directions go through llhttp on uvloop, so that no byte is passed on whose framing was not understood, and leave as they
came. No keys, no routes, no scheduler, no limits, no counts, no log, no back-pressure: what ours costs beyond this is
what its features cost, and below this no proxy gets whose pieces pass through Python.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import httptools
import uvloop


class End(asyncio.Protocol):
    """One end of a pair. ``other`` is where its bytes go."""

    def __init__(self, parser: type[httptools.HttpRequestParser | httptools.HttpResponseParser]) -> None:
        self.parser = parser(self)
        self.other: asyncio.Transport | None = None
        self.early = b""  # came before there was an other end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)
        if self.other is not None:
            self.other.write(data)
        else:
            self.early += data

    def on_body(self, body: bytes) -> None:
        """As a proxy that looks at bodies has it called."""

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self.other is not None:
            self.other.close()


class Client(End):
    """The client's end; opens the other one."""

    def __init__(self, backend_port: int) -> None:
        super().__init__(httptools.HttpRequestParser)
        self.backend_port = backend_port

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.opening = asyncio.get_running_loop().create_task(self.open())

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        made = lambda: End(httptools.HttpResponseParser)  # noqa: E731
        _, backend = await loop.create_connection(made, "127.0.0.1", self.backend_port)
        if self.transport.is_closing():
            backend.transport.close()
            return
        backend.other, self.other = self.transport, backend.transport
        if self.early:
            self.other.write(self.early)


async def main() -> None:
    port, backend_port = int(sys.argv[1]), int(sys.argv[2])
    server = await asyncio.get_running_loop().create_server(
        lambda: Client(backend_port), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
