"""Files on their way in and out, seen from this side: what is sent, how far it is, and how a download goes on.

Invariant: a file is never held in memory, and a download that was taken up again has each byte once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from io import RawIOBase
from typing import Any, BinaryIO

from vllm_bootstrap.sdk.failures import UnexpectedAnswer

OnBytes = Callable[[int, int | None], object]
"""Called with bytes done and bytes in all, None where that is not known."""

PARTIAL_CONTENT = 206


class Counted(RawIOBase):
    """A file that tells how much of it was read."""

    def __init__(self, source: BinaryIO, on_progress: OnBytes) -> None:
        self._source, self._on_progress = source, on_progress
        self._total = os.fstat(source.fileno()).st_size
        self._done = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._source.fileno()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._done = self._source.seek(offset, whence)
        return self._done

    def tell(self) -> int:
        return self._source.tell()

    def read(self, size: int = -1, /) -> bytes:
        piece = self._source.read(size)
        self._done += len(piece)
        if piece:
            self._on_progress(self._done, self._total)
        return piece


class Download:
    """How far a download has come: ``at`` bytes of ``total``."""

    def __init__(self, start: int = 0, on_progress: OnBytes | None = None) -> None:
        self.at, self.total = start, None
        self._etag: str | None = None
        self._on_progress = on_progress

    at: int
    total: int | None

    def headers(self) -> dict[str, str]:
        """What asks for the rest, of the same file."""
        if self.at == 0:
            return {}
        same = {"if-range": self._etag} if self._etag is not None else {}
        return {"range": f"bytes={self.at}-", **same}

    def opened(self, status: int, headers: Mapping[str, Any]) -> None:
        """An answer has begun. Raises ``UnexpectedAnswer`` when it is not the rest that was asked for."""
        if self.at > 0 and status != PARTIAL_CONTENT:
            raise UnexpectedAnswer(f"The file cannot be read from byte {self.at} on: it is another one by now.")
        self._etag = headers.get("etag", self._etag)
        length = headers.get("content-length")
        self.total = self.at + int(length) if length is not None else None

    def took(self, count: int) -> None:
        self.at += count
        if self._on_progress is not None:
            self._on_progress(self.at, self.total)
