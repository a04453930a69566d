"""Settings of the catalogue and of one-model mode, as the models they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_bootstrap.configure import catalogue, gateway_limits, one_model
from vllm_bootstrap.engines import build_engines
from vllm_bootstrap.models.parsing import CatalogueError
from vllm_bootstrap.models.types import GpuNeed, ModelEntry
from vllm_bootstrap.settings import Settings

QWEN = "Qwen/Qwen2.5-3B-Instruct"


def model(*, on_cpu: bool = False, **settings: Any) -> ModelEntry | None:
    return one_model(Settings(model_id=QWEN, **settings), on_cpu=on_cpu)


def test_without_a_model_there_is_none():
    assert one_model(Settings(), on_cpu=False) is None


def test_the_one_model_with_its_defaults():
    assert model() == ModelEntry(
        QWEN, QWEN, origin="setting", args={"max_model_len": 8192, "gpu_memory_utilization": 0.9},
        gpus=GpuNeed(count=1), pin=True, preload=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        ({"model_revision": "v2"}, "revision", "v2"),
        ({"tensor_parallel": 2}, "gpus", GpuNeed(count=2)),
        ({"dtype": "float16"}, "args", {"dtype": "float16", "max_model_len": 8192, "gpu_memory_utilization": 0.9}),
        ({"max_model_len": 4096}, "args", {"max_model_len": 4096, "gpu_memory_utilization": 0.9}),
        ({"gpu_memory_utilization": 0.5}, "args", {"max_model_len": 8192, "gpu_memory_utilization": 0.5}),
    ],
)
def test_each_setting_says_how_it_is_run(settings, field, value):
    assert getattr(model(**settings), field) == value


def test_on_a_cpu_only_a_share_that_was_asked_for_counts():
    assert model(on_cpu=True).args == {"max_model_len": 8192}
    assert model(on_cpu=True, gpu_memory_utilization=0.5).args["gpu_memory_utilization"] == 0.5


def book(**settings: Any):
    return catalogue(Settings(**settings), None, build_engines(), on_cpu=False)  # nothing is stored here


def test_the_catalogue_is_the_file_that_is_named_or_the_default_one(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("vllm_bootstrap.configure.default_config_dir", lambda: tmp_path)
    assert book().entries() == {}
    (tmp_path / "models.yaml").write_text("models: {a: {source: a}}")
    assert list(book(model_id=QWEN).entries()) == [QWEN, "a"]
    other = tmp_path / "other.yaml"
    with pytest.raises(CatalogueError, match=r"other\.yaml: there is no such file"):
        book(models_file=other)
    other.write_text("models: {b: {source: b, args: {dtype: eight}}}")
    with pytest.raises(CatalogueError, match=r"other\.yaml: models\.b\.args\.dtype: must be 'auto'"):
        book(models_file=other)


def test_a_model_that_no_launch_could_serve_stops_the_start(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("vllm_bootstrap.configure.default_config_dir", lambda: tmp_path)
    with pytest.raises(CatalogueError, match="MODEL_ID: "):
        book(model_id="../x")
    with pytest.raises(CatalogueError, match="MODEL_ID: the name 'org/files' may not end in 'files'"):
        book(model_id="org/files")


@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        ({}, "catalogue"), ({"use_mock_model": True}, "any"), ({"devices": "mock:2"}, "catalogue"),
        ({"use_mock_model": True, "on_demand": "catalogue"}, "catalogue"), ({"on_demand": "any"}, "any"),
        ({"on_demand": "off"}, "off"),
    ],
)  # fmt: skip
def test_which_models_a_request_may_have_loaded(settings, meant):
    assert Settings(**settings).models_by_request == meant


def test_limits_of_requests_are_what_settings_say():
    limits = gateway_limits(Settings(spool_budget_bytes=5000, client_dead_after_s=7))
    assert (limits.spool_budget_bytes, limits.client_dead_after_s) == (5000, 7)
    ours = {name for name in type(limits).__dataclass_fields__ if name in Settings.model_fields}
    assert {name: getattr(limits, name) for name in ours} == {
        name: getattr(Settings(spool_budget_bytes=5000, client_dead_after_s=7), name) for name in ours
    }
