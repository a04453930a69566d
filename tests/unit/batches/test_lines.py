from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.batches import CHAT, COMPLETIONS, line
from vllm_bootstrap.batches import lines
from vllm_bootstrap.batches.lines import BOM, Cut, Cutter, Good, Rules, is_blank, judge
from vllm_bootstrap.batches.types import LineError
from vllm_bootstrap.refused import REFUSED

RULES = Rules(COMPLETIONS)


def refused(raw: bytes, rules: Rules = RULES) -> LineError:
    verdict = judge(raw, 7, rules)
    assert isinstance(verdict, LineError)
    assert verdict.line == 7
    return verdict


def accepted(raw: bytes, rules: Rules = RULES) -> Good:
    verdict = judge(raw, 7, rules)
    assert isinstance(verdict, Good), verdict
    return verdict


def test_a_good_line_says_where_its_body_stands() -> None:
    raw = line("x", prompt="hi", n=3)
    good = accepted(raw)
    assert (good.custom_id, good.model) == ("x", "m")
    assert json.loads(raw[good.start : good.start + good.length]) == good.body == {"model": "m", "prompt": "hi", "n": 3}


@pytest.mark.parametrize(
    "raw",
    [
        '{"body": {"model": "m", "prompt": "größer 🙂"}, "custom_id": "ü", "method": "POST", "url": "/v1/completions"}',
        ' \t{ "custom_id" :"a","method":"POST" , "url":"/v1/completions","body" : {"model": "é"} \r } \r',
        '{"custom_id":"a","meth\\u006fd":"POST","\\u0075rl" : "/v1/completions","b\\u006fdy":{"model":"\\ud83d\\ude42"}}',  # noqa: E501
    ],
)
def test_spans_are_bytes_however_a_line_is_written(raw: str) -> None:
    data = raw.encode()
    good = accepted(data)
    assert json.loads(data[good.start : good.start + good.length]) == good.body


@pytest.mark.parametrize(
    ("raw", "code", "says"),
    [
        (b"nonsense", "invalid_json_line", "must be a JSON object"),
        (b"[1]", "invalid_json_line", "must be a JSON object"),
        (b"\xef\xbb\xbf{}", "invalid_json_line", "must be a JSON object"),
        (b'{"a": 1', "invalid_json_line", "Expecting ',' or '}' at character 8"),
        (b'{"a": 1} {}', "invalid_json_line", "Extra data at character 10"),
        (b"{1: 2}", "invalid_json_line", "field name in double quotes at character 2"),
        (b'{"a\\n" 1}', "invalid_json_line", "Expecting ':' at character 8"),
        (b'{"a": }', "invalid_json_line", "Expecting value at character 7"),
        (b'{"a": 1, "a": 2}', "invalid_json_line", 'The key "a" is there twice'),
        (b'{"a": {"b": 1, "b": 2}}', "invalid_json_line", 'The key "b" is there twice'),
        (b'{"a": NaN}', "invalid_json_line", "NaN is not JSON"),
        (b'{"a": "\\ud800"}', "invalid_json_line", "half of a surrogate pair"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json_line", "number that is too long"),
        (b'{"a": ' + b"[" * 100_000 + b"}", "invalid_json_line", "nested too deeply"),
        (b'{"a": "\0"}', "invalid_json_line", "NUL byte at character 8"),
        (b'{"a": "\xff"}', "invalid_encoding", "Byte 8 of this line is not valid UTF-8"),
        (b'{"a": [' + b"[]," * 600_000 + b"1]}", "request_too_large", "too finely structured"),
    ],
)
def test_what_is_no_json_object_is_told_apart(raw: bytes, code: str, says: str) -> None:
    error = refused(raw)
    assert error.code == code
    assert says in error.message
    assert error.param is None


def without(name: str) -> bytes:
    fields = json.loads(line())
    del fields[name]
    return json.dumps(fields).encode()


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(line()), **fields}).encode()


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (b"{}", "missing_required_parameter", "custom_id"),
        (without("method"), "missing_required_parameter", "method"),
        (without("url"), "missing_required_parameter", "url"),
        (without("body"), "missing_required_parameter", "body"),
        (changed(extra=1), "unknown_parameter", "extra"),
        (changed(custom_id=""), "invalid_custom_id", "custom_id"),
        (changed(custom_id=5), "invalid_custom_id", "custom_id"),
        (changed(custom_id="x" * 513), "invalid_custom_id", "custom_id"),
        (changed(method="GET"), "invalid_method", "method"),
        (changed(method="X" * 1000), "invalid_method", "method"),
        (changed(url=CHAT), "mismatched_endpoint", "url"),
        (changed(url="/v1/models"), "invalid_url", "url"),
        (changed(url=None), "invalid_url", "url"),
        (changed(body=[]), "invalid_body", "body"),
        (line(model=None), "missing_model", "body.model"),
        (line(model=""), "missing_model", "body.model"),
        (line(model=7), "missing_model", "body.model"),
        (line(model="x" * 513), "missing_model", "body.model"),
        (line(stream=True), "unsupported_parameter", "body.stream"),
        (line(stream=0), "unsupported_parameter", "body.stream"),
        (line(stream=[]), "unsupported_parameter", "body.stream"),
        (line(chat_template_kwargs={"chat_template": "x"}), "unsupported_parameter",
         "body.chat_template_kwargs.chat_template"),
    ],
)  # fmt: skip
def test_fields_are_checked_one_by_one(raw: bytes, code: str, param: str) -> None:
    error = refused(raw)
    assert (error.code, error.param) == (code, param)
    assert len(error.message) < 250
    assert error.message.endswith(".")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_fields_that_no_client_may_set_are_refused(name: str) -> None:
    error = refused(line(**{name: {"x": 1}}))
    assert (error.code, error.param) == ("unsupported_parameter", f"body.{name}")
    assert REFUSED[name] in error.message


@pytest.mark.parametrize("stream", [None, False])
def test_a_line_may_say_that_it_does_not_stream(stream: object) -> None:
    accepted(line(stream=stream))


def test_longest_id_and_model() -> None:
    assert accepted(line("ü" * lines.MAX_ID_CHARS, model="m" * lines.MAX_MODEL_CHARS)).custom_id == "ü" * 512


def test_models_a_key_may_use() -> None:
    rules = Rules(COMPLETIONS, models=("org/*", "tiny"))
    assert accepted(line(model="org/big"), rules).model == "org/big"
    assert accepted(line(model="tiny"), rules).model == "tiny"
    error = refused(line(model="other"), rules)
    assert (error.code, error.param) == ("model_not_allowed", "body.model")
    assert '"other"' in error.message


def test_a_batch_for_one_launch_needs_no_model() -> None:
    rules = Rules(COMPLETIONS, model_optional=True)
    assert accepted(line(model=None), rules).model == ""
    assert accepted(line(model="m"), rules).model == "m"
    assert refused(line(model=5), rules).code == "missing_model"


@pytest.mark.parametrize(("raw", "blank"), [(b"", True), (b" \t\r", True), (b"\x0b", False), (b" {", False)])
def test_blank_lines(raw: bytes, blank: bool) -> None:
    assert is_blank(raw) is blank


def cut(*pieces: bytes, limit: int = 100) -> list[Cut]:
    cutter = Cutter(limit)
    found = [made for piece in pieces for made in cutter.feed(piece)]
    return found + list(cutter.end())


def test_lines_are_cut_wherever_the_pieces_end() -> None:
    assert cut(b"ab\ncd\n\n", b"e", b"f\ng") == [
        Cut(1, 0, b"ab"), Cut(2, 3, b"cd"), Cut(3, 6, b""), Cut(4, 7, b"ef"), Cut(5, 10, b"g"),
    ]  # fmt: skip
    assert cut() == cut(b"") == []
    assert cut(b"a\n") == [Cut(1, 0, b"a")]


def test_a_byte_order_mark_is_passed_over_at_the_start_only() -> None:
    assert cut(BOM[:1], BOM[1:] + b"a\n" + BOM + b"b") == [Cut(1, 3, b"a"), Cut(2, 5, BOM + b"b")]
    assert cut(BOM + b"x" * 5, limit=5) == [Cut(1, 3, b"x" * 5)]


def test_a_line_that_is_too_long_is_not_held() -> None:
    cutter = Cutter(10)
    for _ in range(50):
        assert list(cutter.feed(b"x" * 1000)) == []
        assert sum(map(len, cutter._held)) <= 13
    assert list(cutter.feed(b"\nok\n" + b"y" * 11 + b"\n" + b"z" * 11)) == [
        Cut(1, 0, None), Cut(2, 50_001, b"ok"), Cut(3, 50_004, None),
    ]  # fmt: skip
    assert list(cutter.end()) == [Cut(4, 50_016, None)]
