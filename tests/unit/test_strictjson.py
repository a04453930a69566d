import json

import pytest

from vllm_bootstrap import strictjson


@pytest.mark.parametrize(
    ("data", "value"),
    [
        ("{}", {}),
        (b'{"a": [1, 2.5, null, "\\u00e9"]}', {"a": [1, 2.5, None, "é"]}),
        (b"3", 3),
        (rb'"\ud83d\ude00 \\ud800"', "😀 \\ud800"),
    ],
)
def test_decodes_plain_json(data, value):
    assert strictjson.loads(data) == value


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"x": {"model": 1, "b": 2, "model": 3}}', "'model' is there twice"),
        (b"[NaN]", "NaN is not JSON"),
        (b"-Infinity", "-Infinity is not JSON"),
        (b'"\xff"', "not valid UTF-8"),
        (b'{"labels": {"a": "\\ud800"}}', "half of a surrogate pair"),
        (b'{"\\uDFFF": 1}', "half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 10_000, "integer string conversion"),
    ],
)
def test_everything_wrong_is_one_kind_of_error(data, reason):
    with pytest.raises(json.JSONDecodeError, match=reason):
        strictjson.loads(data)
