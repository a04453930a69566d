import pytest

from tests.support.control_plane import NOW, SECRET_LINE, failed, loading, view
from vllm_bootstrap.api import views
from vllm_bootstrap.launches.types import EventView
from vllm_bootstrap.serving import LoadReport
from vllm_bootstrap.wire import LaunchRequest

LOAD = LoadReport({"realtime": 1}, {})


def order(**fields):
    return views.order_of(LaunchRequest.model_validate({"model": "m", **fields}))


def test_an_order_holds_what_was_given_and_nothing_else():
    found = order(gpu_ids=[0, "GPU-1"], dtype="auto", max_model_len=2048, tensor_parallel_size=2, extra_args={"a": 1})
    assert found.gpu_ids == (0, "GPU-1")
    assert found.fields == {"dtype": "auto", "max_model_len": 2048}
    assert (found.tensor_parallel_size, found.extra_args) == (2, {"a": 1})
    assert order().fields == {}
    assert order().gpu_ids is None


def test_every_typed_engine_field_reaches_the_order():
    engine_fields = set(LaunchRequest.model_fields) - views._ORDER_FIELDS
    values = {"dtype": "auto", "max_model_len": "auto", "gpu_memory_utilization": 0.5, "quantization": "awq",
              "kv_cache_dtype": "fp8", "revision": "r", "tokenizer": "t"}  # fmt: skip
    given = {name: values.get(name, 1) for name in engine_fields}
    assert set(order(**given).fields) == engine_fields


@pytest.mark.parametrize(
    ("restart", "expected"),
    [
        (None, ("never", None, None)),
        ("on-failure", ("on-failure", None, None)),
        ({"policy": "on-failure", "max_attempts": 3, "backoff_s": 1.5}, ("on-failure", 3, 1.5)),
    ],
)
def test_restart_is_a_word_or_an_object(restart, expected):
    found = order(restart=restart)
    assert (found.restart_policy, found.restart_max_attempts, found.restart_backoff_s) == expected


@pytest.mark.parametrize("replicas", [1, 2, "per_gpu"])
def test_replicas_are_part_of_the_order(replicas):
    assert order(replicas=replicas).replicas == replicas
    assert order().replicas == 1


def test_status_shows_times_as_rfc_3339_and_load_by_class():
    shown = views.status(view(), LOAD, with_lines=True).model_dump(mode="json")
    assert shown["created_at"] == "2027-01-15T08:00:00Z"
    assert shown["transitions"]["ready"] == "2027-01-15T08:00:01Z"
    load = {"capacity": 4, "in_flight": {"realtime": 1}, "queued": {}, "oldest_wait_s": None, "batch": None}
    assert shown["load"] == load
    assert shown["proxy_url"] == f"/proxy/{shown['launch_id']}"


def test_progress_and_failure_are_there_when_they_are():
    assert views.status(view(), LOAD, with_lines=True).progress is None
    progress = views.status(loading(), LOAD, with_lines=True).progress
    assert progress is not None
    assert (progress.phase, progress.fraction, progress.eta_s) == ("load", 0.5, 4.0)
    shown = views.status(failed(), LOAD, with_lines=True).model_dump(mode="json", by_alias=True)
    assert shown["failure"]["class"] == "bad_flag"
    assert shown["failure"]["lines"] == [SECRET_LINE]


def test_log_lines_are_left_out_for_those_who_may_not_see_them():
    assert SECRET_LINE not in views.status(failed(), LOAD, with_lines=False).model_dump_json()


def test_an_event_keeps_its_number():
    shown = views.event(EventView(7, "l1", 2, NOW, "released", "stopping", "failed", {"forced": True}))
    assert (shown.seq, shown.attempt, shown.detail) == (7, 2, {"forced": True})
    assert views.when(None) is None
