"""Settings as the plain values that inner parts work with: models they mean, and numbers of the data plane."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_bootstrap.configure import budget_policy, catalogue, gateway_limits, one_model
from vllm_bootstrap.engines import build_engines
from vllm_bootstrap.gateway.limits import FILE_FORM_BYTES, GatewayLimits
from vllm_bootstrap.models.parsing import CatalogueError
from vllm_bootstrap.models.types import GpuNeed, ModelEntry
from vllm_bootstrap.scheduler.budget import Budget, BudgetPolicy
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


# -- realtime and batch on one engine ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "field"),
    [
        ("realtime_reserve", 0.3, "reserve_share"), ("batch_floor", 0.2, "floor_share"),
        ("realtime_ttft_factor", 2.5, "ttft_factor"),
    ],
)  # fmt: skip
def test_each_setting_of_the_batch_budget_is_one_field_and_no_other(monkeypatch, setting, value, field):
    assert budget_policy(Settings()) == BudgetPolicy()
    monkeypatch.setenv(f"VLLM_BOOTSTRAP_{setting.upper()}", str(value))
    assert budget_policy(Settings()) == replace(BudgetPolicy(), **{field: value})


def budget(slots: int, **settings: Any) -> Budget:
    return Budget(budget_policy(Settings(**settings)), slots)


def test_the_reserve_is_what_batch_leaves_free():
    assert [budget(20, realtime_reserve=share).allowance(0) for share in (0.1, 0.5, 0.9)] == [18, 10, 2]


def test_a_floor_of_nothing_lets_batch_starve_and_any_other_does_not():
    def ever_due(share: float) -> bool:
        waits = budget(4, batch_floor=share)
        waits.batch_waits(True, 0)
        return any(waits.overdue(now) for now in range(300))

    assert [ever_due(share) for share in (0, 0.05, 1)] == [False, True, True]


@pytest.mark.parametrize(("factor", "bears_it"), [(1.5, False), (4, True)])
def test_the_factor_says_how_much_later_realtime_may_begin(factor, bears_it):
    """A quarter later than alone: with the one factor that is too much batch, with the other there is room for more."""
    now, alone_s = 0.0, 0.010
    judged = budget(128, realtime_ttft_factor=factor)
    for _ in range(2):  # what it is like alone is believed when it was heard twice, some time apart
        for _ in range(32):
            judged.realtime_arrived(now)
            judged.realtime_began(alone_s, now)
            now += 0.1
        now += 20
    judged.realtime_arrived(now)
    before = judged.allowance(now)
    for request in range(before):
        judged.batch_granted(request, 1, 100, now)
    for _ in range(8):
        now += 0.1
        judged.realtime_arrived(now)
        judged.realtime_began(1.25 * alone_s, now)
    assert (judged.allowance(now) > before) is bears_it


# -- the data plane ----------------------------------------------------------------------------------------------------

SAME_NAMES = [name for name in GatewayLimits.__dataclass_fields__ if name in Settings.model_fields]


@pytest.mark.parametrize("name", SAME_NAMES)
def test_each_limit_of_the_data_plane_is_the_setting_of_its_name(name):
    value = True if name == "revoked_keys_cut_streams" else 3210
    assert gateway_limits(Settings(**{name: value})) == replace(gateway_limits(Settings()), **{name: value})


def test_limits_of_the_data_plane_without_settings_and_those_of_forms_with_a_file():
    assert gateway_limits(Settings()) == GatewayLimits()
    found = gateway_limits(Settings(file_max_bytes=5000, adapter_max_bytes=6000))
    assert found.max_file_body_bytes == 5000 + FILE_FORM_BYTES
    assert found.max_adapter_body_bytes == 6000 + FILE_FORM_BYTES


QUEUE_NAMES = ("MAX_CONCURRENT_REQUESTS", "MAX_IN_FLIGHT_REQUESTS", "VLLM_BOOTSTRAP_MAX_IN_FLIGHT_REQUESTS")


def test_the_length_of_the_queue_has_three_names_of_which_the_newer_wins(monkeypatch):
    for name in QUEUE_NAMES:
        monkeypatch.delenv(name, raising=False)
    assert Settings().max_in_flight_requests == 100
    for number, name in enumerate(QUEUE_NAMES, 7):
        monkeypatch.setenv(name, str(number))
        assert Settings().max_in_flight_requests == number, name
