"""What connections write within one iteration of the event loop leaves together, at its end.

Each write to a socket may wake the process at its other end, which costs the writer more than the write itself; a few
dozen in a row wake it once. What one connection writes in pieces leaves as one. Pieces of a stream do not wait here
(``write_now``): they mostly come alone, and then waiting costs them a tenth more.

Invariant: what a connection writes leaves in order and whole, at the latest at the end of the iteration, and before it
closes; what is held of one connection stays below ``HELD_BYTES``, so that the transport's own back-pressure works as
without. Must not know: what is written.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

HELD_BYTES = 16 * 1024
"""Anything longer is written at once: such a write costs more than whom it wakes, and would have to be copied."""
MOST_HELD = 32
"""So many connections' writes wait at most, so that the first of a full iteration does not wait for its last."""

_log = logging.getLogger(__name__)


class Outbox:
    """The writes that wait, of all connections of one event loop."""

    __slots__ = ("call_soon", "due", "waiting")

    def __init__(self) -> None:
        self.waiting: list[HeldTransport] = []
        self.due = False  # somebody waits, and the end of this iteration is asked for
        self.call_soon: Callable[..., object] | None = None

    def wrap(self, transport: asyncio.BaseTransport) -> HeldTransport:
        """``transport``, with writes that wait here."""
        self.call_soon = asyncio.get_running_loop().call_soon
        return HeldTransport(self, transport)

    def ask(self) -> None:
        """Somebody waits: come back at the end of this iteration."""
        self.due = True
        assert self.call_soon is not None  # noqa: S101 - who waits was wrapped
        self.call_soon(self.flush)

    def flush(self) -> None:
        """Write what waits. Idempotent."""
        self.due = False
        waiting, self.waiting = self.waiting, []
        for one in waiting:
            try:
                one.flush()
            except Exception:  # noqa: BLE001 - one connection's trouble must not keep back what others have written
                _log.exception("a write failed")
                one.abort()


class HeldTransport:
    """A stream transport whose writes wait in an ``Outbox``. All else is the transport's own. ``inner`` is for who must
    not pay for a detour; nobody else writes to it. (An ``asyncio.Transport`` in all but name: mypyc makes fast code
    only of classes whose bases are compiled too.)"""

    __slots__ = ("_held", "_outbox", "inner")

    def __init__(self, outbox: Outbox, inner: Any) -> None:  # uvloop's are no asyncio.Transport by name
        self._outbox = outbox
        self.inner = inner
        self._held = b""

    # Writing

    def write(self, data: bytes) -> None:  # nobody writes what may change afterwards
        if self._held:
            data = self._held + data
            self._held = b""
            if len(data) <= HELD_BYTES:
                self._held = data  # it waits already
                return
        if len(data) > HELD_BYTES:
            self.inner.write(data)
            return
        self._held = data
        outbox = self._outbox
        outbox.waiting.append(self)
        if not outbox.due:
            outbox.ask()
        elif len(outbox.waiting) >= MOST_HELD:
            outbox.flush()

    def write_now(self, data: bytes) -> None:
        """Write what waits and this, without waiting for others. What nobody can get any more is dropped."""
        if self._held:
            self.flush()
        inner = self.inner
        if not inner.is_closing():
            inner.write(data)

    def flush(self) -> None:
        """Write what waits. Idempotent; what nobody can get any more is dropped."""
        held = self._held
        if held:
            self._held = b""
            self.write_now(held)

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        return bool(self.inner.can_write_eof())

    def write_eof(self) -> None:
        self.flush()
        self.inner.write_eof()

    def get_write_buffer_size(self) -> int:
        return len(self._held) + int(self.inner.get_write_buffer_size())

    def get_write_buffer_limits(self) -> tuple[int, int]:
        low, high = self.inner.get_write_buffer_limits()
        return int(low), int(high)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.inner.set_write_buffer_limits(high, low)

    # The end

    def close(self) -> None:
        self.flush()
        self.inner.close()

    def abort(self) -> None:
        self._held = b""
        self.inner.abort()

    def is_closing(self) -> bool:
        return bool(self.inner.is_closing())

    def is_clear(self) -> bool:
        """Whether it is open and everything that was written has left."""
        return not (self._held or self.inner.is_closing() or self.inner.get_write_buffer_size())

    # The rest

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.inner.get_extra_info(name, default)

    def get_protocol(self) -> asyncio.BaseProtocol:
        protocol: asyncio.BaseProtocol = self.inner.get_protocol()
        return protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.inner.set_protocol(protocol)

    def is_reading(self) -> bool:
        return bool(self.inner.is_reading())

    def pause_reading(self) -> None:
        self.inner.pause_reading()

    def resume_reading(self) -> None:
        self.inner.resume_reading()
