"""``scripts/run_tests.py --again``: what failed beside others is run once more, alone; what fails again has failed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import run_tests

FINE = "def test_fine(): pass\n"
ONCE = """
from pathlib import Path
def test_once():
    mark = Path(__file__).with_suffix(".mark")
    before, _ = mark.exists(), mark.touch()
    assert before
"""
ALWAYS = "def test_always(): assert not 1\n"

pytestmark = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="with one core all tests run in one process")


def project(folder: Path, *unsteady: str) -> Path:
    (folder / "scripts").mkdir()
    shutil.copy(run_tests.__file__, folder / "scripts")
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -q -p no:cacheprovider\n")
    for number, kind in enumerate(("acceptance", "integration", "unit")):
        tests = folder / "tests" / kind
        tests.mkdir(parents=True)
        for half in (1, 2):
            (tests / f"test_{kind}{half}.py").write_text(FINE)
        for name in unsteady[number : number + 1]:
            (tests / f"test_{kind}1.py").write_text(FINE + name)
    return folder


def ran(folder: Path, *arguments: str) -> tuple[int, list[str]]:
    command = [sys.executable, "scripts/run_tests.py", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, done.stdout.splitlines()


def test_what_passes_alone_is_named_and_passes(tmp_path: Path) -> None:
    code, lines = ran(project(tmp_path, ONCE, "", ONCE), "--again", "2")
    unsteady = [line.split(":")[0] for line in lines if line.startswith("UNSTEADY")]
    assert unsteady == ["UNSTEADY tests/acceptance/test_acceptance1.py", "UNSTEADY tests/unit/test_unit1.py"]
    assert code == 0
    assert lines[-1].startswith("8 passed in ")


def test_what_fails_again_has_failed(tmp_path: Path) -> None:
    code, lines = ran(project(tmp_path, ONCE, ALWAYS), "--again", "2")
    assert code == 1
    assert lines[-1].startswith("1 failed, 7 passed in ")


def test_more_failures_than_that_and_none_is_run_again(tmp_path: Path) -> None:
    code, lines = ran(project(tmp_path, ONCE, ONCE, ONCE), "--again", "2")
    assert code == 1
    assert lines[-1].startswith("3 failed, 6 passed in ")


def test_without_being_asked_nothing_is_run_again(tmp_path: Path) -> None:
    code, lines = ran(project(tmp_path, ONCE))
    assert code == 1
    assert lines[-1].startswith("1 failed, 6 passed in ")
