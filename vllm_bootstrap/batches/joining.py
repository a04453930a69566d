"""Which lines may travel as one list request, that request, and its answer taken apart again. PURE.

Invariant: each line gets the answer its own request would have got, or ``split`` gives None and nothing is said of any.
Two lines may travel together when all they say is equal but for one prompt each (``priority`` is the scheduler's).
Engines carry each prompt of a list out as a request of its own, with the same settings, ``n`` and ``seed`` included.

What the caller owes: a joined request that is refused (4xx) says nothing of any one of its lines, since one bad prompt
is enough: each is then sent singly, as it is where ``split`` gives None. A joined request runs as many sequences as its
lines do together: who limits sequences must count them before joining.

Where an answer to several lines differs from answers to each:

* ``id`` has the line's place appended, so that no two lines have the same;
* ``usage`` is told by engines for all prompts together. It is known exactly for each line where the engine lists token
  ids (``return_token_ids``, which a joined completion asks for; the lists are taken out again unless the lines asked
  for them), and of prompts that were sent as token ids. Else the total is shared out by length of text, so that the
  sums of a batch stay what the engine has counted, and such a ``usage`` says so: ``"apportioned": true``;
* details of ``usage`` (cached tokens) and per-request metrics, which engines tell of single prompts only, are null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.gateway import bodies as json_bodies

COMPLETIONS, EMBEDDINGS = "/v1/completions", "/v1/embeddings"
MOST_BYTES = 128 * 1024
"""Longest bodies that travel together: a longer request could not be taken back for realtime (``REPLAYED_BYTES``)."""

_PROMPT_FIELD = {COMPLETIONS: "prompt", EMBEDDINGS: "input"}
_LIST_FIELD = {COMPLETIONS: "choices", EMBEDDINGS: "data"}
_TOKEN_IDS = "return_token_ids"  # noqa: S105 - the name of a field
_ID_LISTS = ("token_ids", "prompt_token_ids")
_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")

# Fields that say something of one prompt or of one answer, or make answers that cannot be taken apart.
_SINGLE: Mapping[str, frozenset[str]] = {
    COMPLETIONS: frozenset({"stream", "echo", "use_beam_search", "request_id", "prompt_embeds", "suffix", "input"}),
    EMBEDDINGS: frozenset({"stream", "messages", "request_id", "prompt", "n", "best_of"}),
}
_ENCODINGS = (None, "float", "base64")


class Plan(NamedTuple):
    """Lines of equal plans may travel together. ``sequences`` each of them makes."""

    key: bytes
    sequences: int


class _One(NamedTuple):
    """A line that may travel with others: its prompt, and all else it says."""

    prompt: str | list[int]
    rest: dict[str, Any]
    choices: int


def plan(path: str, body: bytes) -> Plan | None:
    """How this line may travel with others, None: alone."""
    one = _read(path, body)
    if one is None:
        return None
    kind = "text" if isinstance(one.prompt, str) else "tokens"
    try:  # what JSON cannot hold (a number beyond all floats) goes as it was written
        key = json.dumps([path, kind, one.rest], sort_keys=True, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    return Plan(key, json_bodies.sequences(path, one.rest))


def join(path: str, bodies: Sequence[bytes]) -> bytes:
    """One request for lines of equal plans."""
    ones = _read_all(path, bodies)
    joined = {**ones[0].rest, _PROMPT_FIELD[path]: [one.prompt for one in ones]}
    if path == COMPLETIONS:
        joined[_TOKEN_IDS] = True
    return _dump(joined)


def split(path: str, bodies: Sequence[bytes], answer: bytes) -> list[bytes] | None:
    """An answer of 200 to ``join(path, bodies)``, as one answer to each; None when it is not what was asked for."""
    ones = _read_all(path, bodies)
    whole = _object(answer)
    parts = _in_order(whole.get(_LIST_FIELD[path]), len(ones) * ones[0].choices) if whole is not None else None
    if whole is None or parts is None:
        return None
    groups = [parts[at : at + ones[0].choices] for at in range(0, len(parts), ones[0].choices)]
    usages = _usages(whole.get("usage"), ones, groups)
    if usages is None:
        return None
    if path == COMPLETIONS and ones[0].rest.get(_TOKEN_IDS) is not True:
        for part in parts:
            part.update((name, None) for name in _ID_LISTS if name in part)
    return [_dump(_answer(path, whole, at, group, usages[at])) for at, group in enumerate(groups)]


# Reading lines


def _read(path: str, body: bytes) -> _One | None:
    name = _PROMPT_FIELD.get(path)
    if name is None:
        return None
    try:
        rest = dict(json_bodies.parse(body).fields)
    except ApiError:
        return None
    prompt = _only(rest.pop(name, None))
    rest.pop(json_bodies.OVERWRITTEN, None)
    if prompt is None or any(rest.get(field) not in (None, False) for field in _SINGLE[path]):
        return None
    if path == EMBEDDINGS:
        return _One(prompt, rest, 1) if rest.get("encoding_format") in _ENCODINGS else None
    choices = rest.get("n", 1)
    return _One(prompt, rest, choices) if type(choices) is int and choices > 0 else None


def _read_all(path: str, bodies: Sequence[bytes]) -> list[_One]:
    ones = [_read(path, body) for body in bodies]
    if not ones or any(one is None for one in ones):
        raise ValueError("these lines have no plan to travel together")
    return [one for one in ones if one is not None]


def _only(value: object) -> str | list[int] | None:
    """The one prompt that a prompt field holds, None when that is not one, or no text and no token ids."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    is_tokens = isinstance(value, list) and value and all(type(one) is int for one in value)
    return value if is_tokens and isinstance(value, list) else None


# Taking answers apart


def _object(answer: bytes) -> dict[str, Any] | None:
    try:
        whole = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return whole if isinstance(whole, dict) else None


def _in_order(parts: object, number: int) -> list[dict[str, Any]] | None:
    """So many objects, each with its own ``index``."""
    if not isinstance(parts, list) or len(parts) != number:
        return None
    found = {part.get("index"): part for part in parts if isinstance(part, dict) and type(part.get("index")) is int}
    return [found[at] for at in range(number)] if found.keys() == set(range(number)) else None


def _answer(
    path: str, whole: Mapping[str, Any], at: int, group: Sequence[dict[str, Any]], usage: dict[str, Any] | None
) -> dict[str, Any]:
    """The answer to the line at ``at``, its members in the order in which the engine wrote them."""
    answer = dict(whole)
    if isinstance(whole.get("id"), str):
        answer["id"] = f"{whole['id']}-{at}"
    answer[_LIST_FIELD[path]] = [{**part, "index": index} for index, part in enumerate(group)]
    if usage is not None:
        answer["usage"] = usage
    return answer


def _usages(
    usage: object, ones: Sequence[_One], groups: Sequence[Sequence[Mapping[str, Any]]]
) -> Sequence[dict[str, Any] | None] | None:
    """What each line has used, None for each where the engine told nothing; None where that makes no sense."""
    if usage is None:
        return [None] * len(ones)
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    if type(prompt) is not int or type(completion) is not int or prompt < 0 or completion < 0:
        return None
    read = _shared(prompt, [_prompt_tokens(*each) for each in zip(ones, groups, strict=True)])
    made = _shared(completion, [_made_tokens(group) for group in groups])
    exact = read.exact and made.exact
    return [_usage(usage, *each, exact=exact) for each in zip(read.shares, made.shares, strict=True)]


def _usage(whole: Mapping[str, Any], prompt: int, completion: int, *, exact: bool) -> dict[str, Any]:
    counts = dict(zip(_COUNTS, (prompt, completion, prompt + completion), strict=True))
    usage = {name: counts.get(name) for name in whole}  # all else cannot be told of one
    return usage if exact else {**usage, "apportioned": True}


class _Weight(NamedTuple):
    """``tokens`` if they are known, else ``length`` of text."""

    length: int
    tokens: int | None


class _Shares(NamedTuple):
    shares: list[int]
    exact: bool


def _prompt_tokens(one: _One, group: Sequence[Mapping[str, Any]]) -> _Weight:
    if not isinstance(one.prompt, str):
        return _Weight(len(one.prompt), len(one.prompt))
    ids = group[0].get("prompt_token_ids")
    return _Weight(len(one.prompt), len(ids) if isinstance(ids, list) else None)


def _made_tokens(group: Sequence[Mapping[str, Any]]) -> _Weight:
    lists = [part.get("token_ids") for part in group]
    known = [len(ids) for ids in lists if isinstance(ids, list)]
    texts = [part.get("text") for part in group]
    length = sum(len(text) for text in texts if isinstance(text, str))
    return _Weight(length, sum(known) if len(known) == len(group) else None)


def _shared(total: int, weights: Sequence[_Weight]) -> _Shares:
    """``total`` among lines. Exact when it is what is known of them, or nothing at all."""
    known = [weight.tokens for weight in weights if weight.tokens is not None]
    if total == 0 or (len(known) == len(weights) and sum(known) == total):
        return _Shares(known if total else [0] * len(weights), exact=True)
    lengths = [weight.length for weight in weights]
    if not any(lengths):
        lengths = [1] * len(weights)
    shares, all_length, passed, given = [], sum(lengths), 0, 0
    for length in lengths:  # by sums so far, so that all of it is given and no rounding adds up
        passed += length
        shares.append(total * passed // all_length - given)
        given += shares[-1]
    return _Shares(shares, exact=False)


def _dump(value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can hold
        return json.dumps(value, separators=(",", ":")).encode()
