"""What README.md tells people to type works as it stands, against a daemon with mock GPUs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"(?ms)^```(\w+)\n(.*?)^```", README)
MODEL = "Qwen/Qwen3-0.6B"


def block(language: str, containing: str) -> str:
    (found,) = [text for kind, text in BLOCKS if kind == language and containing in text]
    return found


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess() as daemon:
        yield daemon


def run(daemon: DaemonProcess, *command: str) -> str:
    env = {
        **os.environ,
        "VLLM_BOOTSTRAP_URL": daemon.url,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_curl_commands(daemon: DaemonProcess) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    text = (
        block("sh", "curl localhost:8000/launch ").replace("localhost:8000", daemon.url).replace("curl ", "curl -sS ")
    )
    launch, listing, chat, stop = re.split(r"\n(?=curl)", text.strip())
    launch_id = json.loads(run(daemon, "sh", "-c", launch))["launch_id"]
    daemon.wait_state(launch_id, "ready")
    assert launch_id in run(daemon, "sh", "-c", listing)
    assert run(daemon, "sh", "-c", chat).rstrip().endswith("data: [DONE]")
    assert json.loads(run(daemon, "sh", "-c", stop.replace("LAUNCH_ID", launch_id)))["state"] == "stopped"


def test_the_python_example(daemon: DaemonProcess) -> None:
    assert "hello" in run(daemon, sys.executable, "-c", block("python", "Client")).lower()


def test_the_command_line(daemon: DaemonProcess) -> None:
    launch, listing, logs, stop = block("sh", "launch Qwen").strip().splitlines()
    assert "--wait" in launch
    run(daemon, *launch.split())
    (found,) = json.loads(run(daemon, *listing.split(), "--json"))["data"]
    assert found["model"] == MODEL
    followed = [word for word in logs.split() if word != "-f"]
    assert "Application startup complete" in run(daemon, *followed[:-1], found["launch_id"])
    run(daemon, *stop.split()[:-1], found["launch_id"])
    assert daemon.status(found["launch_id"])["state"] == "stopped"
