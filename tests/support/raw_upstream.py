"""An engine written by hand: a raw server whose every byte is the test's.

Invariant: it keeps exactly what arrived (``requests``) and sends exactly what a script says; it never repairs anything.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from vllm_bootstrap.serving import Endpoint

Script = Callable[["Visit"], Awaitable[None]]


def answer(body: bytes = b"{}", *, status: bytes = b"200 OK", headers: bytes = b"", keep: bool = True) -> bytes:
    """A plain answer with a Content-Length."""
    close = b"" if keep else b"connection: close\r\n"
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b%b\r\n%b" % (
        status, len(body), headers, close, body,
    )  # fmt: skip


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


@dataclass
class Visit:
    """One request on one connection, as the script sees it."""

    head: bytes
    body: bytes
    connection: int
    writer: asyncio.StreamWriter
    reader: asyncio.StreamReader

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def gone(self) -> None:
        """Wait until the other side has closed."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    def cut(self) -> None:
        self.writer.transport.abort()

    @property
    def lines(self) -> list[bytes]:
        return self.head.split(b"\r\n")[:-2]

    def header(self, name: bytes) -> list[bytes]:
        pairs = [line.partition(b":") for line in self.lines[1:]]
        return [value.strip() for key, _, value in pairs if key.lower() == name]


@dataclass
class RawUpstream:
    """Listens on a Unix socket. ``script`` is called for each request; the default answers with ``{}``."""

    path: Path
    script: Script | None = None
    reads_bodies: bool = True
    requests: list[Visit] = field(default_factory=list)
    connections: int = 0
    open: int = 0

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(uds=str(self.path), credential="internal-key")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[RawUpstream]:
        server = await asyncio.start_unix_server(self._serve, self.path)
        try:
            yield self
        finally:
            server.close()
            self.abort_all()
            await server.wait_closed()

    def __post_init__(self) -> None:
        self._writers: set[asyncio.StreamWriter] = set()

    def abort_all(self) -> None:
        """Cut every connection that is open."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        number = self.connections
        self._writers.add(writer)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await self._serve_requests(reader, writer, number)
        except asyncio.CancelledError:
            pass
        finally:
            self.open -= 1
            self._writers.discard(writer)
            writer.close()

    async def _serve_requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            visit = Visit(head, b"", number, writer, reader)
            length = visit.header(b"content-length")
            if self.reads_bodies and length:
                visit.body = await reader.readexactly(int(length[0]))
            self.requests.append(visit)
            if self.script is None:
                await visit.send(answer())
            else:
                await self.script(visit)
            if writer.is_closing():
                return
