"""Values of the catalogue's file: durations, sizes, and the form as a JSON schema."""

from __future__ import annotations

import json

import models_schema
import pytest

from vllm_bootstrap.engines.spec import FIELDS
from vllm_bootstrap.models import schema
from vllm_bootstrap.models.schema import ArgsForm, CatalogueForm, CommonForm, ModelForm, seconds, size


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0, 0), (90, 90), (1.5, 1.5), ("90", 90), ("90s", 90), ("15m", 900), ("2h", 7200), ("1.5 h", 5400), ("1d", 86400)],
)
def test_durations(given, expected):
    assert seconds(given) == expected


@pytest.mark.parametrize("given", [-1, True, None, "", "soon", "-5m", "5 years", float("inf"), float("nan"), []])
def test_what_is_no_duration(given):
    with pytest.raises(ValueError, match="15m"):
        seconds(given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0, 0), (4096, 4096), ("4096", 4096), ("1B", 1), ("2KB", 2000), ("2KiB", 2048), ("40GiB", 40 * 1024**3),
     ("1.5 MiB", 1536 * 1024), ("1TB", 1000**4), ("3TiB", 3 * 1024**4)],
)  # fmt: skip
def test_sizes(given, expected):
    assert size(given) == expected


@pytest.mark.parametrize("given", [-1, True, 1.5, None, "", "much", "40 GiBs", "40gib"])
def test_what_is_no_size(given):
    with pytest.raises(ValueError, match="40GiB"):
        size(given)


@pytest.mark.parametrize(("given", "expected"), [(0, 0), (1, 1), (2, 2), (False, 0)])
def test_sleep_levels(given, expected):
    assert ModelForm(source="a", sleep=given).sleep == expected


def test_the_arguments_are_those_of_a_launch():
    beside = {"tensor_parallel_size", "pipeline_parallel_size"}
    assert set(ArgsForm.model_fields) == set(FIELDS) - {"revision"} | beside


def test_defaults_can_say_all_but_what_makes_a_model():
    assert set(ModelForm.model_fields) - set(CommonForm.model_fields) == {"source", "aliases", "adapters"}


def test_every_key_says_what_it_means():
    for form in (CommonForm, ModelForm, CatalogueForm, schema.GpusForm, schema.AdapterForm, schema.GroupForm):
        assert [name for name, field in form.model_fields.items() if not field.description] == []


def test_the_stored_schema_is_current():
    assert models_schema.TARGET.read_text() == models_schema.text(), "run scripts/models_schema.py --update"


def test_the_schema_refuses_unknown_keys_everywhere():
    made = json.loads(models_schema.text())
    assert all(form["additionalProperties"] is False for form in made["$defs"].values())
    assert made["additionalProperties"] is False


def test_the_script_says_when_the_schema_is_not_current(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models_schema, "TARGET", tmp_path / "models.schema.json")
    assert models_schema.main([]) == 1
    assert "--update" in capsys.readouterr().err
    assert models_schema.main(["--update"]) == 0
    assert models_schema.main([]) == 0


def test_every_key_is_documented():
    page = (models_schema.TARGET.parents[1] / "docs" / "models.md").read_text()
    keys = [name for name in ModelForm.model_fields if name != "gpus"]
    keys += [f"gpus.{name}" for name in schema.GpusForm.model_fields]
    assert [name for name in keys if f"`{name}`" not in page] == []
    assert [name for name in schema.GroupForm.model_fields if f"{name}:" not in page] == []
