"""Traces: which request arrives when, how long its prompt and its answer are. One JSON object a line.

``{"at": 0.25, "prompt_tokens": 120, "output_tokens": 64, "class": "realtime", "priority": 0, "shared_prefix": 0}``:
``at`` in seconds from the start, ``shared_prefix`` the leading tokens that all requests have in common. A trace says
nothing about an engine; prompts are made from it with a seed, so that every replay sends the same bytes.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

# Token ids that every model has and that are no special ones.
LOWEST_ID, HIGHEST_ID = 10, 2000


@dataclass(frozen=True, slots=True)
class Request:
    at: float
    prompt_tokens: int
    output_tokens: int
    cls: str = "realtime"
    priority: int = 0
    shared_prefix: int = 0


@dataclass(frozen=True, slots=True)
class Mix:
    """A kind of traffic: its share, the medians of its lengths (log-normal), and its priority."""

    cls: str
    share: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    spread: float = 0.6
    longest: int = 1200


CHAT_AND_BATCH = (Mix("realtime", 0.5, 120, 48), Mix("batch", 0.5, 300, 64, priority=100))


def poisson(rate: float, seconds: float, *, seed: int, mixes: Iterable[Mix] = CHAT_AND_BATCH) -> list[Request]:
    """Arrivals at ``rate`` a second for so many seconds."""
    source = random.Random(seed)
    kinds = list(mixes)
    made: list[Request] = []
    at = 0.0
    while (at := at + source.expovariate(rate)) < seconds:
        mix = source.choices(kinds, [kind.share for kind in kinds])[0]
        prompt, output = (
            max(1, min(mix.longest, round(source.lognormvariate(math.log(median), mix.spread))))
            for median in (mix.prompt_tokens, mix.output_tokens)
        )
        made.append(Request(round(at, 6), prompt, min(output, 256), mix.cls, mix.priority))
    return made


def prompt_ids(request: Request, index: int, seed: int = 0) -> list[int]:
    """The prompt's token ids: the common prefix, then ids of its own."""
    common = random.Random(seed).choices(
        range(LOWEST_ID, HIGHEST_ID), k=min(request.shared_prefix, request.prompt_tokens)
    )
    own = random.Random(f"{seed}/{index}")
    return common + own.choices(range(LOWEST_ID, HIGHEST_ID), k=request.prompt_tokens - len(common))


def write(requests: Iterable[Request], file: Path) -> None:
    with file.open("w") as out:
        for request in requests:
            fields = asdict(request)
            out.write(json.dumps({"class" if name == "cls" else name: fields[name] for name in fields}) + "\n")


def read(file: Path) -> list[Request]:
    """Raises ``ValueError`` naming the line that is none."""
    return list(_parsed(file))


def _parsed(file: Path) -> Iterator[Request]:
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            fields = json.loads(line)
            yield Request(cls=fields.pop("class", "realtime"), **fields)
        except (ValueError, TypeError, AttributeError) as exc:
            raise ValueError(f"{file}:{number}: {exc}") from None
