"""What the repository as a whole promises: its top level, and what must never be in a tracked file."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

TOP_LEVEL = [
    "vllm_bootstrap", "templates", "docs", "tests", "bench", "config", "scripts", "Makefile", "Dockerfile",
    "runtime/Dockerfile", "docker-compose.yml", ".dockerignore", ".github/workflows/release.yml",
    "pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", ".env.example", ".env.vllm.example",
    ".ci/run", ".github/workflows/ci.yml", "requirements.lock", "requirements-dev.lock", "requirements-build.lock",
]  # fmt: skip

MAKE_TARGETS = [
    "run", "server", "test", "test-vllm", "check", "lint-verify", "validate", "demo", "bench", "bench-proxy", "lock",
    "clean", "help",
]  # fmt: skip

# Spelled in two parts, so that this file passes its own test.
REGISTRIES = [
    "py" + "pi.org",
    "python" + "hosted",
    "npm" + "js.org",
    "deb.deb" + "ian.org",
    "download.py" + "torch.org",
]
MACHINE_PATHS = [r"/wo" + r"rk/(main|shared)", r"/tmp/l" + r"ab\b", r"/ro" + r"ot/\.", r"/opt/py" + r"pi"]
LOCK_OPTIONS = ["--index" + "-url", "--extra-index" + "-url", "--find" + "-links", "--trusted" + "-host"]


def tracked() -> list[Path]:
    """Files git knows or would add; every file where this is not a git checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = listed.stdout.split("\0") if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    return [path for name in names if name and (path := ROOT / name).is_file()]


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_the_top_level_is_complete(name: str) -> None:
    assert (ROOT / name).exists()


def test_no_file_names_a_package_registry_or_a_machine() -> None:
    found = []
    pattern = re.compile("|".join([*map(re.escape, REGISTRIES), *MACHINE_PATHS]))
    for path in tracked():
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in pattern.finditer(text_of(path))]
    assert found == []


def test_uv_lock_is_ignored_and_not_tracked() -> None:
    assert "uv.lock" in (ROOT / ".gitignore").read_text().splitlines()
    assert not [path for path in tracked() if path.name == "uv.lock"]


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock", "requirements-build.lock"])
def test_locks_pin_by_hash_and_name_no_index(name: str) -> None:
    text = text_of(ROOT / name)
    entries = re.split(r"\n(?=\S)", text.strip())
    assert entries
    for entry in entries:
        assert re.match(r"[a-z0-9._-]+(\[[a-z,]+\])?==\S+", entry), entry
        assert "--hash=sha256:" in entry
    assert not any(option in text for option in LOCK_OPTIONS)


def test_locks_contain_what_the_project_asks_for() -> None:
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))
    runtime, dev = locked("requirements.lock"), locked("requirements-dev.lock")
    assert {name_of(line) for line in project["project"]["dependencies"]} <= runtime.keys()
    assert {name_of(line) for line in project["dependency-groups"]["dev"] if isinstance(line, str)} <= dev.keys()
    assert {name: dev.get(name) for name in runtime} == runtime, "tests must run what the image installs"
    assert locked("requirements-build.lock").items() <= dev.items()


def locked(name: str) -> dict[str, str]:
    return dict(re.findall(r"(?m)^([a-z0-9._-]+)(?:\[[a-z,]+\])?==(\S+)", text_of(ROOT / name)))


def name_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def test_make_has_the_documented_targets() -> None:
    known = set(re.findall(r"(?m)^([a-z][a-z -]*):", text_of(ROOT / "Makefile")))
    assert {name for names in known for name in names.split()} >= set(MAKE_TARGETS)


SCRIPTS = [".ci/run", *(f"scripts/{name}.sh" for name in ("make_venv", "build_image", "run_image", "smoke_test"))]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_be_executed(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)


@pytest.mark.parametrize("name", ["Dockerfile", "runtime/Dockerfile"])
def test_scripts_in_the_image_are_let_through_to_the_docker_build(name: str) -> None:
    allowed = {line[1:].rstrip("/") for line in text_of(ROOT / ".dockerignore").splitlines() if line.startswith("!")}
    for line in text_of(ROOT / name).splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            assert set(line.split()[1:-1]) <= allowed, line
