from vllm_bootstrap.engines.base import Gpu, LaunchSpec, Placement
from vllm_bootstrap.launches.spec_hash import args_hash, device_name


def test_order_of_fields_does_not_matter_but_values_do():
    one = LaunchSpec("m", "vllm", "m", fields={"a": 1, "b": 2})
    same = LaunchSpec("m", "vllm", "m", fields={"b": 2, "a": 1})
    other = LaunchSpec("m", "vllm", "m", fields={"a": 1, "b": 3})
    assert args_hash(one) == args_hash(same) != args_hash(other)


def test_device_names():
    gpus = tuple(Gpu(f"u{i}", i, "NVIDIA H200", 1) for i in range(2))
    assert device_name(Placement("cuda", gpus)) == "2 x NVIDIA H200"
    assert device_name(Placement("none")) == "none"
