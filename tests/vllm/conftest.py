"""A daemon whose engines are a real vLLM on the CPU, and a tiny model made on the spot. One launch at a time."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess
from tests.vllm.box import Box

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def engine_python() -> Path:
    python = ROOT / os.environ.get("VLLM_ENGINE_ENV", ".engine") / "bin" / "python"
    assert python.exists(), f"{python} is missing: run 'make test-vllm', which builds it"
    return python


@pytest.fixture(scope="session")
def tiny_model(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    script = Path(__file__).with_name("make_tiny_model.py")
    subprocess.run([engine_python, script, folder], check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture(scope="session")
def box(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    # HF_TOKEN is a secret that must be seen nowhere.
    env = {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_secretsecretsecretsecret"}
    settings = {"devices": "cpu", "engine_python": engine_python, "stop_grace_s": 7, "probe_timeout_s": 5}
    with DaemonProcess(env=env, **settings) as daemon:
        yield Box(daemon)
