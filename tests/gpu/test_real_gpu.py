"""One launch on a real NVIDIA GPU: claimed, seen in use, and proven free again. Marked ``gpu``; run it with

    VLLM_ENGINE_ENV=/opt/vllm python -m pytest -m gpu tests/gpu

where that environment has a vLLM for CUDA. Written without a GPU at hand: not run so far.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

ENGINE_PYTHON = Path(os.environ.get("VLLM_ENGINE_ENV", "/opt/vllm"), "bin", "python")
MODEL_SCRIPT = Path(__file__).resolve().parents[1] / "vllm" / "make_tiny_model.py"
TOLERANCE_BYTES = 512 * 1024**2


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    subprocess.run([ENGINE_PYTHON, MODEL_SCRIPT, folder], check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(devices="cuda", engine_python=ENGINE_PYTHON, stop_grace_s=7, gpu_settle_timeout_s=60) as daemon:
        yield daemon


def gpu(daemon: DaemonProcess) -> dict[str, object]:
    found: dict[str, object] = daemon.request("GET", "/gpus").json()["data"][0]
    return found


def test_a_gpu_is_claimed_used_and_free_again(daemon: DaemonProcess, tiny_model: Path) -> None:
    before = gpu(daemon)
    assert before["kind"] == "cuda"
    assert before["state"] == "free"
    launch_id = daemon.launch(str(tiny_model), engine="vllm", served_model_name="tiny", gpu_memory_utilization=0.3)
    daemon.wait_state(launch_id, "ready", timeout_s=300)
    during = gpu(daemon)
    assert during["state"] == "claimed"
    assert int(str(during["memory_used_bytes"])) > int(str(before["memory_used_bytes"])) + TOLERANCE_BYTES
    refused = daemon.request("POST", "/launch", {"model": str(tiny_model), "gpu_ids": [before["uuid"]]})
    assert (refused.status, refused.error["code"]) == (409, "gpu_conflict")
    assert launch_id in refused.error["message"]
    outcome = daemon.stop_launch(launch_id).json()
    assert outcome["unsettled_gpus"] == []
    wait_for(lambda: gpu(daemon)["state"] == "free")
    assert int(str(gpu(daemon)["memory_used_bytes"])) <= int(str(before["memory_used_bytes"])) + TOLERANCE_BYTES
