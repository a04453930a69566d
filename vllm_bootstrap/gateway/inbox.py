"""What a client has sent and nobody has used yet: whole or partial heads, and where the current body ends. PURE.

Invariant: a head is given out once it is whole, a body's bytes never contain bytes of the next request (a
``Content-Length`` is counted here; where chunks end only the parser knows, and it must be told to stop there). At most
``MAX_AHEAD`` bytes are kept beside the request that is being answered. Knows no sockets, parsers or routes.
"""

from __future__ import annotations

from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.gateway.head import Head, HeadLimits, too_large

MAX_AHEAD = 64 * 1024
"""Bytes a client may send before its earlier request has been answered."""

SMALL_REST = 64 * 1024
"""An unread rest of a body up to this size is dropped rather than closing the connection over it."""

_END_OF_HEAD = b"\r\n\r\n"


class Inbox:
    """Bytes of one connection. ``overflowed``: more was sent ahead than is kept, so the connection cannot go on after
    the current answer."""

    def __init__(self, limits: HeadLimits) -> None:
        self._limits = limits
        self._scanned = 0
        self._unread: int | None = 0
        self._waits_for_continue = False
        self.ahead = b""
        self.overflowed = False

    def add(self, data: bytes) -> None:
        """Bytes while no body is expected and no answer is owed."""
        self.ahead += data

    def add_early(self, data: bytes) -> None:
        """Bytes of a later request while an answer is owed."""
        self.ahead += data
        if len(self.ahead) > MAX_AHEAD:
            self.ahead = b""
            self.overflowed = True

    def take_head(self) -> bytes | None:
        """The next whole head, its empty line included; None when more must come. Raises ``ApiError`` as soon as it is
        clear that no valid head can come of it."""
        buffer = self.ahead
        if buffer.startswith(b"\r\n"):  # an empty line before a request is to be ignored
            self.ahead = buffer = buffer[2:]
            self._scanned = 0
        end = buffer.find(_END_OF_HEAD, self._scanned)
        if end >= 0:
            self._scanned = 0
            end += 4
            self.ahead = buffer[end:]
            return buffer[:end]
        self._scanned = max(0, len(buffer) - 3)
        if len(buffer) > self._limits.max_bytes:
            raise too_large(self._limits)
        if buffer.count(b"\n") != buffer.count(b"\r\n"):
            raise BadRequest("Lines of a request's head end in CR LF")
        return None

    def expect(self, head: Head) -> None:
        """A request begins; what follows is its body."""
        self._unread = None if head.chunked else head.content_length or 0
        self._waits_for_continue = head.expects_continue

    def take_ahead(self) -> bytes:
        """Everything that has come already."""
        ahead, self.ahead = self.ahead, b""
        return ahead

    def take_body(self, length: int) -> bytes | None:
        """All of a body of this length, instead of ``expect``; None when more of it must come."""
        ahead = self.ahead
        if len(ahead) < length:
            return None
        self._unread, self.ahead = 0, b""
        self._waits_for_continue = False
        if len(ahead) == length:
            return ahead
        self.add_early(ahead[length:])
        return ahead[:length]

    def body_part(self, data: bytes) -> bytes:
        """What of ``data`` belongs to the current body; the rest is kept for later."""
        self._waits_for_continue = False
        if self._unread is None:
            return data
        if len(data) > self._unread:
            self.add_early(data[self._unread :])
            data = data[: self._unread]
        self._unread -= len(data)
        return data

    @property
    def misses_some(self) -> bool:
        """Whether bytes of the current body are still to come, by its ``Content-Length``."""
        return bool(self._unread)

    @property
    def rest_is_small(self) -> bool:
        """Whether the rest of the current body may be read and dropped for the sake of keeping the connection."""
        return self._unread is not None and self._unread <= SMALL_REST and not self._waits_for_continue
