"""Lines of a batch's output and error file: one made of what became of a line, files made of all of them.

Invariant: a line is one JSON object without a line end in it, whatever an engine sent, and an engine's answer stands in
it byte for byte as it came (line ends between its parts become spaces; three characters that some readers take for line
ends are escaped). What is no JSON becomes an error instead. Whole files pass through memory in chunks.

Must not know: databases, where files lie, the life of a batch.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any, NamedTuple, NoReturn, Protocol

from vllm_bootstrap.batches.types import NO_USAGE, TokenUsage
from vllm_bootstrap.gateway.usage import read_usage

NOT_JSON = "upstream_error"
_SHOWN = 200
_LINE_ENDS = bytes.maketrans(b"\r\n", b"  ")
# Characters that JSON allows in a string and Python's splitlines takes for the end of a line.
_ESCAPED = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


class Rendered(NamedTuple):
    """``ok``: it belongs into the output file, else into the error file."""

    ok: bool
    data: bytes
    usage: TokenUsage = NO_USAGE


class Sink(Protocol):
    """Where a file goes."""

    async def write(self, piece: bytes, /) -> None: ...


class Records(Protocol):
    """Where records come from; ``LineStore`` is one."""

    def records(self, ok: bool, after_line: int = 0) -> AsyncGenerator[list[tuple[int, bytes]], None]: ...


def record_id(batch_id: str, number: int) -> str:
    """The id of a line's record: always the same for the same line, never that of another."""
    return f"batch_req_{batch_id.removeprefix('batch_')}_{number}"


def answer_line(id: str, custom_id: str, status: int, request_id: str, body: bytes) -> Rendered:  # noqa: A002
    """What an engine answered. An answer of 400 and above is a failed line with the engine's own words."""
    try:
        value = json.loads(body.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        shown = body[:_SHOWN].decode("utf-8", "replace")
        message = f"The engine answered {status} with something that is not JSON: {shown!r}"
        return Rendered(False, error_line(id, custom_id, NOT_JSON, message))
    head = {"status_code": status, "request_id": request_id}
    data = b'{"id": %b, "custom_id": %b, "response": %b, "body": %b}, "error": null}' % (
        _json(id),
        _json(custom_id),
        _json(head)[:-1],
        one_line(body),
    )
    return Rendered(status < 400, data, usage_of(value))


def error_line(id: str, custom_id: str, code: str, message: str) -> bytes:  # noqa: A002
    """A line that has no answer."""
    error = {"code": code, "message": message}
    return _json({"id": id, "custom_id": custom_id, "response": None, "error": error})


def one_line(body: bytes) -> bytes:
    """Valid JSON as one line, whoever reads it: none of what is changed can be told from the original by a parser."""
    for raw, escaped in _ESCAPED:
        if raw in body:
            body = body.replace(raw, escaped)
    return body.translate(_LINE_ENDS).strip() if b"\n" in body or b"\r" in body else body


def usage_of(answer: Any) -> TokenUsage:
    """The token counts of a decoded answer, in any dialect; zeros where it tells none."""
    fields = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(fields, dict) or (found := read_usage(fields, None)) is None:
        return NO_USAGE
    # No database takes a number without bounds, and whatever an engine says must become a record.
    reasoning = min(_reasoning(fields), found.completion_tokens)
    return TokenUsage(found.prompt_tokens, found.cached_tokens, found.completion_tokens, reasoning)


async def pieces(store: Records, *, ok: bool, after_line: int = 0) -> AsyncGenerator[bytes, None]:
    """The lines there are, completed or failed, as pieces of a file that ends with a line end."""
    async for chunk in store.records(ok, after_line):
        yield b"\n".join([data for _, data in chunk]) + b"\n"


async def write_file(store: Records, sink: Sink, *, ok: bool) -> int:
    """Write the output file (``ok``) or the error file. Returns its size."""
    size = 0
    async for piece in pieces(store, ok=ok):
        await sink.write(piece)
        size += len(piece)
    return size


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _reasoning(fields: Mapping[str, Any]) -> int:
    details = fields.get("completion_tokens_details") or fields.get("output_tokens_details")
    count = details.get("reasoning_tokens") if isinstance(details, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else 0
