"""A catalogue out of a file's values: what is taken, what is refused, and where the message points."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.models.parsing import MAX_SHOWN, CatalogueError, clashes, parse, parse_entry
from vllm_bootstrap.models.types import AdapterEntry, GpuNeed, Group, ModelEntry, Rewrite


def fine(_entry: ModelEntry) -> None:
    """No objection."""


def problems(raw: Any, check=fine, fixed=()) -> list[str]:
    with pytest.raises(CatalogueError) as caught:
        parse(raw, check, fixed)
    return str(caught.value).splitlines()


def one(**keys: Any) -> dict[str, Any]:
    return {"models": {"q": {"source": "org/q", **keys}}}


@pytest.mark.parametrize("raw", [None, {}, {"models": None}, {"models": {}, "groups": None, "defaults": None}])
def test_an_empty_file_is_an_empty_catalogue(raw):
    catalogue = parse(raw, fine)
    assert (dict(catalogue.entries), list(catalogue.groups)) == ({}, [])


def test_a_model_needs_only_its_source():
    assert parse(one(), fine).entries == {"q": ModelEntry("q", "org/q")}


def test_all_keys_arrive():
    raw = one(
        revision="v1", aliases=["a"], engine="vllm", args={"dtype": "half", "max_model_len": "auto"},
        extra_args={"swap-space": 1}, env={"X": "1"}, replicas="per_gpu", restart="never", ttl="15m", pin=True,
        gpus={"count": 2, "ids": [0, "GPU-1"], "min_memory": "1KiB", "share": 0.5}, preload=True, priority=-3,
        max_parallel=4, sleep=2, show_loading=True, defaults={"temperature": 0}, strip=["seed"], description="text",
        adapters={"l": {"source": "/l", "aliases": ["l2"]}},
    )  # fmt: skip
    assert parse(raw, fine).entries["q"] == ModelEntry(
        "q", "org/q", revision="v1", aliases=("a",), engine="vllm", args={"dtype": "half", "max_model_len": "auto"},
        extra_args={"swap-space": 1}, env={"X": "1"}, replicas="per_gpu", restart="never", ttl_s=900, pin=True,
        gpus=GpuNeed(2, (0, "GPU-1"), 1024, 0.5), preload=True, priority=-3, max_parallel=4, sleep=2,
        show_loading=True, rewrite=Rewrite({"temperature": 0}, frozenset({"seed"})), description="text",
        adapters=(AdapterEntry("l", "/l", ("l2",)),),
    )  # fmt: skip


def test_with_replicas_the_count_is_of_each_and_the_list_of_all():
    entry = parse(one(gpus={"ids": [0, 1], "count": 1}, replicas=2), fine).entries["q"]
    assert (entry.gpus, entry.replicas) == (GpuNeed(1, (0, 1)), 2)


def test_defaults_lie_below_every_model_key_by_key():
    raw = {
        "defaults": {
            "ttl": 60,
            "args": {"dtype": "half", "seed": 1},
            "gpus": {"count": 2, "share": 0.5},
            "engine": "e",
        },
        "models": {
            "a": {"source": "a"},
            "b": {"source": "b", "ttl": 0, "args": {"seed": 2}, "gpus": {"ids": [3]}, "engine": None},
        },
    }
    a, b = parse(raw, fine).entries.values()
    assert (a.ttl_s, a.args, a.gpus, a.engine) == (60, {"dtype": "half", "seed": 1}, GpuNeed(2, share=0.5), "e")
    assert (b.ttl_s, b.args, b.gpus) == (0, {"dtype": "half", "seed": 2}, GpuNeed(ids=(3,), share=0.5))
    assert b.engine is None


def test_groups():
    raw = {
        "models": {"a": {"source": "a"}, "b": {"source": "b"}},
        "groups": {"g": {"members": ["a", "b"], "together": False}, "x": {"members": ["one"], "exclusive": True}},
    }
    groups = parse(raw, fine, [ModelEntry("one", "one", origin="setting")]).groups
    assert list(groups) == [Group("g", frozenset("ab"), together=False), Group("x", frozenset({"one"}), exclusive=True)]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("text", "the file must hold 'models:'"),
        ({"models": []}, "models: must hold the models' names"),
        ({"modles": {}}, "modles: there is no such key: did you mean models?"),
        ({"models": {"q": None}}, "models.q: must hold at least 'source:'"),
        ({"models": {"q": {}}}, "models.q.source: is missing: name a Hugging Face repository or an absolute path"),
        ({"models": {"q": {"source": 7}}}, "models.q.source: must be a valid string"),
        (one(gpus={"count": "2"}), "models.q.gpus.count: must be a valid integer"),
        (one(gpus={"count": 0}), "models.q.gpus.count: must be greater than or equal to 1"),
        (one(gpus=[0]), "models.q.gpus: must hold keys with values below it"),
        (one(gpus={"cuont": 1}), "models.q.gpus.cuont: there is no such key: did you mean count?"),
        (one(gpus={"ids": [True]}), "models.q.gpus.ids.0: must be the index of a GPU or its UUID"),
        (one(gpus={"ids": [0, 1], "count": 1}), "models.q.gpus.count: gpus.ids names 2: leave count out"),
        (one(gpus={"ids": [0, 1], "count": 4}), "models.q.gpus.count: gpus.ids names 2: leave count out"),
        (one(args={"revision": "x"}), "models.q.args.revision: there is no such key: it stands beside args"),
        (
            one(args={"zzz": 1}),
            "models.q.args.zzz: there is no such key: options that are no typed fields belong below",
        ),
        (one(args={"max_model_len": "long"}), "models.q.args.max_model_len: must be a whole number from 1, or auto"),
        (one(replicas=0), "models.q.replicas: must be a whole number from 1, or per_gpu"),
        (one(restart="always"), "models.q.restart: must be 'never' or 'on-failure'"),
        (one(ttl="soon"), 'models.q.ttl: must be seconds, or text such as "15m" or "2h"'),
        (one(sleep=True), "models.q.sleep: must be 0 (unload instead), 1 or 2"),
        (one(defaults={"model": "x"}), "models.q.defaults: model is not for the catalogue to change"),
        (one(defaults=["n"]), "models.q.defaults: must hold fields of a request's body with their values"),
        (one(defaults={"n": float("nan")}), "models.q.defaults: must hold only what JSON can"),
        (one(strip=["model"]), "models.q.strip: model is not for the catalogue to change"),
        (one(adapters={"l": {}}), "models.q.adapters.l.source: is missing"),
        (one(adapters={"l": {"source": "x", "alias": []}}), "models.q.adapters.l.alias: there is no such key: did you"),
        ({"groups": {"g": {"members": ["z"]}}}, "groups.g.members: there is no model 'z'"),
        ({**one(), "groups": {"g": {"members": ["qq"]}}}, "groups.g.members: there is no model 'qq': did you mean q?"),
        ({"groups": {"g": {}}}, "groups.g.members: is missing"),
        ({"defaults": {"source": "x"}}, "defaults.source: there is no such key"),
        ({"defaults": {"gpus": {"count": "x"}}, **one()}, "defaults.gpus.count: must be a valid integer"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_what_to_write(raw, said):
    assert problems(raw)[0].startswith(said)


@pytest.mark.parametrize(
    ("param", "place"),
    [
        ("model", "models.q.source"), ("served_model_name", "models.q"), ("dtype", "models.q.args.dtype"),
        ("gpu_count", "models.q.gpus.count"), ("extra_args.x", "models.q.extra_args.x"), ("env.X", "models.q.env.X"),
        ("adapters.l", "models.q.adapters.l"), ("engine", "models.q.engine"), ("aliases", "models.q.aliases"),
        ("revision", "models.q.revision"), (None, "models.q"), ("gpu_ids", "models.q.gpus.ids"),
        ("tensor_parallel_size", "models.q.args.tensor_parallel_size"), ("replicas", "models.q.replicas"),
    ],
)  # fmt: skip
def test_what_no_launch_could_have_is_told_at_its_place_in_the_file(param, place):
    def check(_entry: ModelEntry) -> None:
        raise BadRequest(f"{param} must be something else.", param=param)

    told = "must be something else." if param else "None must be something else."
    assert problems(one(), check) == [f"{place}: {told}"]


def test_every_mistake_is_named_up_to_a_bound():
    raw = {"models": {f"m{n}": {"source": 1} for n in range(MAX_SHOWN + 3)}}
    said = problems(raw)
    assert len(said) == MAX_SHOWN + 1
    assert said[-1] == "and 3 more"


def test_each_name_may_be_used_once_in_the_whole_catalogue():
    raw = {
        "models": {
            "a": {"source": "a", "aliases": ["x"]},
            "b": {"source": "b", "aliases": ["x"], "adapters": {"a": {"source": "/l", "aliases": ["c", "one"]}}},
            "c": {"source": "c"},
        }
    }
    assert problems(raw, fixed=[ModelEntry("one", "one", origin="setting")]) == [
        "models.b.aliases: the name 'x' is used at models.a.aliases already: each name may be used once",
        "models.b.adapters.a: the name 'a' is used at models.a already: each name may be used once",
        "models.b.adapters.a.aliases: the name 'one' is used at models.one already: each name may be used once",
        "models.c: the name 'c' is used at models.b.adapters.a.aliases already: each name may be used once",
    ]


def test_a_single_model_is_told_with_places_below_it():
    assert parse_entry("n", {"source": "s"}, "runtime", fine) == ModelEntry("n", "s", origin="runtime")
    with pytest.raises(CatalogueError, match=r"^gpus\.share: "):
        parse_entry("n", {"source": "s", "gpus": {"share": 2}}, "runtime", fine)
    assert clashes([ModelEntry("n", "s")]) == []


def test_a_name_that_no_route_could_hold():
    for raw in ({"models": {"org/x/load": {"source": "org/x"}}}, one(aliases=["q/files"])):
        (said,) = problems(raw)
        assert "the name '" in said
        assert "/load'" in said or "/files'" in said
