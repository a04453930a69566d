"""Which lines travel together, and what an answer must be to be taken apart."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_bootstrap.batches.joining import COMPLETIONS, EMBEDDINGS, Plan, join, plan, split

LINE = {"model": "m", "prompt": "x"}


def raw(value: Any) -> bytes:
    return json.dumps(value).encode()


ALONE = {
    "a chat": ("/v1/chat/completions", {"model": "m", "messages": []}),
    "two prompts": (COMPLETIONS, {**LINE, "prompt": ["a", "b"]}),
    "no prompt": (COMPLETIONS, {"model": "m"}),
    "no tokens": (COMPLETIONS, {**LINE, "prompt": []}),
    "no token ids": (COMPLETIONS, {**LINE, "prompt": [True, False]}),
    "a number": (COMPLETIONS, {**LINE, "prompt": 1}),
    "a stream": (COMPLETIONS, {**LINE, "stream": True}),
    "an echo": (COMPLETIONS, {**LINE, "echo": True}),
    "beams": (COMPLETIONS, {**LINE, "use_beam_search": True}),
    "an id of its own": (COMPLETIONS, {**LINE, "request_id": "r"}),
    "n is null": (COMPLETIONS, {**LINE, "n": None}),
    "n is true": (COMPLETIONS, {**LINE, "n": True}),
    "n is nothing": (COMPLETIONS, {**LINE, "n": 0}),
    "a prompt too many": (EMBEDDINGS, {"model": "m", "input": "x", "prompt": "y"}),
    "messages": (EMBEDDINGS, {"model": "m", "input": "x", "messages": []}),
    "raw bytes": (EMBEDDINGS, {"model": "m", "input": "x", "encoding_format": "bytes"}),
}  # fmt: skip


@pytest.mark.parametrize("why", ALONE)
def test_what_cannot_be_taken_apart_goes_alone(why: str) -> None:
    path, body = ALONE[why]
    assert plan(path, raw(body)) is None


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"prompt":"x","prompt":"y"}', b'{"prompt":"x","temperature":1e999}'])
def test_what_is_no_plain_json_goes_alone(body: bytes) -> None:
    assert plan(COMPLETIONS, body) is None


def test_lines_without_a_plan_are_not_joined() -> None:
    with pytest.raises(ValueError, match="no plan"):
        join(COMPLETIONS, [raw({**LINE, "echo": True})])


def test_text_and_tokens_do_not_mix() -> None:
    text, tokens = (plan(COMPLETIONS, raw({**LINE, "prompt": prompt})) for prompt in ("x", [1]))
    assert isinstance(text, Plan)
    assert text != tokens
    assert plan(COMPLETIONS, raw({**LINE, "n": 2, "best_of": 4})) != text
    assert (plan(COMPLETIONS, raw({**LINE, "n": 2, "best_of": 4})) or text).sequences == 4


def test_order_and_spelling_of_fields_do_not_matter() -> None:
    assert plan(COMPLETIONS, b'{"prompt": "x", "model": "m"}') == plan(
        COMPLETIONS, b'{"model":"\\u006d","prompt":["y"]}'
    )


GOOD: dict[str, Any] = {
    "id": "cmpl-1",
    "choices": [{"index": 0, "text": "a", "token_ids": [1]}, {"index": 1, "text": "bcd", "token_ids": [2, 3, 4]}],
    "usage": {"prompt_tokens": 4, "total_tokens": 8, "completion_tokens": 4},
}
PAIR = [raw({**LINE, "prompt": "x"}), raw({**LINE, "prompt": "xyz"})]


def test_usage_that_is_not_known_is_shared_out_and_says_so() -> None:
    answers = split(COMPLETIONS, PAIR, raw(GOOD))
    assert answers is not None
    usages = [json.loads(one)["usage"] for one in answers]
    assert usages == [
        {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1, "apportioned": True},
        {"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3, "apportioned": True},
    ]


def test_usage_that_contradicts_the_lists_of_tokens_is_shared_out() -> None:
    answer = json.loads(raw(GOOD))
    answer["choices"] = [{**one, "prompt_token_ids": [1]} for one in answer["choices"]]
    answers = split(COMPLETIONS, PAIR, raw(answer))
    assert answers is not None
    assert all(json.loads(one)["usage"]["apportioned"] for one in answers)
    assert all(json.loads(one)["choices"][0]["token_ids"] is None for one in answers)


def test_no_usage_stays_none() -> None:
    answers = split(COMPLETIONS, PAIR, raw({"choices": GOOD["choices"]}))
    assert answers is not None
    assert json.loads(answers[1]) == {"choices": [{"index": 0, "text": "bcd", "token_ids": None}]}


def test_choices_out_of_order_find_their_lines() -> None:
    answers = split(COMPLETIONS, PAIR, raw({**GOOD, "choices": GOOD["choices"][::-1]}))
    assert answers is not None
    assert [json.loads(one)["choices"][0]["text"] for one in answers] == ["a", "bcd"]


def test_empty_prompts_share_alike() -> None:
    pair = [raw({"model": "m", "input": ""})] * 2
    data = [{"index": 0, "embedding": [1]}, {"index": 1, "embedding": [2]}]
    answers = split(EMBEDDINGS, pair, raw({"data": data, "usage": {"prompt_tokens": 4, "total_tokens": 4}}))
    assert answers is not None
    assert [json.loads(one)["usage"]["prompt_tokens"] for one in answers] == [2, 2]


def test_half_a_character_survives() -> None:
    choices = [{"index": at, "text": "\ud83d"} for at in range(2)]
    answers = split(COMPLETIONS, PAIR, raw({"choices": choices}))
    assert answers is not None
    assert json.loads(answers[0])["choices"][0]["text"] == "\ud83d"


BAD: dict[str, bytes] = {
    "no JSON": b"{",
    "no object": b"[]",
    "too deep": b"[" * 100_000,
    "nothing": b"{}",
    "too few": raw({**GOOD, "choices": GOOD["choices"][:1]}),
    "too many": raw({**GOOD, "choices": [*GOOD["choices"], {"index": 2}]}),
    "one twice": raw({**GOOD, "choices": [{"index": 0}] * 2}),
    "no index": raw({**GOOD, "choices": [{}, {}]}),
    "no objects": raw({**GOOD, "choices": [1, 2]}),
    "usage is a word": raw({**GOOD, "usage": "much"}),
    "usage is negative": raw({**GOOD, "usage": {"prompt_tokens": -1}}),
}


@pytest.mark.parametrize("why", BAD)
def test_an_answer_that_is_not_what_was_asked_for(why: str) -> None:
    assert split(COMPLETIONS, PAIR, BAD[why]) is None


def test_a_field_of_the_other_route_does_not_mislead():
    line = raw({"model": "m", "input": "hello", "prompt": None})
    assert json.loads(join(EMBEDDINGS, [line, line])) == {"model": "m", "input": ["hello", "hello"], "prompt": None}
