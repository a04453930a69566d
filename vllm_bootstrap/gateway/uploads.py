"""A multipart body on its way in: read for its plain fields, kept in a bounded temporary file, passed on unchanged.

Invariant: what is sent on is byte for byte what came in, and only after all of it was read: a slow upload holds no
engine slot, no field is seen by the engine that was not judged here, and a stale connection can be answered by sending
again. At most ``MEMORY_BYTES`` of it (and one read more) are in memory; files are written and read off the event loop.
The parser is the one vLLM uses: fast, but a few MB a second where a body is full of what nearly is its boundary, so it
is never given more than ``SLICE_BYTES`` at a time. Must not know: engines, keys, connections.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from vllm_bootstrap.errors import BadRequest, PayloadTooLarge
from vllm_bootstrap.gateway.bodies import REFUSED

MEMORY_BYTES = 1024 * 1024
SLICE_BYTES = 16 * 1024
MAX_FIELD_BYTES = 64 * 1024
MAX_PARTS = 100
_READ = 256 * 1024
# Two spellings of a field's name: readers differ in which one they believe.
_EXTENDED_NAME = re.compile(rb";\s*name\*", re.IGNORECASE)
_JUDGED = frozenset({"model", "service_tier", "stream"})


class _Part:
    __slots__ = ("data", "disposition", "header", "is_file", "name", "value")

    def __init__(self) -> None:
        self.header = b""
        self.value = b""
        self.disposition: bytes | None = None
        self.name = ""
        self.is_file = False
        self.data = bytearray()


class Upload:
    """Feed it pieces as they come; ``digest`` while ``has_backlog`` says so, also before ``finish`` at the end; then
    ``fields`` holds the judged plain fields and ``chunks`` gives the bytes back. ``close`` always, it removes the
    file."""

    def __init__(self, content_type: bytes, *, max_bytes: int, spool_dir: Path) -> None:
        self.size = 0
        self.fields: dict[str, str] = {}
        self._max_bytes = max_bytes
        self._spool_dir = spool_dir
        self._pieces: list[bytes] = []
        self._in_memory = 0
        self._unread: list[bytes] = []  # pieces that the parser has not seen
        self._file: IO[bytes] | None = None
        self._part = _Part()
        self._parts = 0
        self._ended = False
        self._parser = self._make_parser(content_type)

    def _make_parser(self, content_type: bytes) -> MultipartParser:
        _, options = parse_options_header(content_type.decode("latin-1"))
        boundary = options.get(b"boundary")
        if not boundary:
            raise BadRequest("A multipart body needs a boundary in its Content-Type", param="content-type")
        if options.get(b"charset", b"utf-8").lower() != b"utf-8":
            raise BadRequest("Multipart fields must be UTF-8", param="content-type")
        try:
            return MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as exc:
            raise BadRequest(f"The multipart body cannot be read: {exc}") from None

    @property
    def has_backlog(self) -> bool:
        """Whether it is time to ``digest`` before more is fed."""
        return bool(self._unread) or self._in_memory > MEMORY_BYTES

    def feed(self, piece: bytes) -> None:
        """Take one piece. Does not block. Raises ``BadRequest`` or ``PayloadTooLarge``."""
        self.size += len(piece)
        if self.size > self._max_bytes:
            raise PayloadTooLarge(f"The upload is larger than {self._max_bytes} bytes")
        self._pieces.append(piece)
        self._in_memory += len(piece)
        if self._unread or len(piece) > SLICE_BYTES:
            self._unread.append(piece)
        else:
            self._parse(piece)

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as exc:
            raise BadRequest(f"The multipart body cannot be read: {exc}") from None

    async def digest(self) -> None:
        """Read what waits, letting others go on in between, and move what is too much for memory to the file. Raises
        ``BadRequest`` and ``OSError``."""
        while self._unread:
            piece = self._unread[0]
            for start in range(0, len(piece), SLICE_BYTES):
                self._parse(piece[start : start + SLICE_BYTES])
                await asyncio.sleep(0)
            self._unread = self._unread[1:]
        if self._in_memory > MEMORY_BYTES:
            pieces, self._pieces, self._in_memory = self._pieces, [], 0
            await asyncio.to_thread(self._write, pieces)

    def _write(self, pieces: list[bytes]) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._spool_dir, prefix="upload-")  # noqa: SIM115 - see close
        self._file.writelines(pieces)

    def finish(self) -> None:
        """All pieces were fed. Raises ``BadRequest`` when the form is not complete."""
        if not self._ended:
            raise BadRequest("The multipart body ends before its last boundary")

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
        self._pieces, self._unread = [], []
        if self._file is not None:
            self._file.close()

    # From the parser

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BadRequest(f"The multipart body has more than {MAX_PARTS} parts")
        self._part = _Part()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._part.header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._part.value += data[start:end]

    def _on_header_end(self) -> None:
        part = self._part
        if part.header.lower() == b"content-disposition":
            if part.disposition is not None:
                raise BadRequest("A part of the multipart body has two names")
            part.disposition = part.value
        part.header = part.value = b""

    def _on_headers_finished(self) -> None:
        part = self._part
        disposition = part.disposition or b""
        _, options = parse_options_header(disposition.decode("latin-1"))
        name = options.get(b"name")
        if name is None or _EXTENDED_NAME.search(disposition) or disposition.lower().count(b"; name=") > 1:
            raise BadRequest("Every part of the multipart body needs exactly one plain name")
        part.name = name.decode("utf-8", "replace")
        part.is_file = b"filename" in options
        if part.name in REFUSED:
            raise BadRequest(f"The field {part.name!r} may not be set: it {REFUSED[part.name]}", param=part.name)
        if part.name in _JUDGED and part.is_file:
            raise BadRequest(f"The field {part.name!r} must be plain text", param=part.name)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.name not in _JUDGED:
            return
        if len(part.data) + end - start > MAX_FIELD_BYTES:
            raise BadRequest(f"The field {part.name!r} is too long", param=part.name)
        part.data += data[start:end]

    def _on_part_end(self) -> None:
        part = self._part
        if part.name not in _JUDGED:
            return
        if part.name in self.fields:
            raise BadRequest(f"The field {part.name!r} is there twice", param=part.name)
        try:
            self.fields[part.name] = part.data.decode()
        except UnicodeDecodeError:
            raise BadRequest(f"The field {part.name!r} is not UTF-8", param=part.name) from None

    def _on_end(self) -> None:
        self._ended = True
