"""The daemon's side of one control connection: requests with answers, and events. asyncio.

Invariant: every request ends, by an answer, by the connection's end (``ConnectionError``) or by its time limit
(``TimeoutError``). It must not know what the messages mean.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_bootstrap.launches.shim import protocol

Message = dict[str, Any]


class ControlConnection:
    """Made by ``over``. ``closed`` is set once nothing more will come."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._on_event: Callable[[Message], None] | None = None
        self._early: list[Message] = []
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self.closed = asyncio.Event()
        self._receiving = asyncio.create_task(self._receive())

    @classmethod
    async def over(cls, sock: socket.socket) -> ControlConnection:
        """Speak over a connected socket, which belongs to the connection from now on."""
        try:
            reader, writer = await asyncio.open_unix_connection(sock=sock, limit=protocol.MAX_LINE)
        except BaseException:
            sock.close()
            raise
        return cls(reader, writer)

    def listen(self, on_event: Callable[[Message], None]) -> None:
        """Deliver events there, those that came before this call first. ``on_event`` must not raise."""
        self._on_event = on_event
        early, self._early = self._early, []
        for event in early:
            on_event(event)

    async def request(self, op: str, *, timeout_s: float, **fields: Any) -> Message:
        """Ask and wait for the answer, refusals included. Raises ``ConnectionError``, ``TimeoutError``."""
        if self.closed.is_set():
            raise ConnectionResetError("the shim's connection is closed")
        number = next(self._numbers)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(protocol.encode({"id": number, "op": op, **fields}))
                await self._writer.drain()
                return await answer
        finally:
            self._waiting.pop(number, None)
            if answer.done() and not answer.cancelled():
                answer.exception()  # taken note of: drain() may have failed first, for the same reason

    def close(self) -> None:
        """Disconnect. Waiting requests get ``ConnectionError``. Idempotent."""
        self._receiving.cancel()
        self._end()

    async def _receive(self) -> None:
        try:
            while line := await self._reader.readline():
                self._dispatch(protocol.decode(line))
        except (OSError, ValueError, KeyError, TypeError, protocol.ProtocolError):
            return  # a peer that talks nonsense is a gone peer
        finally:
            self._end()

    def _dispatch(self, message: Message) -> None:
        if "event" in message:
            if self._on_event is None:
                self._early.append(message)
            else:
                self._on_event(message)
            return
        answer = self._waiting.get(message.get("id", 0))
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _end(self) -> None:
        self.closed.set()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ConnectionResetError("the shim's connection ended"))
        self._writer.close()


class StrangerAnswers(ConnectionRefusedError):
    """Something else listens where a shim should, or one that cannot be understood; waiting does not help."""


def connect(control_dir: Path, *, pid: int) -> socket.socket:
    """Connect to a shim's socket; the other end must be that very process. Never waits. Raises ``OSError``."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        protocol.at_socket(str(control_dir), sock.connect)
        peer = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        if peer[0] != pid:
            raise StrangerAnswers(f"process {peer[0]} listens where shim {pid} should")
    except BaseException:
        sock.close()
        raise
    return sock
