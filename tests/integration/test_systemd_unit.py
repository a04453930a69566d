"""The shipped systemd unit: what its text promises. How systemd acts on it was not tried here (no systemd runs)."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_bootstrap.settings import Settings

UNIT = Path(__file__).resolve().parents[2] / "scripts" / "vllm-bootstrap.service"


class Repeated(dict[str, str]):
    """``Environment=`` may be given many times; the values are collected by line."""

    def __setitem__(self, key: str, value: str) -> None:
        super().__setitem__(key, self[key] + value if key in self and isinstance(value, list) else value)


@pytest.fixture(scope="module")
def unit() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, dict_type=Repeated, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text())
    return parser


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KillMode", "process"),  # engines are not signalled
        ("Restart", "always"),
        ("OOMPolicy", "continue"),
        ("Delegate", "yes"),
        ("RuntimeDirectory", "vllm-bootstrap"),
        ("RuntimeDirectoryPreserve", "yes"),  # sockets of running engines outlive a stop
        ("LimitNOFILE", "1048576"),
    ],
)
def test_what_lets_models_outlive_the_daemon(unit: configparser.RawConfigParser, name: str, value: str) -> None:
    assert unit["Service"][name] == value


def test_no_option_gives_the_daemon_a_view_of_files_that_engines_do_not_share(
    unit: configparser.RawConfigParser,
) -> None:
    separating = re.compile(
        r"Private(Tmp|Devices|Mounts|Users)|Protect|ReadOnly|Inaccessible|Root|Temporary|Dynamic|Bind"
    )
    assert [name for name in unit["Service"] if separating.match(name)] == []


def test_its_environment_is_made_of_settings_that_exist(
    unit: configparser.RawConfigParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = dict(line.split("=", 1) for line in unit["Service"]["Environment"].splitlines())
    for name, value in pairs.items():
        monkeypatch.setenv(name, value.replace("%S", "/s").replace("%t", "/r").replace("%C", "/c"))
    settings = Settings()
    assert settings.on_shutdown == "leave"
    assert settings.state_dir == Path("/s/vllm-bootstrap")
    assert settings.runtime_dir == Path("/r/vllm-bootstrap")
    assert settings.hf_home == Path("/c/vllm-bootstrap/huggingface")
    assert str(settings.lock_dir) in unit["Service"]["ExecStartPre"]


def test_systemd_accepts_every_line(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    program = tmp_path / "vllm-bootstrap"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / "vllm-bootstrap.service"
    copy.write_text(re.sub(r"ExecStart=\S+", f"ExecStart={program}", UNIT.read_text()))
    result = subprocess.run(
        [analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False, timeout=60
    )
    complaints = [line for line in (result.stdout + result.stderr).splitlines() if copy.name in line]
    assert complaints == []
