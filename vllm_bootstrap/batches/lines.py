"""One line of a batch's input: cut out of the file, then judged. PURE.

Invariants: a line that was judged good is UTF-8, one JSON object without a name twice anywhere in it, and asks for
something that a client may ask an engine for; where its request's body stands in the file is then known, so that
nobody takes it apart again. Whatever bytes come, the answer is a verdict. No more than one line of the allowed size is
held, however long a line is.

Blank lines count as lines, so that numbers are those an editor shows, but ask for nothing. A byte order mark at the
start and carriage returns before line feeds are passed over.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, NoReturn

from vllm_bootstrap.batches.types import ENDPOINTS, LineError
from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.refused import refuse_fields, refuse_too_fine

BOM = b"\xef\xbb\xbf"
FIELDS = ("custom_id", "method", "url", "body")
MAX_ID_CHARS = 512
MAX_MODEL_CHARS = 512

_NAME = re.compile(r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*')
_BLANK = re.compile(r"[ \t\n\r]*")
_NEXT = re.compile(r"[ \t\n\r]*([,}])[ \t\n\r]*")
# Half of a surrogate pair, perhaps: no file or database could hold such text.
_MAYBE_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class Rules:
    """What lines may ask for. ``models``: globs, None: all. ``model_optional``: the batch says itself where its lines
    go."""

    endpoint: str
    models: tuple[str, ...] | None = None
    model_optional: bool = False


class Good(NamedTuple):
    """``model`` is empty where none is named. ``start`` and ``length``: where in the line its body stands, in bytes."""

    custom_id: str
    model: str
    body: dict[str, Any]
    start: int
    length: int


class Cut(NamedTuple):
    """A line without its line end, and where it starts in the file. ``raw`` None: longer than allowed."""

    number: int
    start: int
    raw: bytes | None


class Cutter:
    """Cuts a file that comes in pieces into lines: ``feed`` each piece, then ``end``."""

    def __init__(self, max_line_bytes: int) -> None:
        self._max = max_line_bytes
        self._number = 1
        self._start = 0
        self._held: list[bytes] = []
        self._length = 0  # of the line that is not complete, which is held unless it is too long

    def feed(self, piece: bytes) -> Iterator[Cut]:
        """The lines that this piece completes."""
        first, *rest = piece.split(b"\n")
        self._hold(first)
        if not rest:
            return
        yield self._complete()
        last = rest.pop()
        for raw in rest:
            start, length = self._start, len(raw)
            yield Cut(self._number, start, raw if length <= self._max else None)
            self._number += 1
            self._start = start + length + 1
        self._hold(last)

    def end(self) -> Iterator[Cut]:
        """The last line, where it has no line end."""
        if self._length:
            yield self._complete()

    def _hold(self, part: bytes) -> None:
        self._length += len(part)
        if self._length > self._max + len(BOM):
            self._held.clear()
        elif part:
            self._held.append(part)

    def _complete(self) -> Cut:
        raw = b"".join(self._held)
        cut = Cut(self._number, self._start, raw if len(raw) == self._length else None)
        if cut.number == 1 and raw.startswith(BOM):
            cut = Cut(1, len(BOM), raw[len(BOM) :])
        if cut.raw is not None and len(cut.raw) > self._max:
            cut = cut._replace(raw=None)
        self._number += 1
        self._start += self._length + 1
        self._held.clear()
        self._length = 0
        return cut


def is_blank(raw: bytes) -> bool:
    """Whether a line asks for nothing."""
    return not raw.strip(b" \t\r")


def judge(raw: bytes, number: int, rules: Rules) -> Good | LineError:
    """One line that is not blank. A line with several faults is told of the first."""
    try:
        text = raw.decode()
        refuse_too_fine(raw)
        fields, start, end = _read(text)
        custom_id, model, body = _check(fields, rules)
    except UnicodeDecodeError as exc:
        message = f"Byte {exc.start + 1} of this line is not valid UTF-8. Save the file as UTF-8."
        return LineError("invalid_encoding", message, number)
    except _Fault as fault:
        return LineError(fault.code, str(fault), number, fault.param)
    except json.JSONDecodeError as exc:
        message = f"This line is not valid JSON: {exc.msg} at character {exc.pos + 1}. Each line must be one object."
        return LineError("invalid_json_line", message, number)
    except RecursionError:
        return LineError("invalid_json_line", "This line is nested too deeply.", number)
    except ApiError as exc:
        if exc.param is None:
            return LineError(exc.code, exc.message, number)
        return LineError("unsupported_parameter", f"{exc.message}.", number, f"body.{exc.param}")
    except ValueError:  # an integer beyond Python's limit of digits
        return LineError("invalid_json_line", "This line holds a number that is too long.", number)
    if len(text) != len(raw):
        start, end = len(text[:start].encode()), len(text[:end].encode())
    return Good(custom_id, model, body, start, end - start)


class _Fault(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def _read(text: str) -> tuple[dict[str, Any], int, int]:
    """The object's members, and where the value of ``body`` starts and ends, in characters."""
    if "\0" in text:
        at = text.index("\0") + 1
        raise _Fault("invalid_json_line", f"This line holds a NUL byte at character {at}: remove it.")
    at = _skip_blank(text, 0)
    if text[at : at + 1] != "{":
        raise _Fault("invalid_json_line", "This line must be a JSON object, with the fields " + ", ".join(FIELDS) + ".")
    fields: dict[str, Any] = {}
    start = end = 0
    at = _skip_blank(text, at + 1)
    more = text[at : at + 1] != "}"
    at += not more
    while more:
        name, value_at = _name(text, at)
        if name in fields:
            raise _twice(name)
        fields[name], at = _decode(text, value_at)
        if name == "body":
            start, end = value_at, at
        after = _NEXT.match(text, at)
        if after is None:
            raise json.JSONDecodeError("Expecting ',' or '}'", text, at)
        at = after.end()
        more = after[1] == ","
    if at != len(text) and (at := _skip_blank(text, at)) != len(text):
        raise json.JSONDecodeError("Extra data", text, at)
    if _MAYBE_HALF.search(text):
        _refuse_halves(fields)
    return fields, start, end


def _name(text: str, at: int) -> tuple[str, int]:
    """A member's name, and where its value starts."""
    plain = _NAME.match(text, at)
    if plain is not None:
        return plain[1], plain.end()
    if text[at : at + 1] != '"':
        raise json.JSONDecodeError("Expecting a field name in double quotes", text, at)
    name, end = _decode(text, at)
    colon = _skip_blank(text, end)
    if text[colon : colon + 1] != ":":
        raise json.JSONDecodeError("Expecting ':'", text, colon)
    return name, _skip_blank(text, colon + 1)


def _skip_blank(text: str, at: int) -> int:
    blank = _BLANK.match(text, at)
    return at if blank is None else blank.end()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _twice(next(name for name in names if names.count(name) > 1))
    return found


def _twice(name: str) -> _Fault:
    return _Fault(
        "invalid_json_line", f"The key {_shown(name)} is there twice: parsers differ in which one they believe."
    )


def _refuse(constant: str) -> NoReturn:
    raise _Fault("invalid_json_line", f"{constant} is not JSON.")


_decode = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse).raw_decode


def _refuse_halves(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _Fault("invalid_json_line", "This line holds half of a surrogate pair, which is no text.") from None


def _check(fields: dict[str, Any], rules: Rules) -> tuple[str, str, dict[str, Any]]:
    """Custom id, model and body of a line's fields."""
    if len(fields) != len(FIELDS) or any(name not in fields for name in FIELDS):
        _refuse_names(fields)
    custom_id, body, url = fields["custom_id"], fields["body"], fields["url"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        message = f"custom_id must be a string of 1 to {MAX_ID_CHARS} characters."
        raise _Fault("invalid_custom_id", message, "custom_id")
    if fields["method"] != "POST":
        raise _Fault("invalid_method", f'method must be "POST", not {_shown(fields["method"])}.', "method")
    if url != rules.endpoint:
        _refuse_url(url, rules.endpoint)
    if not isinstance(body, dict):
        raise _Fault("invalid_body", "body must be an object: what would be sent to the endpoint alone.", "body")
    refuse_fields(body)
    if (stream := body.get("stream")) is not None and stream is not False:
        raise _Fault("unsupported_parameter", "Answers of a batch are not streamed: leave stream out.", "body.stream")
    return custom_id, _model(body.get("model"), rules), body


def _refuse_names(fields: dict[str, Any]) -> NoReturn:
    for name in FIELDS:
        if name not in fields:
            raise _Fault("missing_required_parameter", f"The field {name} is missing.", name)
    name = next(name for name in fields if name not in FIELDS)
    message = f"The field {_shown(name)} is not known: what the engine is to get belongs into body."
    raise _Fault("unknown_parameter", message, name[:_SHOWN])


def _refuse_url(url: object, endpoint: str) -> NoReturn:
    if isinstance(url, str) and url in ENDPOINTS:
        message = f"url is {url}, but the batch is for {endpoint}: all lines must name the batch's endpoint."
        raise _Fault("mismatched_endpoint", message, "url")
    raise _Fault("invalid_url", f'url must be "{endpoint}", the batch\'s endpoint, not {_shown(url)}.', "url")


def _model(model: object, rules: Rules) -> str:
    if model is None and rules.model_optional:
        return ""
    if not isinstance(model, str) or not 0 < len(model) <= MAX_MODEL_CHARS:
        raise _Fault("missing_model", "body.model must name the model that this line is for.", "body.model")
    if rules.models is not None and not _allowed(model, rules.models):
        raise _Fault("model_not_allowed", f"This key may not use the model {_shown(model)}.", "body.model")
    return model


@functools.lru_cache(1024)
def _allowed(model: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(model, glob) for glob in globs)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
