"""The shim's side of its connections: accept, read lines, write lines, never wait for anybody. Standard library only.

Invariant: a peer that is dead, frozen or slow costs at most ``MAX_UNSENT`` bytes, then its connection; nothing here
blocks. Only processes of our own user get through (``SO_PEERCRED``), checked beside the socket's mode.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct

from . import protocol
from .order import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_CONNECTIONS = 16
MAX_UNSENT = 256 * 1024
READ_BYTES = 64 * 1024


class Connection:
    """One daemon. ``first`` marks the inherited connection, ``wants_events`` one that has said hello."""

    def __init__(self, sock: socket.socket, *, first: bool = False) -> None:
        sock.setblocking(False)
        self.sock, self.first = sock, first
        self.wants_events = False
        self.unsent = bytearray()
        self.lines = protocol.LineBuffer()

    def send(self, message: dict[str, Any]) -> None:
        """Queue and try to send. Raises ``OSError`` when the peer is gone or takes nothing."""
        self.unsent += protocol.encode(message)
        self.flush()
        if len(self.unsent) > MAX_UNSENT:
            raise BrokenPipeError("the peer does not read")

    def flush(self) -> None:
        """Send what can be sent now. Raises ``OSError``."""
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                sent = self.sock.send(self.unsent, socket.MSG_NOSIGNAL)
                del self.unsent[:sent]


class Server:
    """All connections of one shim, driven by the shim's poll loop.

    ``answer(connection, request)`` returns the fields of the reply or raises ``Refused``.
    """

    def __init__(
        self,
        poll: select.poll,
        control_dir: str,
        inherited: socket.socket,
        answer: Callable[[Connection, dict[str, Any]], dict[str, Any]],
    ) -> None:
        self._poll, self._answer, self._control_dir = poll, answer, control_dir
        self._connections: dict[int, Connection] = {}
        self.first_is_open = True
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        protocol.at_socket(control_dir, self._listener.bind)
        os.chmod(f"{control_dir}/{protocol.SOCKET}", 0o600)
        self._listener.listen(MAX_CONNECTIONS)
        poll.register(self._listener, select.POLLIN)
        self._add(Connection(inherited, first=True))

    def handle(self, fd: int, events: int) -> None:
        """React to what ``poll`` reported. Descriptors that are not ours are ignored."""
        if fd == self._listener.fileno():
            self._accept()
            return
        connection = self._connections.get(fd)
        if connection is None:
            return
        try:
            if events & select.POLLOUT:
                connection.flush()
            if events & ~select.POLLOUT:
                self._receive(connection)
            self._watch(connection)
        except (OSError, protocol.ProtocolError):
            self._drop(connection)

    def broadcast(self, event: dict[str, Any]) -> None:
        """Tell everybody who has said hello."""
        for connection in list(self._connections.values()):
            if connection.wants_events:
                try:
                    connection.send(event)
                    self._watch(connection)
                except OSError:
                    self._drop(connection)

    def unsent(self) -> bool:
        """Whether any peer has not taken everything yet."""
        return any(connection.unsent for connection in self._connections.values())

    def close(self) -> None:
        """Leave no socket file behind."""
        with contextlib.suppress(OSError):
            os.unlink(f"{self._control_dir}/{protocol.SOCKET}")
        self._poll.unregister(self._listener)
        self._listener.close()
        for connection in list(self._connections.values()):
            self._drop(connection)

    def _add(self, connection: Connection) -> None:
        self._connections[connection.sock.fileno()] = connection
        self._poll.register(connection.sock, select.POLLIN)

    def _drop(self, connection: Connection) -> None:
        del self._connections[connection.sock.fileno()]
        self._poll.unregister(connection.sock)
        connection.sock.close()
        if connection.first:
            self.first_is_open = False

    def _watch(self, connection: Connection) -> None:
        self._poll.modify(connection.sock, select.POLLIN | (select.POLLOUT if connection.unsent else 0))

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        if uid != os.geteuid() or len(self._connections) >= MAX_CONNECTIONS:
            sock.close()
            return
        self._add(Connection(sock))

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionResetError("the peer closed")
        for request in connection.lines.feed(data):
            reply: dict[str, Any] = {"id": request.get("id")}
            try:
                reply.update(ok=True, **self._answer(connection, request))
            except Refused as exc:
                reply.update(ok=False, kind=exc.kind, reason=str(exc))
            connection.send(reply)
