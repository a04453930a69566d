"""What the pretended model "knows": splitting text into tokens, answers, vectors and scores. Deterministic.

Invariant: the pieces of a text joined are the text; the same prompt gives the same answer in every process.
It must not know requests or time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Sequence

_PIECE = re.compile(r"\s*\S{1,16}|\s+")
_STOP, _LENGTH = "stop", "length"
FALLBACK = "ok"
_encode = json.JSONEncoder(ensure_ascii=False).encode
REMEMBERED_TOKENS = 65_536


def pieces(text: str) -> list[str]:
    """Split ``text`` into tokens: words with the space before them, long ones in parts of 16 characters."""
    return _PIECE.findall(text)


def count_tokens(text: str) -> int:
    return len(pieces(text))


class Answer:
    """The words of one answer, piece by piece: the prompt's words, repeated when more are wanted.

    ``count`` tokens will be produced; ``finish_reason`` is ``stop`` when the echo is complete or a stop string was
    met (``stop_reason``), else ``length``. Pieces are made on demand, so a long answer costs no memory.
    """

    __slots__ = ("_base", "_encoded", "_first", "_first_encoded", "count", "finish_reason", "stop_reason")

    def __init__(self, base: Sequence[str], count: int, finish_reason: str, stop_reason: str | None = None) -> None:
        self._first = base[0]
        # From the second round on the first word needs a space before it.
        self._base = (" " + base[0], *base[1:count])
        self._encoded: list[bytes | None] = [None] * len(self._base)
        self._first_encoded = escaped(self._first)
        self.count = count
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason

    def piece(self, i: int) -> str:
        return self._base[i % len(self._base)] if i else self._first

    def encoded(self, i: int) -> bytes:
        """Piece ``i`` as the inside of a JSON string, UTF-8."""
        if i == 0:
            return self._first_encoded
        at = i % len(self._base)
        known = self._encoded[at]
        if known is None:
            known = self._encoded[at] = escaped(self._base[at])
        return known

    def text(self) -> str:
        return "".join(self.piece(i) for i in range(self.count))


def escaped(text: str) -> bytes:
    """``text`` as the inside of a JSON string, without the quotes. Lone surrogates stay escaped."""
    try:
        return _encode(text)[1:-1].encode()
    except UnicodeEncodeError:
        return json.dumps(text)[1:-1].encode()


def answer_to(
    prompt: str,
    *,
    max_tokens: int,
    index: int = 0,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    min_tokens: int = 0,
) -> Answer:
    """The answer to ``prompt``: an echo of its words, starting ``index`` words later for further choices.

    It ends when the echo is complete, unless ``ignore_eos`` or ``min_tokens`` ask for more, which repeats it.
    """
    words = pieces(prompt.strip()) or [FALLBACK]
    turn = index % len(words)
    base = words[turn:] + words[:turn]
    base[0] = base[0].lstrip()
    if turn:
        base[-turn] = " " + words[0]
    # The end of the echo is a token too, as a real model's end marker: it must fit below max_tokens.
    natural = max(len(base), min_tokens)
    complete = natural < max_tokens and not ignore_eos
    whole = Answer(base, natural if complete else max_tokens, _STOP if complete else _LENGTH)
    return _stopped(whole, [text for text in stop if text])


def _stopped(answer: Answer, stop: Sequence[str]) -> Answer:
    """Cut ``answer`` before the first stop string it contains."""
    text = answer.text() if stop else ""
    found = min(((at, mark) for mark in stop if (at := text.find(mark)) >= 0), default=None)
    if found is None:
        return answer
    at, mark = found
    kept = pieces(text[:at]) or [""]
    return Answer(kept, len(kept), _STOP, mark)


def embedding(text: str, size: int) -> list[float]:
    """A unit vector that depends on ``text`` alone."""
    raw = hashlib.shake_256(text.encode("utf-8", "surrogatepass")).digest(2 * size)
    values = [int.from_bytes(raw[2 * i : 2 * i + 2], "big") / 32767.5 - 1 for i in range(size)]
    norm = math.sqrt(sum(v * v for v in values)) or 1.0
    return [round(v / norm, 6) for v in values]


def score(one: str, other: str) -> float:
    """Likeness of two texts between 0 and 1: shared words over all words."""
    left, right = set(one.lower().split()), set(other.lower().split())
    return round(len(left & right) / len(left | right), 6) if left | right else 1.0


class Vocabulary:
    """Token ids for ``/tokenize`` and back. Ids are the same in every process; the way back is remembered for the
    last 65,536 tokens seen, an unknown id reads as ``<id>``."""

    def __init__(self) -> None:
        self._words: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        found = []
        for piece in pieces(text):
            token = zlib.crc32(piece.encode("utf-8", "surrogatepass")) >> 1
            self._words.pop(token, None)
            self._words[token] = piece
            found.append(token)
        while len(self._words) > REMEMBERED_TOKENS:
            del self._words[next(iter(self._words))]
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self._words.get(token, f"<{token}>") for token in tokens)
