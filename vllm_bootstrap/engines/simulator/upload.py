"""A multipart form as it arrives: small fields are kept, files are only counted and hashed.

Invariant: memory does not grow with the size of a file.
"""

from __future__ import annotations

import hashlib
from typing import Any

MAX_FIELD_BYTES = 64 * 1024


class Upload:
    """A form body. ``fields`` by name; ``file_bytes``, ``file_sha256`` and ``file_name`` of the (last) file.
    ``error`` says what is wrong with the form, when something is."""

    def __init__(self, content_type: bytes) -> None:
        # Only audio requests need it, and start-up counts.
        from python_multipart import exceptions, multipart  # noqa: PLC0415

        self._options_of = multipart.parse_options_header
        self.fields: dict[str, str] = {}
        self.file_name: str | None = None
        self.file_bytes = 0
        self.error: str | None = None
        self._hash = hashlib.sha256()
        self._header = [b"", b""]
        self._name = ""
        self._is_file = False
        self._value = b""
        self._broken = exceptions.FormParserError
        boundary = self._options_of(content_type)[1].get(b"boundary", b"")
        self._parser: Any = multipart.MultipartParser(boundary, self._callbacks()) if boundary else None
        if self._parser is None:
            self.error = "the form has no boundary"

    @property
    def file_sha256(self) -> str:
        return self._hash.hexdigest()

    def feed(self, data: bytes) -> None:
        if self.error is None:
            try:
                self._parser.write(data)
            except self._broken as exc:
                self.error = str(exc)

    def close(self) -> None:
        if self.error is None:
            try:
                self._parser.finalize()
            except self._broken as exc:
                self.error = str(exc)

    def _callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._end_header,
            "on_part_data": self._part_data,
            "on_part_end": self._end_part,
        }

    def _begin_part(self) -> None:
        self._name, self._is_file, self._value = "", False, b""
        self._header = [b"", b""]

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def _end_header(self) -> None:
        name, value = self._header
        self._header = [b"", b""]
        if name.lower() == b"content-disposition":
            options = self._options_of(value)[1]
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            if b"filename" in options:
                self._is_file = True
                self.file_name = options[b"filename"].decode("utf-8", "replace")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.file_bytes += end - start
            self._hash.update(memoryview(data)[start:end])
        elif len(self._value) + end - start > MAX_FIELD_BYTES:
            self.error = f"field {self._name!r} is too large"
        else:
            self._value += data[start:end]

    def _end_part(self) -> None:
        if not self._is_file:
            self.fields[self._name] = self._value.decode("utf-8", "replace")
