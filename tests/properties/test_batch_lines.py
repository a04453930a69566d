"""The judge of a batch's lines against a plain reference, and the cutter against ``split``."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from vllm_bootstrap import strictjson
from vllm_bootstrap.batches.lines import BOM, Cut, Cutter, Good, Rules, judge
from vllm_bootstrap.batches.types import LineError
from vllm_bootstrap.refused import REFUSED

URL = "/v1/completions"
RULES = Rules(URL, models=("m*",))

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
bodies = st.fixed_dictionaries(
    {"model": st.sampled_from(["m", "m1", "other", ""]) | scalars},
    optional={
        "stream": st.sampled_from([None, False, True, 0]),
        "prompt": values,
        "chat_template": scalars,
        "chat_template_kwargs": st.dictionaries(st.sampled_from(["prompt_embeds", "x"]), scalars) | scalars,
        "extra": values,
    },
)
requests = st.fixed_dictionaries(
    {
        "custom_id": st.text(min_size=1, max_size=5) | scalars,
        "method": st.just("POST") | scalars,
        "url": st.sampled_from([URL, "/v1/embeddings", "x"]) | scalars,
        "body": bodies | scalars,
    },
    optional={"more": scalars},
)
good = st.builds(
    lambda ident, body: {"custom_id": ident, "method": "POST", "url": URL, "body": {"model": "m", **body}},
    st.text(min_size=1),
    st.dictionaries(st.text(max_size=5).filter(lambda name: name not in {"model", "stream", *REFUSED}), values),
)


@st.composite
def written(draw: st.DrawFn) -> bytes:
    """A request as somebody might write it, now and then with a piece cut out, put in or doubled."""
    value = draw(good | requests)
    names = draw(st.permutations(list(value)))
    text = json.dumps(
        {name: value[name] for name in names},
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.none() | st.just(" ")),
    )
    raw = text.replace("\n", "\r").encode("utf-8", "surrogatepass")
    if draw(st.booleans()):
        at, until = sorted([draw(st.integers(0, len(raw))), draw(st.integers(0, len(raw)))])
        raw = (
            raw[:at] + draw(st.binary(max_size=3) | st.just(raw[at:until])) + raw[draw(st.sampled_from([at, until])) :]
        )
    return raw


def is_good(raw: bytes) -> bool:
    """The rules, said slowly."""
    try:
        value = strictjson.loads(raw)
    except json.JSONDecodeError:
        return False
    if not isinstance(value, dict) or set(value) != {"custom_id", "method", "url", "body"} or b"\0" in raw:
        return False
    return (
        isinstance(value["custom_id"], str)
        and 1 <= len(value["custom_id"]) <= 512
        and value["method"] == "POST"
        and value["url"] == URL
        and isinstance(value["body"], dict)
        and body_is_good(value["body"])
    )


def body_is_good(body: dict[str, Any]) -> bool:
    nested = body.get("chat_template_kwargs")
    return (
        isinstance(body.get("model"), str)
        and body["model"].startswith("m")
        and (body.get("stream") is None or body["stream"] is False)
        and all(body.get(name) is None for name in REFUSED)
        and not (isinstance(nested, dict) and any(nested.get(name) is not None for name in REFUSED))
    )


@given(written() | st.binary(max_size=60))
@example(b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"m"},"body":{"model":"m"}}')
@example(b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"m","prompt":"\\udfff"}}')
@example(b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"m"},}')
def test_a_line_is_accepted_exactly_when_the_rules_hold(raw: bytes) -> None:
    verdict = judge(raw, 3, RULES)
    if is_good(raw):
        assert isinstance(verdict, Good), verdict
        value = strictjson.loads(raw)
        assert verdict[:3] == (value["custom_id"], value["body"]["model"], value["body"])
        assert strictjson.loads(raw[verdict.start : verdict.start + verdict.length]) == value["body"]
    else:
        assert isinstance(verdict, LineError), verdict
        assert verdict.line == 3
        assert len(json.dumps(verdict)) < 2000


@given(
    st.lists(st.sampled_from([b"\n", b"\r\n", b"a", b"bcd", BOM, BOM[:1], b"x" * 7, b"", b"\0"]), max_size=20),
    st.integers(1, 8),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
def test_lines_are_those_of_split(parts: list[bytes], limit: int, sizes: list[int]) -> None:
    data = b"".join(parts)
    expected, start = [], 0
    for number, raw in enumerate(data.split(b"\n"), 1):
        skipped = len(BOM) if number == 1 and raw.startswith(BOM) else 0
        kept = raw[skipped:]
        expected.append(Cut(number, start + skipped, kept if len(kept) <= limit else None))
        start += len(raw) + 1
    if data.endswith(b"\n") or not data:
        expected.pop()
    cutter, found, turn = Cutter(limit), [], 0
    while data:
        size = sizes[turn % len(sizes)]
        found += cutter.feed(data[:size])
        data, turn = data[size:], turn + 1
    assert [_comparable(cut) for cut in (*found, *cutter.end())] == [_comparable(cut) for cut in expected]


def _comparable(cut: Cut) -> Cut:
    return cut if cut.raw is not None else cut._replace(start=0)  # nobody asks where a line starts that is too long
