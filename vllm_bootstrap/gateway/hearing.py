"""Whether a client that is being sent to is there at all.

TCP's keep-alive (``doors.py``) asks only while nothing is on its way to the client. What is on its way is sent again
and again for a quarter of an hour, and meanwhile a stream would go on for nobody.

Invariant: a client is given up only if bytes were on their way for all of the time and not one packet came back. One
that does not read, or is slow, still acknowledges. Must not know: requests, answers.
"""

from __future__ import annotations

import math
import socket
import struct
from typing import Any, Protocol

# In Linux's tcp_info: packets that are not acknowledged, and the milliseconds since anything was.
_UNACKNOWLEDGED, _QUIET_MS = 24, 56
_INFO_BYTES = 60
_number = struct.Struct("=I")


class HasSocket(Protocol):
    """A transport, as far as it is needed here."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """``socket`` is asked for."""


class Hearing:
    """Of one client. ``after_s``: how long it may say nothing, in seconds."""

    __slots__ = ("_after_s", "_heard_at", "_next_at")

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s if hasattr(socket, "TCP_INFO") else math.inf
        self._heard_at = self._next_at = 0.0

    def is_lost(self, transport: HasSocket, now: float) -> bool:
        """Whether nothing was heard for so long. To be asked again and again, with loop time."""
        if now < self._next_at:
            return False
        late = now - self._next_at >= self._after_s / 2  # it was not asked, or the machine stood still
        self._next_at = now + self._after_s / 4
        info = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        (waiting,), (quiet_ms,) = _number.unpack_from(info, _UNACKNOWLEDGED), _number.unpack_from(info, _QUIET_MS)
        if late or not waiting or now - quiet_ms / 1000 > self._heard_at:
            self._heard_at = now  # or before: since when it has owed something is not known better than this
        return now - self._heard_at >= self._after_s
