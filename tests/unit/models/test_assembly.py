"""One catalogue out of file, additions and uploads: who wins, what is said, what is found by name."""

from __future__ import annotations

from vllm_bootstrap.models.assembly import assemble
from vllm_bootstrap.models.types import AdapterEntry, Catalogue, Group, ModelEntry, Rewrite

REWRITE = Rewrite({"temperature": 0})
A = ModelEntry("a", "a", aliases=("a2",), rewrite=REWRITE, adapters=(AdapterEntry("l", "/l", ("l2",)),))
BASE = Catalogue({"a": A}, (Group("g", frozenset("a")),))


def none(_name: str) -> tuple[AdapterEntry, ...]:
    return ()


def test_every_name_leads_to_the_model_whose_engine_serves_it():
    b = ModelEntry("b", "b", origin="runtime")
    made = assemble(BASE, [b], none)
    assert made.by_name == {"a": A, "a2": A, "l": A, "l2": A, "b": b}
    assert made.rewrites == dict.fromkeys(["a", "a2", "l", "l2"], REWRITE)
    assert made.catalogue == Catalogue({"a": A, "b": b}, BASE.groups)
    assert made.notes == ()


def test_the_file_wins_over_what_was_added():
    made = assemble(BASE, [ModelEntry("b", "b", aliases=("a2", "l2")), ModelEntry("c", "c")], none)
    assert list(made.catalogue.entries) == ["a", "c"]
    assert made.notes == ("the added model 'b' is left out: 'a2', 'l2' is a name of another model now",)


def test_uploaded_adapters_are_names_of_their_base():
    made = assemble(BASE, [], lambda name: [AdapterEntry("up", "/up", ("u2",))] if name == "a" else [])
    entry = made.catalogue.entries["a"]
    assert [adapter.name for adapter in entry.adapters] == ["l", "up"]
    assert made.by_name["u2"] is entry
    assert made.rewrites["up"] == REWRITE


def test_an_uploaded_adapter_takes_no_name_of_another():
    made = assemble(BASE, [], lambda _name: [AdapterEntry("a2", "/up")])
    assert made.catalogue == BASE
    assert made.notes == ("the uploaded adapter 'a2' is left out: 'a2' is another's name now",)


def test_of_several_that_are_to_stay_a_group_lets_only_one():
    models = [ModelEntry(name, name, pin=name != "c", preload=name != "d") for name in "abcd"]
    entries = {model.name: model for model in models}

    def notes(members: str, **options: bool) -> tuple[str, ...]:
        return assemble(Catalogue(entries, (Group("g", frozenset(members), **options),)), [], none).notes

    (said,) = notes("abcd", together=False)
    assert said.startswith("'a', 'b' are pinned and preloaded, but the group 'g' lets only one of them be loaded")
    assert (notes("acd", together=False), notes("abcd"), notes("ab", exclusive=True)) == ((), (), ())
