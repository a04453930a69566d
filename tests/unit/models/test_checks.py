"""Models are judged by the rules of launches, when the catalogue is read."""

from __future__ import annotations

import pytest

from tests.support.engines import Other
from vllm_bootstrap.engines import build_engines
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.models.checks import checker
from vllm_bootstrap.models.types import AdapterEntry, GpuNeed, ModelEntry


def refused(check, **fields) -> str | None:
    with pytest.raises(BadRequest) as caught:
        check(ModelEntry(**{"name": "q", "source": "org/q", **fields}))
    return caught.value.param


def test_what_no_launch_could_have_is_refused():
    check = checker(build_engines(), "vllm")
    check(ModelEntry("q", "org/q", aliases=("a",), adapters=(AdapterEntry("l", "/l"),), args={"dtype": "half"}))
    assert refused(check, source="../x") == "model"
    assert refused(check, name="-q") == "served_model_name"
    assert refused(check, engine="sglang") == "engine"
    assert refused(check, args={"trust_remote_code": True}) == "trust_remote_code"
    assert refused(check, extra_args={"enable-loras": True}) == "extra_args.enable-loras"
    assert refused(check, env={"LD_PRELOAD": "x"}) == "env.LD_PRELOAD"


def test_what_the_operator_allows_is_allowed():
    check = checker(build_engines(), "vllm", ["trust-remote-code"])
    check(ModelEntry("q", "org/q", args={"trust_remote_code": True}))


def test_the_default_engine_decides_where_none_is_named():
    entry = ModelEntry("q", "org/q", extra_args={"boot-delay": 1})
    checker(build_engines(), "simulator")(entry)
    with pytest.raises(BadRequest, match="not a flag of any known vLLM"):
        checker(build_engines(), "vllm")(entry)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"gpus": GpuNeed(ids=(0, 0))}, "gpu_ids", "GPU 0 is named twice"),
        ({"gpus": GpuNeed(ids=("GPU-A", 1, "gpu-a"))}, "gpu_ids", "GPU 'gpu-a' is named twice"),
        ({"gpus": GpuNeed(ids=(0, "0"))}, "gpu_ids", "GPU '0' is named twice"),
        ({"gpus": GpuNeed(ids=(0, 1), count=1)}, "gpu_count", "gpu_ids names 2"),
        ({"gpus": GpuNeed(count=2), "args": {"tensor_parallel_size": 4}}, "tensor_parallel_size", "4 x 1"),
        (
            {"gpus": GpuNeed(count=4), "args": {"tensor_parallel_size": 2, "pipeline_parallel_size": 4}},
            "tensor_parallel_size",
            "2 x 4",
        ),
        ({"gpus": GpuNeed(count=3), "args": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size", "multiple of 2"),
        ({"gpus": GpuNeed(ids=(0, 1)), "args": {"tensor_parallel_size": 4}}, "tensor_parallel_size", "4 x 1"),
        (
            {"gpus": GpuNeed(count=2), "args": {"tensor_parallel_size": 4}, "replicas": 2},
            "tensor_parallel_size",
            "4 x 1",
        ),
        ({"replicas": 9}, "replicas", "VLLM_BOOTSTRAP_REPLICAS_MAX allows 8"),
        ({"gpus": GpuNeed(count=2), "replicas": "per_gpu"}, "gpu_count", "'per_gpu' puts one engine on each GPU"),
        ({"args": {"tensor_parallel_size": 2}, "replicas": "per_gpu"}, "tensor_parallel_size", "must be 1"),
        ({"args": {"pipeline_parallel_size": 2}, "replicas": "per_gpu"}, "pipeline_parallel_size", "must be 1"),
        ({"gpus": GpuNeed(share=0.3), "args": {"gpu_memory_utilization": 0.9}}, "gpu_memory_utilization", "gpu_share"),
    ],
)
def test_what_no_machine_could_place_is_refused(fields, param, said):
    check = checker(build_engines(), "vllm", replicas_max=8)
    with pytest.raises(BadRequest, match=said) as caught:
        check(ModelEntry("q", "org/q", **fields))
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"gpus": GpuNeed(count=4), "args": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}},
        {"gpus": GpuNeed(count=4), "args": {"pipeline_parallel_size": 2}},
        {"gpus": GpuNeed(ids=(0, 1, "GPU-a"), count=3)},
        {"gpus": GpuNeed(ids=(0, 1), count=1), "replicas": 2},
        {"gpus": GpuNeed(ids=(0, 1)), "args": {"tensor_parallel_size": 1}, "replicas": 2},
        {"gpus": GpuNeed(count=1, ids=(0, 1)), "args": {"tensor_parallel_size": 1}, "replicas": "per_gpu"},
        {"args": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}},
        {"replicas": 8},
    ],
)
def test_what_some_machine_could_place_is_not(fields):
    checker(build_engines(), "vllm", replicas_max=8)(ModelEntry("q", "org/q", **fields))
    checker(build_engines(), "vllm")(ModelEntry("q", "org/q", **fields))


def test_where_a_server_that_runs_elsewhere_is_placed_is_nobodys_business():
    class Elsewhere(Other):
        external = True

    engine = Elsewhere()
    checker({engine.name: engine}, engine.name, replicas_max=8)(ModelEntry("q", "q", gpus=GpuNeed(ids=(0, 0))))
