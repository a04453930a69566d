"""Lines that travel together get what each would have got alone, and what is counted adds up."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_bootstrap.batches.joining import COMPLETIONS, EMBEDDINGS, join, plan, split

TEXT = st.text(max_size=30)  # surrogates too, as only an escape can write them
TOKENS = st.lists(st.integers(0, 50_000), min_size=1, max_size=8)
SETTINGS = st.fixed_dictionaries(
    {"model": st.sampled_from(["a", "b"])},
    optional={
        "n": st.integers(1, 3),
        "temperature": st.floats(0, 2),
        "seed": st.integers(-5, 5) | st.none(),
        "stop": st.lists(TEXT, max_size=2),
        "logit_bias": st.dictionaries(st.text(max_size=3), st.floats(-1, 1), max_size=2),
        "return_token_ids": st.booleans(),
        "echo": st.sampled_from([False, None]),
        "priority": st.integers(-9, 9),
        "encoding_format": st.sampled_from(["float", "base64", None]),
    },
)


def engine(path: str, body: dict[str, Any], *, lists_ids: bool) -> dict[str, Any]:
    """What an engine answers, a function of each prompt and the settings."""
    field = "prompt" if path == COMPLETIONS else "input"
    given_prompts = body[field]
    single = isinstance(given_prompts, str) or isinstance(given_prompts[0], int)
    prompts = [given_prompts] if single else given_prompts
    choices: list[dict[str, Any]] = []
    prompt_tokens = completion_tokens = 0
    for prompt in prompts:
        ids = prompt if isinstance(prompt, list) else [ord(one) for one in prompt] + [0]
        prompt_tokens += len(ids)
        for number in range(body.get("n", 1) if path == COMPLETIONS else 1):
            made = [one + number for one in ids[: 3 + number]]
            said = {"of": prompt, "seed": body.get("seed"), "temperature": body.get("temperature"), "number": number}
            choice: dict[str, Any] = {"index": len(choices), "said": said}
            if path == COMPLETIONS:
                completion_tokens += len(made)
                shown = lists_ids and body.get("return_token_ids")
                more = {"token_ids": made if shown else None, "prompt_token_ids": ids if shown else None}
                choice |= {"text": "x" * number, **(more if lists_ids else {})}
            choices.append(choice)
    return {
        "id": "answer",
        "object": "list",
        "model": body["model"],
        ("choices" if path == COMPLETIONS else "data"): choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
            "prompt_tokens_details": None,
        },
    }


@given(
    path=st.sampled_from([COMPLETIONS, EMBEDDINGS]),
    said=SETTINGS,
    prompts=st.lists(TEXT, min_size=1, max_size=6) | st.lists(TOKENS, min_size=1, max_size=6),
    lists_ids=st.booleans(),
    listed=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_each_line_gets_what_it_would_have_got_alone(path, said, prompts, lists_ids, listed) -> None:
    assume(path == COMPLETIONS or "n" not in said)
    field = "prompt" if path == COMPLETIONS else "input"
    lines = [{**said, "priority": at, field: [one] if listed else one} for at, one in enumerate(prompts)]
    raw = [json.dumps(line).encode() for line in lines]
    plans = {plan(path, one) for one in raw}
    (shared,) = plans
    assert shared is not None
    assert shared.sequences == (said.get("n", 1) if path == COMPLETIONS else 1)

    joined = json.loads(join(path, raw))
    assert joined[field] == prompts
    assert "priority" not in joined
    answers = split(path, raw, json.dumps(engine(path, joined, lists_ids=lists_ids)).encode())
    assert answers is not None
    together = [json.loads(answer) for answer in answers]
    alone = [engine(path, line, lists_ids=lists_ids) for line in lines]
    assert [one.pop("id") for one in together] == [f"answer-{at}" for at in range(len(lines))]
    totals = engine(path, joined, lists_ids=lists_ids)["usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert sum(one["usage"][name] for one in together) == totals[name]
    for mine, its in zip(together, alone, strict=True):
        del its["id"]
        if mine["usage"].pop("apportioned", False):
            assert not (path == COMPLETIONS and lists_ids), "known exactly, and shared out all the same"
            assert all(count is None or count >= 0 for count in mine["usage"].values())
            del mine["usage"], its["usage"]
        assert mine == its


@given(
    path=st.sampled_from([COMPLETIONS, EMBEDDINGS, "/v1/chat/completions"]),
    body=st.dictionaries(
        st.sampled_from(["prompt", "input", "model", "n", "stream", "echo", "messages", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | TEXT,
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2),
            max_leaves=5,
        ),
    ),
    answer=st.binary(max_size=20)
    | st.builds(lambda one: json.dumps(one).encode(), st.fixed_dictionaries({
        "choices": st.lists(st.fixed_dictionaries({"index": st.integers(0, 1) | st.booleans()}) | st.none()),
        "usage": st.sampled_from([None, {}, {"prompt_tokens": True}, {"prompt_tokens": -1}, 1]),
    })),
)  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_whatever_a_line_or_an_engine_says_nothing_breaks(path, body, answer) -> None:
    raw = json.dumps(body).encode()
    if plan(path, raw) is None:
        return
    json.loads(join(path, [raw, raw]))
    split(path, [raw, raw], answer)


@given(one=SETTINGS, other=SETTINGS)
@settings(deadline=None)
def test_only_equal_settings_travel_together(one, other) -> None:
    plans = [plan(COMPLETIONS, json.dumps({**said, "prompt": "x"}).encode()) for said in (one, other)]
    assert None not in plans
    one.pop("priority", None)
    other.pop("priority", None)
    assert (plans[0] == plans[1]) == (json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))
