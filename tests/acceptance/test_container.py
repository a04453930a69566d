"""The image's entry point around a real daemon: models outlive a crash of the daemon, and nothing outlives a stop."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator

import container_init
import pytest

from tests.support.daemon import SERVE, DaemonProcess
from tests.support.waiting import wait_for

RUNTIME_PATIENCE_S = 10.0  # what Docker gives by default
GRACE_S = 3.0
# What the daemon has besides the grace before the init kills it, with the grace as it is by default.
BESIDES_S = container_init.STOP_S - 7.0


class Contained(DaemonProcess):
    """The init is the process, the daemon its child."""

    daemon_pid = 0

    def _is_up(self) -> bool:
        assert self._process.poll() is None, self.log
        try:
            announced = json.loads((self.state_dir / "daemon.json").read_text())
        except (FileNotFoundError, ValueError):
            return False
        if announced["pid"] == self.daemon_pid:
            return False
        self.url, self.daemon_pid = announced["url"], announced["pid"]
        return True


@pytest.fixture
def contained() -> Iterator[Contained]:
    with Contained(command=[sys.executable, container_init.__file__, *SERVE], stop_grace_s=GRACE_S) as contained:
        yield contained


def test_a_crash_of_the_daemon_costs_no_model(contained: Contained) -> None:
    before = contained.ready()
    os.kill(contained.daemon_pid, signal.SIGKILL)
    wait_for(contained._is_up, 15)
    after = contained.wait_state(before["launch_id"], "ready")
    assert (after["pid"], after["attempt"]) == (before["pid"], 1)


def test_a_stop_ends_everything_in_the_time_a_container_has(contained: Contained) -> None:
    contained.ready(knobs={"ignore_sigterm": True})
    begun = time.monotonic()
    code = contained.stop(timeout_s=RUNTIME_PATIENCE_S)
    assert GRACE_S < time.monotonic() - begun < GRACE_S + BESIDES_S
    assert code == 0
    contained.assert_no_leftovers(timeout_s=1)


def test_a_stop_ends_models_even_when_the_daemon_is_dead(contained: Contained) -> None:
    contained.ready()
    os.kill(contained.daemon_pid, signal.SIGKILL)
    wait_for(contained._is_up, 15)
    os.kill(contained.daemon_pid, signal.SIGKILL)
    wait_for(lambda: "starting it again in 1 s" in contained.log)
    contained.stop(timeout_s=RUNTIME_PATIENCE_S)
    # Files of the last attempt stay for the next daemon; processes and locks do not.
    assert [left for left in contained.leftovers() if not left.endswith("is left")] == []


def test_wrong_settings_end_the_container_instead_of_looping() -> None:
    contained = Contained(command=[sys.executable, container_init.__file__, *SERVE], port="no number")
    try:
        with pytest.raises(AssertionError, match="stopping"):
            contained.start()
        assert contained._process.wait(10) == 2
    finally:
        contained.close()
