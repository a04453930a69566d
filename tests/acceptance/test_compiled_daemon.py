"""Which form of the data plane a daemon runs: what it says, and that one it cannot use costs nothing but speed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import compile_modules
import pytest

from tests.support.daemon import DaemonProcess
from vllm_bootstrap import compiled

ROOT = Path(__file__).resolve().parents[2]
NOTE = "note: the compiled data plane is not used, a request costs nearly twice the CPU time: "


def form(daemon: DaemonProcess) -> str:
    return str(daemon.request("GET", "/version").json()["data_plane"])


def test_daemons_under_test_run_what_is_tested() -> None:
    with DaemonProcess(access_key="k") as daemon:
        assert form(daemon) == ("compiled" if compiled.in_use() else "interpreted")
        assert NOTE not in daemon.log


def test_what_is_switched_off_is_not_used() -> None:
    with DaemonProcess(access_key="k", compiled=False) as daemon:
        assert form(daemon) == "interpreted"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package at another place, with twins that its sources fit but no machine can load."""
    package = tmp_path / "vllm_bootstrap"
    shutil.copytree(ROOT / "vllm_bootstrap", package, ignore=shutil.ignore_patterns("_compiled", "__pycache__"))
    shutil.copytree(ROOT / "templates", package / "_templates")
    home, wanted = compiled.folder(package), compile_modules.modules(package)
    home.mkdir(parents=True)
    (home / "twin.so").write_bytes(b"no ELF")
    manifest = {
        "made_with": "a test",
        "files": {name: ["twin.so", 6] for name in wanted},
        "sources": compile_modules.fingerprints(package, wanted),
    }
    (home / compiled.MANIFEST).write_text(json.dumps(manifest))
    return package


@pytest.mark.parametrize("harm", ["none can be loaded", "changed"])
def test_one_that_does_not_fit_is_named_and_left_alone(copied: Path, harm: str) -> None:
    said = "they cannot be loaded"
    if harm == "changed":
        said = "gateway/relay.py has changed since they were compiled"
        with (copied / "gateway" / "relay.py").open("a") as source:
            source.write("# one line more\n")
    with DaemonProcess(access_key="k", compiled=True, env={"PYTHONPATH": str(copied.parent)}) as daemon:
        assert NOTE + said in daemon.log
        assert form(daemon) == "interpreted"
        daemon.ready(max_num_seqs=2)
        answer = daemon.request("POST", "/v1/completions", {"model": "sim", "prompt": "one two"})
        assert answer.status == 200
