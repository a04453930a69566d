import pytest

from vllm_bootstrap.engines import arguments
from vllm_bootstrap.errors import BadRequest


@pytest.mark.parametrize("given", ["max-loras", "max_loras", "--max-loras", "--max_loras"])
def test_names_have_one_spelling(given):
    assert arguments.normal_name(given, "p") == "max-loras"


@pytest.mark.parametrize(
    "given", ["", "-q", "---x", "Max-Loras", "a b", "a=b", "--x=--middleware=evil", "a\nb", "é", "-", "a--b", "x" * 101]
)
def test_what_is_no_name_is_refused(given):
    with pytest.raises(BadRequest) as caught:
        arguments.normal_name(given, "p")
    assert caught.value.param == "p"


def test_dotted_names_are_refused_with_advice():
    with pytest.raises(BadRequest, match="object as the value of 'rope-scaling'"):
        arguments.normal_name("rope_scaling.factor", "p")


@pytest.mark.parametrize("text", ["a\nb", "a\x00b", "a\x1b[31m", "a\u2028b", "a\u202eb", "a\u200db", "\ud800"])
def test_hidden_characters_are_refused(text):
    with pytest.raises(BadRequest, match="invisible"):
        arguments.plain_text(text, "p")


def test_long_text_is_refused():
    with pytest.raises(BadRequest, match="longer than"):
        arguments.plain_text("x" * 9000, "p")


@pytest.mark.parametrize("name", ["org/model", "/models/Llama 3", "模型", "a", "model:Q4_K_M", "a..b"])
def test_names_of_models(name):
    assert arguments.safe_name(name, "model") == name


@pytest.mark.parametrize("name", ["", " a", "a ", "-m", "--port=1", "x" * 513])
def test_names_that_no_model_has(name):
    with pytest.raises(BadRequest):
        arguments.safe_name(name, "model")


@pytest.mark.parametrize("path", ["..", "../a", "/a/../b", "a/..", "lora=../x", "C:\\..\\x", '["a",../b' + ",../c"])
def test_ways_out_of_a_directory_are_refused(path):
    with pytest.raises(BadRequest, match=r"'\.\.'"):
        arguments.no_parent(path, "p")


@pytest.mark.parametrize("value", ["awq", "fp8_e4m3", "qwen3-coder", "v1.5", "a+b"])
def test_words(value):
    assert arguments.word(value, "p") == value


@pytest.mark.parametrize("value", ["", "/etc/passwd", "a/b", "-x", "a b", "a:b", 3, None, ["a"]])
def test_what_is_no_word(value):
    with pytest.raises(BadRequest, match="plain word"):
        arguments.word(value, "p")


@pytest.mark.parametrize("value", [True, 1, 0.5, "x", ["a", 1], {"a": {"b": [1, None]}}, ("a",)])
def test_values_that_may_be_given(value):
    arguments.check_value(value, "p")


@pytest.mark.parametrize(
    "value",
    [None, float("nan"), float("inf"), "a\nb", ["a\nb"], {"a\n": 1}, {"a": "../x"}, [[[[[[[[[[1]]]]]]]]]]],
)
def test_values_that_may_not_be_given(value):
    with pytest.raises(BadRequest):
        arguments.check_value(value, "p")


@pytest.mark.parametrize(
    ("kind", "value", "elements"),
    [
        ("switch", True, ["--x"]),
        ("switch", False, []),
        ("toggle", True, ["--x"]),
        ("toggle", False, ["--no-x"]),
        ("optional", True, ["--x"]),
        ("optional", False, []),
        ("optional", "a", ["--x=a"]),
        ("value", "a b", ["--x=a b"]),
        ("value", "--middleware=evil", ["--x=--middleware=evil"]),
        ("value", 8, ["--x=8"]),
        ("value", 0.5, ["--x=0.5"]),
        ("value", {"a": [1, "b"]}, ['--x={"a":[1,"b"]}']),
        ("value", [1, 2], ["--x=[1,2]"]),
        ("append", ["a", "-b"], ["--x=a", "--x=-b"]),
        ("append", "a", ["--x=a"]),
        ("list", ["a", 2], ["--x", "a", "2"]),
        ("list", "a", ["--x", "a"]),
    ],
)
def test_each_kind_of_flag_takes_its_value_in_its_way(kind, value, elements):
    assert arguments.render("--x", kind, value, "p") == elements


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("switch", "yes"),
        ("toggle", 1),
        ("value", True),
        ("list", True),
        ("list", []),
        ("list", ["a", "--b"]),
        ("list", [""]),
    ],
)
def test_values_that_do_not_fit_the_flag(kind, value):
    with pytest.raises(BadRequest) as caught:
        arguments.render("--x", kind, value, "extra_args.x")
    assert caught.value.param == "extra_args.x"
