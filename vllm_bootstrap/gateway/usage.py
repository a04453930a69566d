"""Reading an engine's own token counts out of answers that pass by, streamed or whole. PURE.

Invariant: an answer leaves as it came, byte for byte and at once, but for one thing: the extra last event that an
engine sends because *we* asked it for its ``usage`` is taken out again when the client had not asked. Memory is bounded
whatever an engine sends (``LOOK_BYTES`` of one answer); what cannot be understood within that bound is passed on and
not counted. Compressed answers are never looked into. Knows nothing of sockets, framing or the routes' meaning.

A piece is held back only while it may be the beginning of that extra event: it starts like a ``data:`` line, is not
complete, and does not show any choices yet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from vllm_bootstrap.scheduler.tickets import Usage

LOOK_BYTES = 16 * 1024
"""As much of an answer as is kept to look for its usage: of an event, of a whole body's beginning and of its end."""

USAGE_MARK = b'"usage"'
"""Without it an event tells no token counts."""
EVENT_END = b"\n\n"
"""How events end, where lines end as nearly all engines end them."""

_TRIES = 4
_MOST_TOKENS = 1 << 40
_END_CRLF = b"\r\n\r\n"
_ENDS = (EVENT_END, _END_CRLF)
# Atomic, or the two halves of one CRLF would count as two line ends.
_END = re.compile(rb"(?>\r\n|\r|\n)(?>\r\n|\r|\n)")
_VALUE = re.compile(r'"usage"[ \t\r\n]*:[ \t\r\n]*')
_HAS_CHOICES = re.compile(rb'"choices"[ \t]*:[ \t]*\[[ \t]*[^\] \t]')
_NO_CHOICES = re.compile(rb'"choices"[ \t]*:[ \t]*\[[ \t]*\]')
_RESPONSE_ID = re.compile(rb'"id"[ \t\r\n]*:[ \t\r\n]*"([A-Za-z0-9_.:-]{1,128})"')
# As vLLM spells it where nothing of interest follows: worth a way of its own, a ninth of what it takes by JSON.
_COUNT = rb"(0|[1-9][0-9]{0,8})"
_PLAIN = re.compile(
    rb'"usage":\{"prompt_tokens":%b,"total_tokens":%b,"completion_tokens":%b(?:,"prompt_tokens_details":null)?\}'
    rb'(?:,"[a-z_]{1,40}":null){0,20}\}\s*\Z' % (_COUNT, _COUNT, _COUNT)
)
_decode = json.JSONDecoder().raw_decode

OnId = Callable[[str], None]


class Tap(Protocol):
    """Looks at one answer's body. ``tokens``: how many it has brought so far, roughly."""

    tokens: int
    usage: Usage | None

    @property
    def between_events(self) -> bool:
        """Whether what was passed on ends where an event ends, as far as there are events."""

    def feed(self, data: bytes) -> bytes:
        """Look at what has come; returns what is to be passed on now."""

    def end(self, last: bytes = b"") -> bytes:
        """The answer is complete with ``last``. Returns what is to be passed on of that and of what was held back."""


def make_tap(
    path: str, kind: bytes, *, drops_usage: bool = False, on_id: OnId | None = None
) -> EventTap | BodyTap | None:
    """What looks at an uncompressed answer of ``path``, None for kinds that carry no token counts. ``kind``: its
    content type, in lower case and without parameters. ``drops_usage``: the extra last event of a stream goes.
    ``on_id`` is called with the id of the answer, before that is passed on."""
    if kind == b"text/event-stream":
        nested = path.endswith(("/messages", "/responses"))
        return EventTap(depths=(1, 2) if nested else (1,), drops_usage=drops_usage, on_id=on_id)
    if kind == b"application/json":
        return BodyTap(on_id)
    return None


class EventTap:
    """Server-sent events. ``depths``: how deep in an event's object its ``usage`` may lie (OpenAI's chunks 1; the named
    events of Anthropic's messages and of responses wrap it once more). While it ``is_idle``, a whole event without
    ``USAGE_MARK`` may pass by without ``feed`` if it is counted in ``tokens``: this stands between two events and looks
    for nothing else."""

    __slots__ = ("_depths", "_drops", "_held", "_on_id", "_passed", "_skipping", "is_idle", "tokens", "usage")

    def __init__(self, *, depths: tuple[int, ...] = (1,), drops_usage: bool = False, on_id: OnId | None = None) -> None:
        self._depths = depths
        self._drops = drops_usage
        self._on_id = on_id
        self.is_idle = on_id is None
        self._skipping = False  # what is left of the current event is of no interest
        self._held = b""  # the current event so far (skipping: its last bytes), of which ...
        self._passed = 0  # ... so many bytes were passed on already
        self.tokens = 0
        self.usage: Usage | None = None

    @property
    def between_events(self) -> bool:
        return not self._passed

    def feed(self, data: bytes) -> bytes:
        # Whole events. (``in`` costs twice what ``find`` does: it tries for an integer first.)
        if self.is_idle and data.find(USAGE_MARK) < 0 and data.endswith(_ENDS):
            self.tokens += data.count(EVENT_END) or data.count(_END_CRLF)
            return data
        return self._look(data)

    def end(self, last: bytes = b"") -> bytes:
        passed_on = self.feed(last) if last else b""
        rest = self._held[self._passed :]
        self.tokens += self._skipping
        if self._skipping or not self._held or self._keeps(self._held):
            return passed_on + rest
        return passed_on

    def _look(self, data: bytes) -> bytes:
        data, passed = self._held + data, self._passed
        returns = b"\r" in data
        out: list[bytes] = []
        start = 0
        while (end := _event_end(data, start, returns=returns)) > 0:
            if self._skipping:
                self._skipping, keeps = False, True
                self.tokens += 1
            else:
                keeps = self._keeps(data[start:end])
            if keeps:
                out.append(data[max(start, passed) : end])
            start = end
        self._rest(data, start, passed, out)
        self.is_idle = not (self._held or self._skipping or self._on_id)
        return b"".join(out)

    def _rest(self, data: bytes, start: int, passed: int, out: list[bytes]) -> None:
        """An event that is not complete: ``data`` from ``start`` on."""
        rest = data[start:]
        self._skipping = bool(rest) and (self._skipping or self._is_dull(rest))
        if rest and self._drops and not self._skipping:
            self._held, self._passed = rest, 0
            return
        if len(data) > max(start, passed):
            out.append(data[max(start, passed) :])
        self._held = rest[-3:] if self._skipping else rest[-LOOK_BYTES:]
        self._passed = len(self._held)

    def _is_dull(self, rest: bytes) -> bool:
        """Whether an event that begins like ``rest`` cannot be the one to drop. Others are watched as they pass."""
        if not self._drops:
            return False
        begins = rest.startswith(b"data:") or b"data:".startswith(rest)
        return not begins or len(rest) > LOOK_BYTES or _HAS_CHOICES.search(rest) is not None

    def _keeps(self, event: bytes) -> bool:
        """Take in a whole event (or its end, when it was too long). False: it is not for the client."""
        self.tokens += 1
        if self._on_id is not None:
            found = _RESPONSE_ID.search(event)
            if found is not None:
                self._on_id(found[1].decode())
                self._on_id = None
        if USAGE_MARK not in event:
            return True
        told = _plain_usage(event, self.usage)
        if told is None:
            usage = _usage_at_end(event, self._depths)
            if usage is None:
                return True
            told = read_usage(usage, self.usage)
        self.usage = told
        extra = self._drops and _NO_CHOICES.search(event) is not None
        self.tokens -= extra
        return not extra


class BodyTap:
    """A JSON object that comes whole: counts nothing until it ends."""

    __slots__ = ("_head", "_on_id", "_room", "_tail", "tokens", "usage")

    between_events = True

    def __init__(self, on_id: OnId | None = None) -> None:
        self._head: list[bytes] = []
        self._room = LOOK_BYTES
        self._tail = b""
        self._on_id = on_id
        self.tokens = 0
        self.usage: Usage | None = None

    def feed(self, data: bytes) -> bytes:
        if self._room > 0:
            self._head.append(data[: self._room])
            self._room -= len(data)
        self._tail = data[-LOOK_BYTES:] if len(data) >= LOOK_BYTES else (self._tail + data)[-LOOK_BYTES:]
        return data

    def end(self, last: bytes = b"") -> bytes:
        if self._head:
            self.feed(last)
            head, tail = b"".join(self._head), self._tail
            self._head, self._tail = [], b""
        else:  # it came in one piece
            head, tail = last[:LOOK_BYTES], last[-LOOK_BYTES:]
        self.usage = _plain_usage(tail, None)
        if self.usage is None:
            found = _usage_at_end(tail, (1,)) if USAGE_MARK in tail else None
            if found is None and USAGE_MARK in head:
                found = _usage_at_start(head)
            self.usage = None if found is None else read_usage(found, None)
        self.tokens = self.usage.completion_tokens if self.usage is not None else 0
        if self._on_id is not None:
            named = _RESPONSE_ID.search(head)
            if named is not None:
                self._on_id(named[1].decode())
        return last


def read_usage(fields: Mapping[str, Any], before: Usage | None) -> Usage | None:
    """An engine's ``usage`` in any of its dialects. What it leaves out is as ``before`` (Anthropic's streams tell the
    prompt first and the answer last)."""
    prompt = _count(fields, "prompt_tokens", "input_tokens")
    completion = _count(fields, "completion_tokens", "output_tokens")
    if prompt is None and completion is None:
        if before is not None:
            return before
        prompt = _count(fields, "total_tokens")  # rerank tells no more
        if prompt is None:
            return None
    details = fields.get("prompt_tokens_details") or fields.get("input_tokens_details")
    cached = _count(details, "cached_tokens") if isinstance(details, Mapping) else None
    if cached is None:
        cached = _count(fields, "cache_read_input_tokens")
    old = before or Usage(0, 0)
    return Usage(
        old.prompt_tokens if prompt is None else prompt,
        old.completion_tokens if completion is None else completion,
        old.cached_tokens if cached is None else cached,
    )


def _count(fields: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS:
            return value
    return None


def _event_end(data: bytes, start: int, *, returns: bool) -> int:
    """Where the event at ``start`` ends, its empty line included; -1: not yet. ``returns``: there are CRs, so that the
    slower look is needed and a CR at the end may be half of a line end."""
    if not returns:
        at = data.find(EVENT_END, start)
        return at if at < 0 else at + 2
    found = _END.search(data, start)
    if found is None or (found.end() == len(data) and data.endswith(b"\r")):
        return -1
    return found.end()


def _plain_usage(text: bytes, before: Usage | None) -> Usage | None:
    """What ``_usage_at_end`` and ``read_usage`` make of it, where it is spelt as ``_PLAIN`` says. None: it is not."""
    found = _PLAIN.match(text, max(0, text.rfind(USAGE_MARK)))
    if found is None:
        return None
    return Usage(int(found[1]), int(found[3]), 0 if before is None else before.cached_tokens)


def _usage_at_end(text: bytes, depths: tuple[int, ...]) -> Mapping[str, Any] | None:
    """The ``usage`` of the JSON object that ``text`` ends with, where it lies at one of these depths. That is checked
    by what follows it: exactly so many objects are closed. Text inside strings is never taken for it, because there
    the quotes are escaped."""
    end = text.rstrip()
    at = len(end)
    for _ in range(_TRIES):
        at = end.rfind(USAGE_MARK, 0, at)
        if at < 0:
            return None
        for depth in depths:
            value = _loads(b'{"":' * (depth - 1) + b"{" + end[at:])
            for _ in range(depth - 1):
                value = value.get("") if isinstance(value, dict) else None
            if isinstance(value, dict) and isinstance(value.get("usage"), dict):
                usage: dict[str, Any] = value["usage"]
                return usage
    return None


def _usage_at_start(text: bytes) -> Mapping[str, Any] | None:
    """The ``usage`` of the JSON object that ``text`` begins with, among its first members."""
    at = -1
    for _ in range(_TRIES):
        at = text.find(USAGE_MARK, at + 1)
        if at < 0:
            return None
        if isinstance(_loads(text[:at] + b'"":0}'), dict):
            value = _loads_first(text[at:])
            return value if isinstance(value, dict) else None
    return None


def _loads(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _loads_first(text: bytes) -> Any:
    plain = text.decode("utf-8", "replace")
    colon = _VALUE.match(plain)
    try:
        return _decode(plain, colon.end())[0] if colon is not None else None
    except (ValueError, RecursionError):
        return None
