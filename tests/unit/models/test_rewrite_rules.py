"""What the catalogue may not do to requests, because routing, framing or scheduling have decided by it."""

from __future__ import annotations

import pytest

from vllm_bootstrap.models.parsing import CatalogueError, parse_entry
from vllm_bootstrap.models.types import NEVER_REWRITTEN, Rewrite


def entry(**rewrite: object) -> Rewrite:
    return parse_entry("m", {"source": "org/m", **rewrite}, "file", lambda _entry: None).rewrite


@pytest.mark.parametrize("name", sorted(NEVER_REWRITTEN))
def test_what_is_not_for_the_catalogue_to_change(name: str) -> None:
    for key, value in (("defaults", {name: 1}), ("strip", [name])):
        with pytest.raises(CatalogueError) as refused:
            entry(**{key: value})
        assert [place for place, _ in refused.value.problems] == [key]


def test_nothing_is_smuggled_in_below_a_default() -> None:
    with pytest.raises(CatalogueError, match="chat_template"):
        entry(defaults={"chat_template_kwargs": {"chat_template": "x"}})


def test_what_it_may_do() -> None:
    wanted = {"temperature": 0.5, "chat_template_kwargs": {"enable_thinking": False}}
    assert entry(defaults=wanted, strip=["seed"]) == Rewrite(wanted, frozenset({"seed"}))
