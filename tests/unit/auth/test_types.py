import pytest

from vllm_bootstrap.auth.types import Principal, RequestHead, Rule


def test_headers_are_found_by_lower_case_name():
    head = RequestHead("GET", "/", ((b"a", b"1"), (b"b", b"2"), (b"a", b"3")))
    assert head.all(b"a") == [b"1", b"3"]
    assert (head.first(b"b"), head.first(b"c")) == (b"2", None)


def test_a_rule_is_public_or_names_scopes():
    assert Rule(public=True).scopes == frozenset()
    for wrong in ({}, {"public": True, "scopes": frozenset({"logs"})}):
        with pytest.raises(ValueError, match="either public or"):
            Rule(**wrong)


@pytest.mark.parametrize(
    ("globs", "asked", "may"),
    [
        (None, ["anything", "at/all"], True),
        (("org/*", "chat"), ["chat", "org/model"], True),
        (("org/*",), ["chat", "org/model"], False),
        (("ORG/*",), ["org/model"], False),
        ((), ["model"], False),
        (("a", "b"), ["b"], True),
    ],
)
def test_every_name_of_a_model_must_match_a_pattern(globs, asked, may):
    assert Principal("k", frozenset(), models=globs).may_use(*asked) is may
