"""A multipart body taken apart as it comes, strictly: every part has one plain name, and nothing is left open. PURE.

Invariant: memory is bounded by what the handler keeps. The parser is the one vLLM uses: fast, but a few MB a second
where a body is full of what nearly is its boundary, so give it no more than ``SLICE_BYTES`` at a time where others
wait. Knows nothing of what fields mean.
"""

from __future__ import annotations

import re
from typing import Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from vllm_bootstrap.errors import BadRequest

SLICE_BYTES = 16 * 1024
MAX_PARTS = 100
# Two spellings of a field's name: readers differ in which one they believe.
_EXTENDED_NAME = re.compile(rb";\s*name\*", re.IGNORECASE)


class Part:
    """One part: ``filename`` None for a plain field. ``data`` is for the handler's use."""

    __slots__ = ("data", "disposition", "filename", "header", "name", "value")

    def __init__(self) -> None:
        self.header = b""
        self.value = b""
        self.disposition: bytes | None = None
        self.name = ""
        self.filename: bytes | None = None
        self.data = bytearray()


class Handler(Protocol):
    """Hears of every part in turn. May raise ``ApiError``, which goes to whoever feeds the form."""

    def part_begins(self, part: Part) -> None: ...

    def part_data(self, part: Part, data: bytes, start: int, end: int) -> None: ...

    def part_ends(self, part: Part) -> None: ...


class Form:
    """``parse`` the body piece by piece, ``finish`` at its end. Raises ``BadRequest`` for what is no proper form."""

    def __init__(self, content_type: bytes, handler: Handler) -> None:
        self._handler = handler
        self._part = Part()
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

    def parse(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as exc:
            raise BadRequest(f"The multipart body cannot be read: {exc}") from None

    def finish(self) -> None:
        """All of the body was given."""
        if not self._ended:
            raise BadRequest("The multipart body ends before its last boundary")

    # From the parser

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BadRequest(f"The multipart body has more than {MAX_PARTS} parts")
        self._part = Part()

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
        part.filename = options.get(b"filename")
        self._handler.part_begins(part)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._handler.part_data(self._part, data, start, end)

    def _on_part_end(self) -> None:
        self._handler.part_ends(self._part)

    def _on_end(self) -> None:
        self._ended = True
