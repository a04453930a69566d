"""What makes two launch requests the same, across versions of the program."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import pytest

from vllm_bootstrap.launches.accepting import _LATER, _hash_of
from vllm_bootstrap.launches.types import LaunchOrder


def test_a_request_hashes_as_it_did_before_there_were_replicas_and_further_names():
    order = LaunchOrder("sim", gpu_count=1)
    first = {name: value for name, value in asdict(order).items() if name not in _LATER}
    assert list(first)[-3:] == ["restart_policy", "restart_max_attempts", "restart_backoff_s"]
    assert _hash_of(order) == hashlib.sha256(json.dumps(first, sort_keys=True, default=str).encode()).hexdigest()


@pytest.mark.parametrize("more", [{"replicas": 2}, {"aliases": ("a",)}, {"adapters": {"l": "/l"}}, {"max_parallel": 2}])
def test_what_came_later_makes_a_request_another_one(more):
    assert _hash_of(LaunchOrder("sim", **more)) != _hash_of(LaunchOrder("sim"))
