"""Lines joined for a real simulator: what each gets is what the simulator answers it alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.simulator import Simulator
from vllm_bootstrap.batches.joining import COMPLETIONS, EMBEDDINGS, join, plan, split

PROMPTS = ["one", "two words", "ünï ☃ 𝄞", "a b c d e f"]


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    with Simulator() as one:
        yield one


CASES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"max_tokens": 5}),
    (COMPLETIONS, {"max_tokens": 3, "n": 3, "seed": 7}),
    (EMBEDDINGS, {"dimensions": 4}),
    (EMBEDDINGS, {"encoding_format": "base64"}),
]


@pytest.mark.parametrize(("path", "said"), CASES)
def test_together_as_alone(simulator: Simulator, path: str, said: dict[str, Any]) -> None:
    field, parts = ("prompt", "choices") if path == COMPLETIONS else ("input", "data")
    lines = [{"model": "tiny", field: prompt, **said} for prompt in PROMPTS]
    raw = [json.dumps(line).encode() for line in lines]
    assert len({plan(path, one) for one in raw}) == 1
    headers = {"content-type": "application/json"}
    reply = simulator.request("POST", path, join(path, raw), headers)
    assert reply.status == 200
    answers = split(path, raw, reply.body)
    assert answers is not None
    together = [json.loads(one) for one in answers]
    alone = [simulator.request("POST", path, one, headers).json() for one in raw]
    assert [one[parts] for one in together] == [one[parts] for one in alone]
    assert [one.keys() for one in together] == [one.keys() for one in alone]
    assert len({one["id"] for one in together}) == len(PROMPTS)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert sum(one["usage"][name] for one in together) == sum(one["usage"][name] for one in alone)


def test_one_bad_prompt_refuses_all(simulator: Simulator) -> None:
    raw = [json.dumps({"model": "tiny", "prompt": prompt}).encode() for prompt in ("fine", "too long " * 50_000)]
    joined, headers = join(COMPLETIONS, raw), {"content-type": "application/json"}
    assert simulator.request("POST", COMPLETIONS, joined, headers).status == 400
