from __future__ import annotations

import json
import math
from typing import Any

import pytest

from vllm_bootstrap.errors import BadRequest, InvalidJson, PayloadTooLarge
from vllm_bootstrap.gateway import bodies
from vllm_bootstrap.models.types import Rewrite


def parse(text: str) -> bodies.JsonBody:
    return bodies.parse(text.encode())


def test_values_and_places() -> None:
    text = ' { "model" : "m" ,"n":2,\n"messages":[{"a":"}"}], "x\\u0079": null }\t'
    body = parse(text)
    assert body.fields == {"model": "m", "n": 2, "messages": [{"a": "}"}], "xy": None}
    for name, (start, value, end) in body.spans.items():
        assert text[start] == '"'
        assert json.loads(text[value:end]) == body.fields[name]
    assert body.model == "m"


@pytest.mark.parametrize("text", ["{}", " {\n} ", "{ \t}"])
def test_an_empty_object(text: str) -> None:
    body = parse(text)
    assert body.fields == {}
    assert body.model is None


def test_what_json_calls_numbers_passes() -> None:
    fields = parse('{"a": NaN, "b": -Infinity, "c": 1e400, "d": -0, "e": 12345678901234567890}').fields
    assert math.isnan(fields["a"])
    assert fields["b"] == -math.inf
    assert fields["e"] == 12345678901234567890


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "[]", '"a"', "1", "null", "{", '{"a"', '{"a":', '{"a":1', '{"a":1,', '{"a":1,}', "{,}", '{"a" 1}'),
        *("{a:1}", "{'a':1}", '{"a":1}x', '{"a":1}{}', "{}x", '{"a":1 "b":2}', '{"a":tru}', '{"a":01}', '{"a":"\n"}'),
        *('{"a\n":1}', '{"a":"\\x"}', '{"a\\x":1}', '{"a":[1,}', "\ufeff{}", '{"a":1,"a":2}', '{"\\u0061" 1}'),
        *('{"model":1,"mod\\u0065l":2}', '{"a\\"', '{"a\\""1}'),
    ],
)
def test_what_is_no_object(text: str) -> None:
    with pytest.raises(InvalidJson):
        parse(text)


@pytest.mark.parametrize("raw", [b"\xff{}", b'{"a":"\xc3"}', '{"a":1}'.encode("utf-16"), b'{"a":"\xed\xa0\x80"}'])
def test_what_is_no_utf8(raw: bytes) -> None:
    with pytest.raises(InvalidJson):
        bodies.parse(raw)


def test_hostile_sizes() -> None:
    with pytest.raises(InvalidJson, match="deeply"):
        parse('{"a":' + "[" * 100_000)
    with pytest.raises(InvalidJson, match="number"):
        parse('{"a":' + "1" * 5000 + "}")


def test_a_duplicate_is_named() -> None:
    with pytest.raises(InvalidJson) as refused:
        parse('{"a":1,"\\u0061":2}')
    assert refused.value.param == "a"


def test_duplicates_below_the_top_are_the_engines_business() -> None:
    assert parse('{"a":{"b":1,"b":2}}').fields == {"a": {"b": 2}}


@pytest.mark.parametrize("model", ["1", "[]", "{}", "true"])
def test_a_model_is_a_string(model: str) -> None:
    with pytest.raises(BadRequest) as refused:
        _ = parse(f'{{"model":{model}}}').model
    assert refused.value.param == "model"


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ('{"a":1}', None, '{"a":1}'),
        ('{"priority":5}', None, "{}"),
        ('{ "priority" : 5 , "a":1}', None, '{ "a":1}'),
        ('{"a":1, "priority":5}', None, '{"a":1}'),
        ('{"a":1, "priority":5 }', None, '{"a":1 }'),
        ('{"a":1, "priority":5 , "b":2}', None, '{"a":1, "b":2}'),
        ('{"a":"ü","prior\\u0069ty":-9,"b":"é"}', 100, '{"a":"ü","prior\\u0069ty":100,"b":"é"}'),
        ('{"priority":{"x":[1]}}', 0, '{"priority":0}'),
        (' { "a":1}', 100, ' {"priority": 100, "a":1}'),
        ("{ }", 100, '{"priority": 100 }'),
    ],
)
def test_one_member_is_changed_and_nothing_else(text: str, value: object, expected: str) -> None:
    assert bodies.with_members(parse(text), {"priority": value}).decode() == expected


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ('{"a":1, "b":2, "c":3}', {"a": None, "b": None}, '{"c":3}'),
        ('{"a":1, "b":2, "c":3}', {"b": None, "a": None}, '{"c":3}'),
        ('{"a":1, "b":2, "c":3 }', {"b": None, "c": None}, '{"a":1 }'),
        ('{"a":1 , "b":2, "c":3}', {"a": None, "c": None}, '{"b":2}'),
        ('{ "a":1, "b":2, "c":3 }', {"a": None, "b": None, "c": None}, "{  }"),
        ('{"a":1, "b":2, "c":3, "d":4}', {"b": None, "d": None, "c": 5}, '{"a":1, "c":5}'),
        ('{"a":1, "b":2, "c":3}', {"b": None, "c": None, "a": "x"}, '{"a":"x"}'),
        ('{"a":1, "b":2}', {"a": None, "b": None, "c": 3}, '{"c": 3}'),
        ('{"a":1, "b":2}', {"a": None, "x": None, "c": 3}, '{"c": 3,"b":2}'),
    ],
)
def test_several_members_are_changed_at_once(text: str, values: dict[str, object], expected: str) -> None:
    assert bodies.with_members(parse(text), values).decode() == expected


@pytest.mark.parametrize(
    ("text", "defaults", "strip", "expected"),
    [
        ('{"model": "m"}', {"n": 4, "stop": ["é"]}, (), '{"n": 4, "stop": ["\\u00e9"],"model": "m"}'),
        ('{"n":1, "top_p": null}', {"n": 4, "top_p": 0.5}, (), '{"n":1, "top_p": null}'),
        ('{"n":1, "seed":5, "user":"u"}', {}, ("seed", "user", "x"), '{"n":1}'),
        ('{"top_k":1, "n":2}', {"top_k": 20}, ("top_k",), '{"top_k":20, "n":2}'),
        ('{"n":2}', {"top_k": 20}, ("top_k",), '{"top_k": 20,"n":2}'),
        ('{"n":2}', {"seed": None}, (), '{"seed": null,"n":2}'),
        ('{"s\\u0065ed":2}', {}, ("seed",), "{}"),
    ],
)
def test_a_body_is_made_what_the_catalogue_wants(
    text: str, defaults: dict[str, Any], strip: tuple[str, ...], expected: str
) -> None:
    body = bodies.rewritten(parse(text), Rewrite(defaults, frozenset(strip)))
    assert body.text == expected
    assert body.fields == json.loads(expected)
    assert body.raw == expected.encode()


def test_a_body_that_is_so_already_is_not_read_again() -> None:
    body = parse('{"n":1}')
    assert bodies.rewritten(body, Rewrite({"n": 4}, frozenset({"seed"}))) is body


def test_an_unchanged_body_is_the_same_bytes() -> None:
    raw = b'{"a":1}'
    assert bodies.with_members(bodies.parse(raw), {"priority": None}) is raw


@pytest.mark.parametrize("name", sorted(bodies.REFUSED))
def test_refused_fields_are_named(name: str) -> None:
    with pytest.raises(BadRequest) as refused:
        bodies.refuse_fields({"model": "m", name: {}})
    assert refused.value.param == name
    bodies.refuse_fields({"model": "m", name: None})
    with pytest.raises(BadRequest) as refused:
        bodies.refuse_fields({"chat_template_kwargs": {"enable_thinking": True, name: "x"}})
    assert refused.value.param == f"chat_template_kwargs.{name}"


def test_ordinary_fields_are_not_refused() -> None:
    bodies.refuse_fields({"chat_template_kwargs": {"enable_thinking": True}, "priority": -5, "cache_salt": "x"})
    bodies.refuse_fields({"chat_template_kwargs": "nonsense"})


@pytest.mark.parametrize(
    ("path", "fields", "count"),
    [
        ("/v1/chat/completions", {"prompt": ["a", "b"]}, 1),
        ("/v1/chat/completions", {"n": 3}, 3),
        ("/v1/completions", {"prompt": "a"}, 1),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 3}, 6),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "best_of": 5}, 10),
        ("/v1/completions", {"prompt": [1, 2, 3]}, 1),
        ("/v1/completions", {"prompt": [[1, 2], [3]]}, 2),
        ("/v1/completions", {"prompt": []}, 1),
        ("/v1/completions", {"prompt": [True, False]}, 2),
        ("/v1/completions", {"n": 0, "best_of": -4}, 1),
        ("/v1/completions", {"n": True, "best_of": "5"}, 1),
        ("/v1/embeddings", {"input": ["a"] * 7}, 7),
        ("/v1/rerank", {"documents": ["a"] * 7}, 7),
        ("/v1/score", {"text_1": "a", "text_2": ["a"] * 7}, 7),
        ("/v1/responses", {"input": [{}, {}]}, 1),
    ],
)
def test_sequences(path: str, fields: dict[str, Any], count: int) -> None:
    assert bodies.sequences(path, fields) == count
    assert bodies.check_sequences(path, fields, count) == count
    assert bodies.check_sequences(path, fields, None) == count
    if count > 1:
        with pytest.raises(BadRequest) as refused:
            bodies.check_sequences(path, fields, count - 1)
        assert refused.value.param == "n"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]},
        {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "HTTPS://x"}}]}]},
        {"messages": [{"content": [{"type": "input_image", "image_url": "file:///etc/passwd"}]}]},
        {"messages": [{"content": [{"type": "audio_url", "audio_url": {"url": "ftp://x"}}]}]},
        {"messages": [{"content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]},
        {"input": [[{"video_url": {"url": ""}}]]},
    ],
)
def test_media_from_elsewhere(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        bodies.refuse_remote_media(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"content": "see http://example.com", "image_url": {"url": "data:image/png;base64,AA"}}]},
        {"messages": [{"content": [{"image_url": "DATA:image/png,x"}, "text", 5]}]},
        {"messages": [{"source": {"type": "base64", "data": "x"}, "url": "http://not-media"}]},
        {"metadata": {"source": "http://x", "url": "http://y"}, "image_url": 5, "source": {"url": 7}},
    ],
)
def test_media_inside_the_request(fields: dict[str, Any]) -> None:
    bodies.refuse_remote_media(fields)


def test_media_hidden_in_depth() -> None:
    value: Any = {"image_url": "http://x"}
    for _ in range(150):
        value = [value]
    with pytest.raises(BadRequest, match="deeply"):
        bodies.refuse_remote_media({"messages": value})


@pytest.mark.parametrize("body", [b'{"m":[' + b"[]," * 600_000 + b"1]}", b'{"m":[' + b"1," * 2_100_000 + b"1]}"])
def test_millions_of_tiny_things_are_refused_before_they_are_made(body):
    with pytest.raises(PayloadTooLarge, match="too finely structured"):
        bodies.parse(body)


def test_a_body_has_a_bounded_number_of_fields():
    fields = b",".join(b'"f%d":1' % number for number in range(1_001))
    with pytest.raises(BadRequest, match="more than 1000 fields"):
        bodies.parse(b"{" + fields + b"}")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('{"messages": [{"image_url": 1}]}', True),
        ('{"messages": [{"image_\\u0075rl": 1}]}', True),
        ('{"prompt": "see the picture"}', False),
    ],
)
def test_whether_a_body_can_name_a_url_is_seen_without_a_walk(text: str, names: bool) -> None:
    assert parse(text).names_urls is names


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ('{"stream": true}', {"include_usage": True}),
        ('{"stream": true, "stream_options": null}', {"include_usage": True}),
        ('{"stream": true, "stream_options": {}}', {"include_usage": True}),
        ('{"stream": true, "stream_options": {"include_usage": false, "x": 1}}', {"include_usage": True, "x": 1}),
        (
            '{"stream": true, "stream_options": {"continuous_usage_stats": true}}',
            {"include_usage": True, "continuous_usage_stats": False},
        ),
    ],
)
def test_a_stream_is_made_to_end_with_its_token_counts(text: str, options: dict[str, object]) -> None:
    wish = bodies.asking_for_usage(parse(text))
    assert wish is not None
    changed = json.loads(bodies.with_members(parse(text), {"stream_options": wish}))
    assert changed == {"stream": True, "stream_options": options}


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"stream": false}',
        '{"stream": 1}',
        '{"stream": true, "stream_options": {"include_usage": true}}',
        '{"stream": true, "stream_options": "no object"}',
    ],
)
def test_no_token_counts_are_asked_for_where_none_come_or_they_come_anyway(text: str) -> None:
    assert bodies.asking_for_usage(parse(text)) is None
