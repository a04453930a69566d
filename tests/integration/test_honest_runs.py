"""The checks that keep the test suite honest are themselves tested: skips in CI, and what a run leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import leftovers, skips
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]

CONFTEST = """
from pathlib import Path
from tests.support.skips import SkipList

def pytest_configure(config):
    config.pluginmanager.register(SkipList(Path(__file__).parent / "skips.txt"))
"""
CASE = """
import pytest

@pytest.mark.skip(reason="no browser")
def test_browser(): ...

def test_other(): ...
"""


def run_pytest(folder: Path, listed: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_case.py").write_text(CASE)
    (folder / "skips.txt").write_text(listed)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_case.py"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_a_skip_that_is_not_listed_fails_the_run(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, "")
    assert result.returncode == 1
    assert "not allowed to skip here: test_case.py::test_browser" in result.stdout


def test_a_listed_skip_is_accepted(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, "test_case.py::test_browser  # no screen on this machine\n")
    assert result.returncode == 0, result.stdout


def test_a_listed_skip_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="line 1"):
        skips.parse("tests/test_x.py::test_y\n")


def test_parametrised_ids_are_taken_literally() -> None:
    assert skips.unlisted(["t.py::a[1]", "t.py::a[2]"], {"t.py::a[1]": "why"}) == ["t.py::a[2]"]


def test_the_committed_list_can_be_read() -> None:
    skips.parse((ROOT / "tests" / "skips.txt").read_text())


@pytest.mark.parametrize("how", ["environ", "cwd", "open file"])
def test_a_detached_process_is_found_by_what_it_refers_to(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "mark"
    folder.mkdir()
    env = {k: v for k, v in os.environ.items() if str(tmp_path) not in v}
    with (folder / "held").open("w") as held:
        process = subprocess.Popen(
            ["sleep", "60"],
            env={**env, "SOME_DIR": str(folder / "x")} if how == "environ" else env,
            cwd=folder if how == "cwd" else "/",
            stdout=held if how == "open file" else subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        # For a moment after exec the kernel shows neither command line nor environment.
        found = wait_for(lambda: leftovers.processes_referring_to(folder))
        assert [(left.pid, left.because) for left in found] == [(process.pid, how)]
        leftovers.kill(found)
        assert process.wait(timeout=5) == -9
        assert leftovers.wait_until_none(folder, 5) == []
    finally:
        process.kill()
        process.wait()
