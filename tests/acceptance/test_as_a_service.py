"""What ``systemctl restart`` and ``stop`` do under the shipped unit, without systemd: the signals it would send, the
settings it sets, the directories it keeps. That systemd itself acts so was not tried here."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from tests.support.daemon import DaemonProcess


@pytest.fixture(scope="module")
def installed() -> Iterator[DaemonProcess]:
    with DaemonProcess(on_shutdown="leave") as daemon:
        yield daemon


@pytest.fixture
def service(installed: DaemonProcess) -> Iterator[DaemonProcess]:
    yield installed
    for launch in installed.request("GET", "/launches").json()["data"]:
        installed.stop_launch(launch["launch_id"], force="true")


def test_stop_leaves_models_running_and_start_finds_them(service: DaemonProcess) -> None:
    before = service.ready()
    assert service.stop(signal.SIGTERM) == 0
    assert psutil.Process(before["pid"]).is_running()
    assert not (service.state_dir / "daemon.json").exists()
    service.start()
    after = service.wait_state(before["launch_id"], "ready", timeout_s=5)
    assert (after["pid"], after["shim_pid"], after["attempt"]) == (before["pid"], before["shim_pid"], 1)


def test_a_launch_that_is_starting_goes_on_starting(service: DaemonProcess) -> None:
    launch_id = service.launch(knobs={"boot_delay": 2})
    status = service.wait_state(launch_id, "bootstrapping")
    assert service.stop(signal.SIGTERM) == 0
    service.start()
    assert service.wait_state(launch_id, "ready")["attempt"] == status["attempt"]


def test_a_daemon_killed_for_memory_costs_no_model(service: DaemonProcess) -> None:
    before = service.ready()
    service.restart()  # SIGKILL, as the kernel does it, and Restart=always
    assert service.wait_state(before["launch_id"], "ready", timeout_s=5)["pid"] == before["pid"]


def test_reload_reads_the_keys_and_touches_nothing_else(service: DaemonProcess) -> None:
    before = service.ready()
    service.send_signal(signal.SIGHUP)
    assert service.status(before["launch_id"])["pid"] == before["pid"]


def test_stop_all_ends_the_models(service: DaemonProcess) -> None:
    before = service.ready()
    command = [sys.executable, "-m", "vllm_bootstrap", "stop", "--all", "--url", service.url]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    assert service.status(before["launch_id"])["state"] == "stopped"
    assert service.stop(signal.SIGTERM) == 0
    service.assert_no_leftovers(timeout_s=1)
    service.start()
