"""Server-sent events out of bytes, however they were cut. No input or output of its own.

Lines end at LF, CR or CRLF and nowhere else: splitting decoded text into lines would also break at characters that may
stand inside JSON.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event: ``name`` is ``message`` unless given, ``id`` the last one seen so far."""

    data: str
    name: str = "message"
    id: str | None = None


class EventParser:
    """Feed it what arrives. An event that the end of the stream cuts off is never given out."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._name = ""
        self._id: str | None = None

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events that are complete now."""
        *lines, self._rest = _LINE_END.split(self._rest + chunk)
        return [event for line in lines if (event := self._take(line)) is not None]

    def _take(self, line: bytes) -> ServerEvent | None:
        if not line:
            return self._finish()
        name, _, raw = line.partition(b":")
        value = raw.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._name = value
        elif name == b"id":
            self._id = value
        return None

    def _finish(self) -> ServerEvent | None:
        data, self._data = self._data, []
        name, self._name = self._name, ""
        return ServerEvent("\n".join(data), name or "message", self._id) if data else None
