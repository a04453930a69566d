"""A rented box that nobody uses tells so, once, and its idle hours outlast the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_for

COMPLETION = {"model": "org/m", "prompt": "x", "max_tokens": 4}


def idle(daemon: DaemonProcess) -> dict[str, Any]:
    found: dict[str, Any] = daemon.request("GET", "/stats").json()["idle"]
    return found


def test_the_command_is_run_once_a_spell_and_hours_outlast_the_daemon(tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    command = f"sh -c 'echo $VLLM_BOOTSTRAP_IDLE_S $RUNPOD_POD_ID $VLLM_BOOTSTRAP_ACCESS_KEY. >> {fired}'"
    hook = {"idle_after_s": "3", "idle_command": command, "access_key": "a-key-not-to-be-passed-on"}
    with DaemonProcess(env={"RUNPOD_POD_ID": "pod"}, **hook) as daemon:
        daemon.wait_state(daemon.launch("org/m", gpu_count=1), "ready")
        assert daemon.request("POST", "/v1/completions", COMPLETION).status == 200
        wait_for(lambda: idle(daemon)["actions"][0]["state"] == "completed", 30, what="the command")
        seconds, told = fired.read_text().split(" ", 1)
        assert int(seconds) >= 3
        assert told == "pod .\n"
        assert idle(daemon)["fires_in_s"] is None
        assert daemon.request("POST", "/v1/completions", COMPLETION).status == 200  # a request of a millisecond
        wait_for(lambda: len(fired.read_text().splitlines()) == 2, 30, what="the second spell")
        text = daemon.request("GET", "/metrics").body.decode()
        assert 'vllm_bootstrap_idle_hook_runs_total{action="command",outcome="completed"} 2.0' in text
        before = idle(daemon)["box"]["total"]
        assert before["idle_h"] > 0
        assert before["claimed_h"] > 0
        assert daemon.stop() == 0
        daemon.start()
        after = idle(daemon)
        assert after["box"]["total"]["idle_h"] >= before["idle_h"]
        assert after["box"]["this_start"]["idle_h"] < before["idle_h"]
        assert len(fired.read_text().splitlines()) == 2  # a restart does not fire at once


def test_a_command_that_cannot_be_run_keeps_the_daemon_from_starting() -> None:
    daemon = DaemonProcess(idle_after_s="60", idle_command="no-such-program-here")
    try:
        with pytest.raises(AssertionError, match="there is no program 'no-such-program-here'"):
            daemon.start()
    finally:
        daemon.close()
