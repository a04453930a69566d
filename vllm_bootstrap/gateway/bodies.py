"""What the gateway must know of a JSON body, what a client may not put there, and how to change it. PURE.

Invariant: a body is parsed once, and an edit replaces the bytes of the top-level members it names and nothing else;
everything a client wrote beside them arrives as it was written. Two readers never see different values: duplicate
top-level names are refused. Knows no sockets, keys or engines beyond the plain facts passed in.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]  # the stubs lack it
from typing import Any, NamedTuple

from vllm_bootstrap.errors import BadRequest, InvalidJson
from vllm_bootstrap.models.types import Rewrite
from vllm_bootstrap.refused import REFUSED, refuse_fields, refuse_too_fine

__all__ = [
    "MAX_FIELDS", "OVERWRITTEN", "REFUSED", "USAGE_ON_REQUEST", "JsonBody", "Span", "Written", "asking_for_usage",
    "check_sequences", "parse", "refuse_fields", "refuse_remote_media", "rewritten", "sequences", "with_members",
]  # fmt: skip

OVERWRITTEN = "priority"
"""Taken away or replaced by the scheduler's own value; never refused, since stock clients may send it."""

USAGE_ON_REQUEST = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Routes whose streams carry token counts only when ``stream_options`` asks for them."""

MAX_FIELDS = 1_000

_MEMBER = re.compile(r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*')
_BLANK = re.compile(r"[ \t\n\r]*")
_NEXT = re.compile(r"[ \t\n\r]*([,}])")
_decode = json.JSONDecoder().raw_decode
_size_of_last = [0]
_MOST_AT_ONCE = 64


def _noted(members: list[tuple[str, Any]]) -> dict[str, Any]:
    _size_of_last[0] = len(members)
    return dict(members)


# Reads in C; of all objects it meets, the outermost is noted last.
_scan = json.JSONDecoder(object_pairs_hook=_noted).scan_once  # type: ignore[attr-defined]  # the stubs lack it

# The field whose list holds independent prompts, by the last part of the path.
_PROMPTS = {
    "completions": ("prompt",),
    "embeddings": ("input",),
    "rerank": ("documents",),
    "score": ("text_1", "text_2", "queries", "documents", "data_1", "data_2"),
    "pooling": ("input",),
    "classify": ("input",),
}
_URL_KEYS = frozenset({"image_url", "audio_url", "video_url", "file_url"})


Span = tuple[int, int, int]
"""Where a top-level member stands, in characters: where its name starts, where its value starts and ends."""


@dataclass(slots=True)
class JsonBody:
    """A parsed object: the text, its top-level values and where each stands."""

    raw: bytes
    text: str
    fields: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Span] | None = None

    @property
    def spans(self) -> dict[str, Span]:
        """Where each field stands. Looked for when asked the first time: most bodies go on as they came."""
        if self.found is None:
            again = JsonBody(self.raw, self.text)
            _walk(again)
            self.found = again.found or {}
        return self.found

    @property
    def names_urls(self) -> bool:
        """Whether any member could be called something with ``url`` in it, however it is spelled."""
        return "url" in self.text or "\\u" in self.text

    @property
    def model(self) -> str | None:
        """The named model, None when absent. Raises ``BadRequest`` when it is no string."""
        model = self.fields.get("model")
        if model is not None and not isinstance(model, str):
            raise BadRequest("The model must be a string", param="model")
        return model


def parse(raw: bytes) -> JsonBody:
    """Parse a body that must be a JSON object in UTF-8. Raises ``InvalidJson``, ``BadRequest``, ``PayloadTooLarge``."""
    refuse_too_fine(raw)
    try:
        text = raw.decode()
        fields = _read_at_once(text)
        if fields is not None:
            return JsonBody(raw, text, fields, None)
        body = JsonBody(raw, text)
        _walk(body)
    except UnicodeDecodeError:
        raise InvalidJson("The body is not UTF-8") from None
    except json.JSONDecodeError as exc:
        raise InvalidJson(f"The body is not valid JSON: {exc.msg} at character {exc.pos}") from None
    except ValueError:  # an integer beyond Python's limit of digits
        raise InvalidJson("The body holds a number that is too long") from None
    except RecursionError:
        raise InvalidJson("The body is nested too deeply") from None
    return body


def _read_at_once(text: str) -> dict[str, Any] | None:
    """Read small plain objects without a step in Python for each field. None: ``_walk`` must look, which also finds the
    words for what is wrong."""
    if not text.startswith("{") or text.count("{") > _MOST_AT_ONCE:
        return None
    fields: dict[str, Any]
    try:
        fields, end = _scan(text, 0)
    except (ValueError, StopIteration, RecursionError):
        return None
    size = len(fields)
    return fields if end == len(text) and size == _size_of_last[0] and size <= MAX_FIELDS else None


def _walk(body: JsonBody) -> None:
    text = body.text
    spans = body.found = {}
    at = _skip_blank(text, 0)
    if text[at : at + 1] != "{":
        raise InvalidJson("The body must be a JSON object")
    empty = _NEXT.match(text, at + 1)
    if empty is not None and empty[1] == "}":
        _expect_end(text, empty.end())
        return
    at += 1
    while True:
        name, start, value_at = _member(text, at)
        value, end = _decode(text, value_at)
        if name in body.fields:
            raise InvalidJson(f"The field {name!r} is there twice", param=name)
        if len(body.fields) >= MAX_FIELDS:
            raise BadRequest(f"The body has more than {MAX_FIELDS} fields")
        body.fields[name] = value
        spans[name] = (start, value_at, end)
        after = _NEXT.match(text, end)
        if after is None:
            raise json.JSONDecodeError("Expecting ',' or '}'", text, end)
        at = after.end()
        if after[1] == "}":
            _expect_end(text, at)
            return


def _member(text: str, at: int) -> tuple[str, int, int]:
    """Name of the member at ``at``, where it starts, where its value starts."""
    plain = _MEMBER.match(text, at)
    if plain is not None:
        return plain[1], plain.start(1) - 1, plain.end()
    start = _skip_blank(text, at)
    if text[start : start + 1] != '"':
        raise json.JSONDecodeError("Expecting a field name in double quotes", text, start)
    name, end = scanstring(text, start + 1, True)
    colon = _skip_blank(text, end)
    if text[colon : colon + 1] != ":":
        raise json.JSONDecodeError("Expecting ':'", text, colon)
    return name, start, _skip_blank(text, colon + 1)


def _skip_blank(text: str, at: int) -> int:
    blank = _BLANK.match(text, at)
    return blank.end() if blank is not None else at


def _expect_end(text: str, at: int) -> None:
    at = _skip_blank(text, at)
    if at != len(text):
        raise json.JSONDecodeError("Extra data", text, at)


class Written(NamedTuple):
    """A value that is JSON already."""

    text: str


def with_members(body: JsonBody, values: Mapping[str, object]) -> bytes:
    """The body's bytes with top-level members set to ``values`` (None: taken out)."""
    edits: list[tuple[int, int, str]] = []
    added: list[str] = []
    gone = {name for name, value in values.items() if value is None and name in body.fields}
    if gone:
        edits = [(start, end, "") for start, end in _extents(list(body.spans.items()), gone)]
    for name, value in values.items():
        if value is None:
            continue
        span = body.spans[name] if name in body.fields else None
        encoded = value.text if isinstance(value, Written) else json.dumps(value)
        if span is not None:
            edits.append((span[1], span[2], encoded))
        else:
            added.append(f"{json.dumps(name)}: {encoded}")
    if added:
        at = body.text.index("{") + 1
        edits.append((at, at, ", ".join(added) + ("," if len(body.fields) > len(gone) else "")))
    if not edits:
        return body.raw
    return _edited(body.text, sorted(edits)).encode()


def _edited(text: str, edits: list[tuple[int, int, str]]) -> str:
    out: list[str] = []
    at = 0
    for start, end, new in edits:
        out += (text[at:start], new)
        at = end
    out.append(text[at:])
    return "".join(out)


def _extents(members: list[tuple[str, Span]], gone: set[str]) -> Iterator[tuple[int, int]]:
    """From where to where members must go so that the rest is still an object."""
    last = len(members)
    while last and members[last - 1][0] in gone:
        last -= 1
    if last < len(members):  # those at the end: from the end of the one before them, so that its comma goes too
        yield members[last - 1][1][2] if last else members[0][1][0], members[-1][1][2]
    for index in range(last):  # the others: up to the next one
        if members[index][0] in gone:
            yield members[index][1][0], members[index + 1][1][0]


def rewritten(body: JsonBody, by: Rewrite) -> JsonBody:
    """The body as ``by`` wants it; the same one where there is nothing to change. Raises as ``parse`` does."""
    fields, strip = body.fields, by.strip
    values: dict[str, object] = {name: None for name in strip if name in fields}
    for name, value in by.defaults.items():
        if name not in fields or name in strip:
            values[name] = Written(json.dumps(value))
    return parse(with_members(body, values)) if values else body


def asking_for_usage(body: JsonBody) -> Written | None:
    """The ``stream_options`` with which a streamed answer of OpenAI's completions ends with the engine's token counts,
    else as the client wrote them. None: not streamed, asked for already, or nothing an engine would take anyway."""
    options = body.fields.get("stream_options")
    if body.fields.get("stream") is not True or not isinstance(options, dict | None):
        return None
    if options is None:
        return Written('{"include_usage": true}')
    if options.get("include_usage"):
        return None
    _, start, end = body.spans["stream_options"]
    inner = JsonBody(b"", body.text[start:end])
    _walk(inner)
    values: dict[str, object] = {"include_usage": True}
    if options.get("continuous_usage_stats"):  # without include_usage it has no effect, and must have none
        values["continuous_usage_stats"] = False
    return Written(with_members(inner, values).decode())


def sequences(path: str, fields: Mapping[str, Any]) -> int:
    """How many sequences the engine will run for this request: prompts times ``n`` (or ``best_of``), at least 1."""
    prompts = 1
    for key in _prompt_fields(path):
        value = fields.get(key)
        if isinstance(value, list):
            prompts = max(prompts, _count(value))
    if "n" in fields or "best_of" in fields:
        return prompts * max(_positive(fields.get("n")), _positive(fields.get("best_of")))
    return prompts


@functools.lru_cache(256)
def _prompt_fields(path: str) -> tuple[str, ...]:
    return () if path.endswith("/chat/completions") else _PROMPTS.get(path.rpartition("/")[2], ())


def _count(value: list[object]) -> int:
    """Prompts in a prompt field: a list of strings or token lists counts its items, one prompt counts one."""
    if not value:
        return 1
    is_one_prompt = isinstance(value[0], int) and not isinstance(value[0], bool)
    return 1 if is_one_prompt else len(value)


def _positive(value: object) -> int:
    return max(1, value) if isinstance(value, int) and not isinstance(value, bool) else 1


def check_sequences(path: str, fields: Mapping[str, Any], most: int | None) -> int:
    """``sequences``, refused with ``BadRequest`` when a key may not ask for so many."""
    wanted = sequences(path, fields)
    if most is not None and wanted > most:
        raise BadRequest(f"This key may ask for {most} sequences (prompts times n), not {wanted}", param="n")
    return wanted


def refuse_remote_media(fields: Mapping[str, Any]) -> None:
    """Raise ``BadRequest`` when media are given as anything but data in the request itself: for engines that would
    fetch whatever address they are told."""
    for url in _media_urls(dict(fields), 0):
        if url[:5].lower() != "data:":
            raise BadRequest("Media must be sent inside the request, as a data: URL", param="messages")


def _media_urls(value: dict[str, Any] | list[Any], depth: int) -> Iterator[str]:
    if depth > 100:
        raise BadRequest("The body is nested too deeply")
    if isinstance(value, dict):
        for key, item in value.items():
            if key in _URL_KEYS and isinstance(item, str):
                yield item
            elif (key in _URL_KEYS or key == "source") and isinstance(item, dict) and isinstance(item.get("url"), str):
                yield item["url"]
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (dict, list)):
            yield from _media_urls(item, depth + 1)
