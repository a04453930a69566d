"""A multipart body on its way in: read for its plain fields, kept in a bounded temporary file, passed on unchanged.

Invariant: what is sent on is byte for byte what came in, and only after all of it was read: a slow upload holds no
engine slot, no field is seen by the engine that was not judged here, and a stale connection can be answered by sending
again. At most ``MEMORY_BYTES`` of it (and one read more) are in memory; files are written and read off the event loop.
All of them together are bounded too (``Spool``): each counts from its first byte until it is closed. Must not know:
engines, keys, connections.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from vllm_bootstrap.errors import BadRequest, PayloadTooLarge, Unavailable
from vllm_bootstrap.gateway.bodies import REFUSED
from vllm_bootstrap.gateway.multipart import SLICE_BYTES, Form, Part

MEMORY_BYTES = 1024 * 1024
MAX_FIELD_BYTES = 64 * 1024
_READ = 256 * 1024
_JUDGED = frozenset({"model", "service_tier", "stream"})


class Spool:
    """Where uploads wait: a folder, and how many bytes all of them may have together. ``held``: how many they have."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder
        self.held = 0
        self._most_bytes = most_bytes

    def add(self, size: int) -> None:
        """Count ``size`` more bytes; counted they are in any case. Raises ``Unavailable`` when it is too much."""
        self.held += size
        if self.held > self._most_bytes:
            raise Unavailable("Too many large uploads are under way", retry_after=1)


class Upload:
    """Feed it pieces as they come; ``digest`` while ``has_backlog`` says so, also before ``finish`` at the end; then
    ``fields`` holds the judged plain fields and ``chunks`` gives the bytes back. ``close`` always, it removes the
    file."""

    def __init__(self, content_type: bytes, *, max_bytes: int, spool: Spool) -> None:
        self.size = 0
        self.fields: dict[str, str] = {}
        self._max_bytes = max_bytes
        self._spool = spool
        self._closed = False
        self._pieces: list[bytes] = []
        self._in_memory = 0
        self._unread: list[bytes] = []  # pieces that the parser has not seen
        self._file: IO[bytes] | None = None
        self._form = Form(content_type, self)

    @property
    def has_backlog(self) -> bool:
        """Whether it is time to ``digest`` before more is fed."""
        return bool(self._unread) or self._in_memory > MEMORY_BYTES

    def feed(self, piece: bytes) -> None:
        """Take one piece. Does not block. Raises ``BadRequest``, ``PayloadTooLarge`` or ``Unavailable``."""
        self.size += len(piece)
        self._spool.add(len(piece))
        if self.size > self._max_bytes:
            raise PayloadTooLarge(f"The upload is larger than {self._max_bytes} bytes")
        self._pieces.append(piece)
        self._in_memory += len(piece)
        if self._unread or len(piece) > SLICE_BYTES:
            self._unread.append(piece)
        else:
            self._form.parse(piece)

    async def digest(self) -> None:
        """Read what waits, letting others go on in between, and move what is too much for memory to the file. Raises
        ``BadRequest`` and ``OSError``."""
        while self._unread:
            piece = self._unread[0]
            for start in range(0, len(piece), SLICE_BYTES):
                self._form.parse(piece[start : start + SLICE_BYTES])
                await asyncio.sleep(0)
            self._unread = self._unread[1:]
        if self._in_memory > MEMORY_BYTES:
            pieces, self._pieces, self._in_memory = self._pieces, [], 0
            await asyncio.to_thread(self._write, pieces)

    def _write(self, pieces: list[bytes]) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._spool.folder, prefix="upload-")  # noqa: SIM115 - see close
            if self._closed:  # meanwhile, by the event loop, which has not seen this file
                self._file.close()
        if not self._closed:
            self._file.writelines(pieces)

    def finish(self) -> None:
        """All pieces were fed. Raises ``BadRequest`` when the form is not complete."""
        self._form.finish()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes as they came. May be asked for again from the start."""
        if self._file is not None:
            await asyncio.to_thread(self._file.seek, 0)
            while piece := await asyncio.to_thread(self._file.read, _READ):
                yield piece
            await asyncio.to_thread(self._file.seek, 0, 2)
        for piece in self._pieces:
            yield piece

    def close(self) -> None:
        """Free memory and file. Idempotent."""
        if not self._closed:
            self._closed = True
            self._spool.held -= self.size
        self._pieces, self._unread = [], []
        if self._file is not None:
            self._file.close()

    # From the form

    def part_begins(self, part: Part) -> None:
        if part.name in REFUSED:
            raise BadRequest(f"The field {part.name!r} may not be set: it {REFUSED[part.name]}", param=part.name)
        if part.name in _JUDGED and part.filename is not None:
            raise BadRequest(f"The field {part.name!r} must be plain text", param=part.name)

    def part_data(self, part: Part, data: bytes, start: int, end: int) -> None:
        if part.name not in _JUDGED:
            return
        if len(part.data) + end - start > MAX_FIELD_BYTES:
            raise BadRequest(f"The field {part.name!r} is too long", param=part.name)
        part.data += data[start:end]

    def part_ends(self, part: Part) -> None:
        if part.name not in _JUDGED:
            return
        if part.name in self.fields:
            raise BadRequest(f"The field {part.name!r} is there twice", param=part.name)
        try:
            self.fields[part.name] = part.data.decode()
        except UnicodeDecodeError:
            raise BadRequest(f"The field {part.name!r} is not UTF-8", param=part.name) from None
