from __future__ import annotations

from typing import Any

import pytest

from vllm_bootstrap.batches.ordering import BOUNDARIES, Order
from vllm_bootstrap.batches.types import ENDPOINTS

SHORT, LONG = BOUNDARIES[0], BOUNDARIES[-1]


def order(*prompts: str, endpoint: str = "/v1/completions", field: str = "prompt") -> list[int]:
    """Numbers of lines in the order of work."""
    made = Order(endpoint)
    keys = {number: made.key(number, {field: prompt}) for number, prompt in enumerate(prompts, 1)}
    assert len(set(keys.values())) == len(prompts)
    return sorted(keys, key=lambda number: keys[number])


def test_lines_that_begin_alike_follow_the_first_of_them() -> None:
    a, b = "a" * SHORT, "b" * SHORT
    assert order(a + "1", b + "1", "short", a + "2", "c" * SHORT, b + "2", a + "3") == [1, 4, 7, 2, 6, 3, 5]


def test_all_others_stay_in_the_order_of_the_file() -> None:
    assert order(*[f"{number}" for number in range(300)]) == list(range(1, 301))
    almost = "a" * (SHORT - 1)
    assert order(almost + "1", "x", almost + "2") == [1, 2, 3]
    assert order(almost, "x", almost) == [1, 2, 3]  # too short, though equal


def test_those_that_share_more_lie_closer() -> None:
    a = "a" * SHORT
    one, two = a + "1" * SHORT, a + "2" * SHORT
    # The first of all leads its group, whatever it shares beyond.
    assert order(a + "x", one + "x", two + "x", one + "y", two + "y", a + "y") == [1, 2, 4, 3, 5, 6]


def test_only_the_beginning_is_looked_at() -> None:
    same = "a" * LONG
    assert order(same + "1", "x", same + "2" * LONG, same) == [1, 3, 4, 2]


def test_those_that_share_all_that_is_looked_at_stay_as_they_are() -> None:
    same = "a" * LONG
    count = len(BOUNDARIES) + 3
    assert order(*(f"{same}{number}" for number in range(count)), "x") == list(range(1, count + 2))


def beginning(endpoint: str, body: dict[str, Any]) -> str:
    return Order(endpoint).beginning(body)


CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("endpoint", "one", "other", "alike"),
    [
        (CHAT, {"messages": [{"role": "u", "content": "x"}]}, {"messages": [{"role": "s", "content": "x"}]}, False),
        (CHAT, {"messages": [{"role": "u", "content": "x"}]}, {"messages": [{"content": "x", "role": "u"}]}, True),
        (CHAT, {"messages": [{"content": "x"}]}, {"messages": ["x"]}, True),
        (CHAT, {"messages": [{"role": 1, "content": [{"text": "x"}]}]}, {"messages": []}, False),
        (CHAT, {"tools": [{"a": 1}], "messages": ["x"]}, {"messages": ["x"]}, False),
        (CHAT, {"messages": "odd", "seed": 1}, {"messages": "odd", "seed": 2}, True),
        ("/v1/completions", {"prompt": ["a", "b"]}, {"prompt": ["a", "c"]}, False),
        ("/v1/completions", {"prompt": [1, 2, 3]}, {"prompt": [1, 2, 4]}, False),
        ("/v1/completions", {"prompt": [[1, 2]]}, {"prompt": [[1, 2]]}, True),
        ("/v1/embeddings", {"input": "x"}, {"input": "y"}, False),
        ("/v1/responses", {"instructions": "x", "input": "a"}, {"instructions": "x", "input": "b"}, False),
        ("/v1/score", {"text_1": "x", "text_2": "a"}, {"text_1": "x", "text_2": "b"}, True),
        ("/v1/rerank", {"query": "x"}, {"query": "y"}, False),
        ("/v1/rerank", {"query": None}, {}, True),
    ],
)  # fmt: skip
def test_what_a_prompt_begins_with(endpoint: str, one: dict[str, Any], other: dict[str, Any], alike: bool) -> None:
    assert (beginning(endpoint, one) == beginning(endpoint, other)) is alike


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_endpoint_has_an_order(endpoint: str) -> None:
    assert Order(endpoint).key(1, {}) == (1).to_bytes(8, "big")


@pytest.mark.parametrize(
    "body",
    [
        {"tools": ["x" * LONG], "messages": ["y"]},
        {"messages": ["x" * LONG * 2, "y"]},
        {"messages": [1] * LONG * 2},
        {"messages": "x" * LONG * 2},
    ],
)
def test_a_long_prompt_costs_no_more_than_its_beginning(body: dict[str, Any]) -> None:
    assert len(beginning(CHAT, body)) == LONG
