"""Whatever stands in the catalogue's file: it is a catalogue, or an error that names places. Nothing in between."""

from __future__ import annotations

import contextlib
import json

from hypothesis import given
from hypothesis import strategies as st

from vllm_bootstrap.models.catalogue_file import values_of
from vllm_bootstrap.models.parsing import CatalogueError, parse
from vllm_bootstrap.models.schema import CommonForm, GroupForm, ModelForm
from vllm_bootstrap.models.stored import from_json, to_json

KEYS = sorted({*ModelForm.model_fields, *GroupForm.model_fields, *CommonForm.model_fields, "count", "ids", "share"})
plain = (
    st.none()
    | st.booleans()
    | st.integers(-5, 100)
    | st.floats()
    | st.sampled_from(["a", "b", "15m", "4GiB", "auto", ""])
)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)
names = st.sampled_from(["a", "b", "c", "-d"])
model = st.fixed_dictionaries(
    {"source": st.sampled_from(["org/m", "/m"])},
    optional={
        "aliases": st.lists(names, max_size=2), "ttl": plain, "gpus": values, "args": values, "defaults": values,
        "adapters": st.dictionaries(names, st.fixed_dictionaries({"source": st.just("/l")}), max_size=2),
    },
)  # fmt: skip
catalogues = st.fixed_dictionaries(
    {},
    optional={
        "models": st.dictionaries(names, model | values, max_size=3) | values,
        "groups": st.dictionaries(names, st.fixed_dictionaries({"members": st.lists(names, max_size=2)}), max_size=2),
        "defaults": values,
    },
)


@given(catalogues | values)
def test_any_values_give_a_catalogue_or_reasons(raw):
    try:
        found = parse(raw, lambda _entry: None)
    except CatalogueError:
        return
    used = [name for entry in found.entries.values() for name in entry.served_names]
    assert len(used) == len(set(used)), "a name leads to one model"
    assert all(group.members <= found.entries.keys() for group in found.groups)
    for name, entry in found.entries.items():
        assert (entry.name, entry.origin) == (name, "file")
        assert from_json(to_json(entry)) == entry


@given(st.text(max_size=200))
def test_any_text_gives_values_or_reasons(text):
    with contextlib.suppress(CatalogueError):
        json.dumps(values_of(text))
