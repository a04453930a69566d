"""The image's entry point around a real daemon: models outlive a crash of the daemon, nothing outlives a stop, and the
daemon is nobody who may do much."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

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


NOBODY = 65534
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def python_for_all() -> Iterator[str]:
    """An interpreter that any user can run, with all that the daemon needs; the tests' own may lie in root's home."""
    Path(tempfile.gettempdir()).chmod(0o711)  # the tests' own, removed after them
    folder = Path(tempfile.mkdtemp(prefix="py"))
    folder.chmod(0o755)
    try:
        paths = [str(ROOT), *(path for path in sys.path if "packages" in path)]
        for base in (Path(sys.executable).resolve(), Path("/usr/bin/python3")):
            shutil.rmtree(folder / "venv", ignore_errors=True)
            subprocess.run([base, "-m", "venv", "--without-pip", folder / "venv"], check=False, capture_output=True)
            for packages in folder.glob("venv/lib/python*/site-packages"):
                (packages / "all.pth").write_text("\n".join(paths))
            python = str(folder / "venv/bin/python")
            if Path(python).is_file() and runs(python):
                yield python
                return
        pytest.skip("no interpreter on this machine can be run by another user")
    finally:
        shutil.rmtree(folder)


def runs(python: str) -> bool:
    asked = [python, "-c", "import vllm_bootstrap.app"]
    try:
        return subprocess.run(asked, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", check=False).returncode == 0
    except PermissionError:
        return False


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_the_daemon_serves_as_an_unprivileged_user_with_a_key_of_its_own(python_for_all: str) -> None:
    command = [python_for_all, container_init.__file__, python_for_all, *SERVE[1:]]
    contained = Contained(command=command, env={"DAEMON_USER": "nobody"}, host="0.0.0.0", stop_grace_s=GRACE_S)
    contained.root.chmod(0o711)
    with contained:
        key_file = contained.state_dir / "access_key"
        assert f"a generated one is in {key_file}, 'vllm-bootstrap keys show' prints it" in contained.log
        contained.key = key_file.read_text().strip()
        assert contained.key not in contained.log
        status = contained.ready()
        running = {contained.daemon_pid, status["pid"], status["shim_pid"]}
        assert {Path(f"/proc/{pid}").stat().st_uid for pid in running} == {NOBODY}
        assert {path.stat().st_uid for path in contained.state_dir.rglob("*")} == {NOBODY}
        assert f"gave {contained.state_dir} to nobody" in contained.log
        # What an administrator does by `docker exec`, as root.
        env = {"PATH": os.environ["PATH"], "HOME": "/", "VLLM_BOOTSTRAP_STATE_DIR": str(contained.state_dir)}
        shown = subprocess.run(
            [python_for_all, *SERVE[1:-1], "keys", "show"], env=env, capture_output=True, text=True, check=True
        )
        assert shown.stdout.strip() == contained.key
        listed = subprocess.run(
            [python_for_all, *SERVE[1:-1], "ps", "--json"], env=env, capture_output=True, text=True, check=True
        )
        assert status["launch_id"] in listed.stdout
        assert contained.stop(timeout_s=RUNTIME_PATIENCE_S) == 0
        contained.assert_no_leftovers(timeout_s=1)
