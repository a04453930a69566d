"""What the tests with a real engine ask of a running daemon, over plain HTTP, and what they see of its processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import openai
import psutil

from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_for

START_TIMEOUT_S = 150
SERVED = "tiny"


@dataclass
class Box:
    daemon: DaemonProcess
    phases: list[str] = field(default_factory=list)

    def get(self, path: str, **params: int) -> dict[str, Any]:
        answer = self.daemon.request("GET", f"{path}?{urlencode(params)}")
        assert answer.status == 200, answer.body
        decoded: dict[str, Any] = answer.json()
        return decoded

    def launch(self, model: Path | str, **fields: Any) -> str:
        """Ask for a launch of the tiny model; returns its id."""
        body = {"model": str(model), "served_model_name": SERVED, "max_model_len": 1024, "max_num_seqs": 32, **fields}
        answer = self.daemon.request("POST", "/launch", body)
        assert answer.status == 201, answer.body
        return str(answer.json()["launch_id"])

    def status(self, launch_id: str) -> dict[str, Any]:
        return self.daemon.status(launch_id)

    def wait_for(
        self, launch_id: str, *states: str, attempt: int = 1, timeout_s: float = START_TIMEOUT_S
    ) -> dict[str, Any]:
        """Poll until the launch is in one of ``states`` in at least that attempt; notes the phases seen on the way."""

        def found() -> dict[str, Any] | None:
            status = self.status(launch_id)
            phase = (status["progress"] or {}).get("phase")
            if phase and phase not in self.phases[-1:]:
                self.phases.append(phase)
            if status["state"] in states and status["attempt"] >= attempt:
                return status
            assert status["state"] != "failed", f"{status['failure']}\n{self.log_tail(launch_id)}"
            return None

        status = wait_for(found, timeout_s, tick_s=0.2, what=(launch_id, states))
        assert status is not None
        return status

    def log_tail(self, launch_id: str, lines: int = 30) -> str:
        return str(self.get(f"/logs/{launch_id}", tail=lines)["content"])

    def openai(self, base: str = "/v1") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.daemon.url + base, api_key="unused", max_retries=0, timeout=60)


def processes_of(launch_id: str) -> list[psutil.Process]:
    """Living processes that carry the launch's mark, whoever their parent is."""
    found = []
    for process in psutil.process_iter():
        try:
            marked = f"/{launch_id}/" in process.environ().get("VBS_LAUNCH", "")
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until_gone(launch_id: str, pids: set[int], timeout_s: float) -> None:
    """Until neither a marked process nor one of ``pids`` lives."""

    def none_left() -> bool:
        return not processes_of(launch_id) and not any(_lives(pid) for pid in pids)

    wait_for(none_left, timeout_s, tick_s=0.1, what=f"still there: {processes_of(launch_id)}")


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def engine_core_of(pid: int) -> psutil.Process:
    """vLLM's inner process below its API server."""
    for child in psutil.Process(pid).children(recursive=True):
        if "EngineCore" in " ".join(child.cmdline()):
            return child
    raise AssertionError("no EngineCore below the API server")
