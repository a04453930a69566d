"""What is refused of a launch's wishes while they are read: bounds that types alone do not give."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from vllm_bootstrap.wire import LaunchRequest


@pytest.mark.parametrize("replicas", [None, 1, 2, 64, "per_gpu"])
def test_replicas_are_a_number_or_one_for_each_gpu(replicas: int | str | None) -> None:
    assert LaunchRequest(model="m", replicas=replicas).replicas == replicas


@pytest.mark.parametrize("replicas", [0, -1, "all"])
def test_a_launch_without_a_replica_is_refused(replicas: int | str) -> None:
    with pytest.raises(ValidationError) as refused:
        LaunchRequest.model_validate({"model": "m", "replicas": replicas})
    assert {error["loc"][0] for error in refused.value.errors()} == {"replicas"}
