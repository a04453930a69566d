import pytest

from vllm_bootstrap.engines.template import TemplateError, all_placeholders, build, fill, placeholders
from vllm_bootstrap.errors import BadRequest


def test_placeholders_of_texts_and_groups():
    assert placeholders("{a}-{b} {{c}}") == {"a", "b"}
    assert all_placeholders(["x", "{a}", ("--b", "{b}")]) == {"a", "b"}
    assert all_placeholders([]) == frozenset()


@pytest.mark.parametrize("text", ["{", "}", "{A}", "a{b c}", "{}"])
def test_stray_braces(text):
    with pytest.raises(TemplateError, match="stray"):
        placeholders(text)


def test_values_stay_inside_their_argument():
    made = build(["run", "--model={model}", "{{{model}}}"], {"model": "a b; rm -rf / {port}"})
    assert made == ["run", "--model=a b; rm -rf / {port}", "{a b; rm -rf / {port}}"]


def test_groups_without_a_value_are_left_out():
    argv = ["run", ("--ctx", "{max_model_len}"), ("--verbose",)]
    assert build(argv, {}) == ["run", "--verbose"]
    assert build(argv, {"max_model_len": "8"}) == ["run", "--ctx", "8", "--verbose"]


def test_what_must_be_given_is_named():
    with pytest.raises(BadRequest) as caught:
        build(["run", "{dtype}"], {})
    assert caught.value.param == "dtype"


def test_filling_one_text():
    assert fill("{a}{{}}", {"a": "1"}) == "1{}"
