"""Fit before launch, seen from outside: a refusal says what would fit, and the operator may switch it off."""

from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.model_folders import write_model
from tests.support.published_models import LLAMA_70B


@pytest.fixture
def large(tmp_path: Path) -> str:
    """A model of 131 GiB, all holes."""
    return str(write_model(tmp_path / "llama-70b", LLAMA_70B, 70_553_706_496, shards=4))


def test_a_launch_that_cannot_fit_is_refused(large: str) -> None:
    with DaemonProcess(devices="mock:4") as daemon:
        wish = {"model": large, "gpu_count": 1, "max_model_len": 8192}
        refused = daemon.request("POST", "/launch", wish)
        assert (refused.status, refused.error["code"], refused.error["param"]) == (400, "does_not_fit", "gpu_count")
        assert refused.error["fit"]["weights_bytes"] == 2 * 70_553_706_496
        assert daemon.request("GET", "/launches").json()["data"] == []
        suggested = {one["field"]: one["value"] for one in refused.error["suggestions"] if "field" in one}
        accepted = daemon.request("POST", "/launch", {**wish, "gpu_count": suggested["gpu_count"]})
        assert accepted.status == 201, accepted.body
        assert daemon.request("POST", "/launch", {"model": "org/unknown", "gpu_count": 1}).status == 201


def test_the_operator_may_have_it_started_all_the_same(large: str) -> None:
    with DaemonProcess(devices="mock:1", fit_check=False) as daemon:
        assert daemon.request("POST", "/launch", {"model": large, "gpu_count": 1}).status == 201
