"""The container's init, as an ordinary process (a subreaper) and as pid 1 of a namespace, with stand-in daemons."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import container_init
import pytest

from tests.support import leftovers
from tests.support.waiting import wait_for

SCRIPT = Path(container_init.__file__)

# Stand-ins for the daemon. Each notes its pid first; `orphan` leaves a child that no process waits for.
PRELUDE = """
import os, signal, subprocess, sys, time
folder = sys.argv[1]
starts = open(folder + "/starts", "a"); starts.write(str(os.getpid()) + "\\n"); starts.close()
def orphan(code):
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    open(folder + "/orphans", "a").write(str(child.pid) + "\\n")
"""
OBEDIENT = PRELUDE + "signal.pause()"
STUBBORN = (
    PRELUDE + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen(folder + '/set', 'w')\nwhile True: signal.pause()"
)
CRASHES_ONCE = PRELUDE + "len(open(folder + '/starts').readlines()) < 2 and sys.exit(1)\nsignal.pause()"
LEAVES_ORPHANS = PRELUDE + "orphan('import signal; signal.pause()')\norphan('')\nsignal.pause()"
NOTES_HUP = (
    PRELUDE
    + "signal.signal(1, lambda *_: open(folder + '/hup', 'w'))\nopen(folder + '/set', 'w')\nwhile True: signal.pause()"
)


class Run:
    def __init__(self, folder: Path, program: str, prefix: tuple[str, ...] = ()) -> None:
        self.folder = folder
        daemon = [sys.executable, "-c", program, str(folder)]
        with (folder / "stderr").open("w") as stderr:
            self.process = subprocess.Popen([*prefix, sys.executable, str(SCRIPT), *daemon], stderr=stderr)

    def pids(self, name: str = "starts") -> list[int]:
        path = self.folder / name
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Exit code and how long the stop took, in seconds."""
        begun = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(timeout=15), time.monotonic() - begun


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(program: str, *prefix: str) -> Run:
        run = Run(tmp_path, program, prefix)
        runs.append(run)
        return run

    yield begin
    for run in runs:
        run.process.kill()
        run.process.wait()
    leftovers.kill(leftovers.processes_referring_to(tmp_path))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_goes_to_the_daemon_as_sigterm(start: Callable[..., Run], number: signal.Signals) -> None:
    run = start(OBEDIENT)
    wait_for(run.pids)
    code, took = run.stop(number)
    assert code == 128 + signal.SIGTERM
    assert took < 2
    assert not alive(run.pids()[0])


def test_a_daemon_that_dies_is_started_again_and_the_orphans_live_on(start: Callable[..., Run]) -> None:
    run = start(LEAVES_ORPHANS)
    wait_for(lambda: len(run.pids("orphans")) == 2)
    engine, short = run.pids("orphans")
    os.kill(run.pids()[0], signal.SIGKILL)
    wait_for(lambda: len(run.pids()) == 2)
    assert alive(engine)
    wait_for(lambda: not Path(f"/proc/{short}").exists())  # inherited by the init, ended, reaped: no zombie
    run.stop()
    wait_for(lambda: not alive(engine))
    assert "starting it again in 0.5 s" in (run.folder / "stderr").read_text()


def test_a_crash_by_exit_code_counts_as_death(start: Callable[..., Run]) -> None:
    run = start(CRASHES_ONCE)
    wait_for(lambda: len(run.pids()) == 2)
    assert run.stop()[0] == 128 + signal.SIGTERM


@pytest.mark.parametrize("code", [0, container_init.EXIT_USAGE])
def test_a_wanted_end_and_a_hopeless_configuration_are_final(start: Callable[..., Run], code: int) -> None:
    run = start(PRELUDE + f"sys.exit({code})")
    assert run.process.wait(timeout=10) == code
    assert len(run.pids()) == 1


def test_a_daemon_that_ignores_the_signal_is_killed_within_ten_seconds(start: Callable[..., Run]) -> None:
    run = start(STUBBORN)
    wait_for((run.folder / "set").exists)
    code, took = run.stop()
    assert code == 128 + signal.SIGKILL
    assert took < 10
    assert not alive(run.pids()[0])


def test_hangup_is_passed_on(start: Callable[..., Run]) -> None:
    run = start(NOTES_HUP)
    wait_for((run.folder / "set").exists)
    run.process.send_signal(signal.SIGHUP)
    wait_for((run.folder / "hup").exists)


def test_a_stop_during_the_back_off_is_quick(start: Callable[..., Run]) -> None:
    run = start(PRELUDE + "sys.exit(1)")
    wait_for(lambda: "starting it again in 2 s" in (run.folder / "stderr").read_text())
    code, took = run.stop()
    assert (code, took < 2) == (0, True)


def test_a_missing_program_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    assert result.returncode == 127
    assert "cannot start" in result.stderr


def test_the_back_off_grows_to_a_cap() -> None:
    assert [container_init.backoff(n) for n in (1, 2, 3, 7, 100)] == [0.5, 1, 2, 30, 30]


def test_as_pid_1_of_a_namespace_it_restarts_reaps_and_stops(start: Callable[..., Run], tmp_path: Path) -> None:
    unshare = shutil.which("unshare") or "unshare"
    allowed = subprocess.run([unshare, "--pid", "--fork", "--mount-proc", "true"], capture_output=True, check=False)
    prefix = (unshare, "--pid", "--fork", "--mount-proc", "--kill-child")
    if allowed.returncode != 0:
        prefix = (unshare, "--user", "--map-root-user", *prefix[1:])
        again = subprocess.run([*prefix, "true"], capture_output=True, check=False)
        if again.returncode != 0:
            pytest.skip("this machine does not let us make a pid namespace")
    run = start(LEAVES_ORPHANS + "\n", *prefix)
    wait_for(lambda: len(run.pids("orphans")) == 2)
    assert run.pids()[0] == 2  # its pid inside: it really was a namespace of its own
    (init,) = children_of(run.process.pid)
    daemon = min(children_of(init))
    os.kill(daemon, signal.SIGKILL)
    wait_for(lambda: len(run.pids()) == 2)
    os.kill(init, signal.SIGTERM)
    assert run.process.wait(timeout=15) == 128 + signal.SIGTERM
    wait_for(lambda: not leftovers.processes_referring_to(tmp_path))


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
