"""The built wheel, installed somewhere else: it has all it needs, and its page is drawn from its own templates."""

from __future__ import annotations

import ensurepip
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RENDER = """
import json, sys
import vllm_bootstrap
from vllm_bootstrap.api import pages
html = pages.render("dashboard.html", parts="", refused="", version="9.9", typed_fields="")
print(json.dumps({"from": vllm_bootstrap.__file__, "folder": str(pages.folder()), "html": html,
                  "assets": {name: len(asset.content) for name, asset in pages.assets().items()}}))
"""


def run(command: list[str], cwd: Path, **env: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pip() -> list[str]:
    """pip as a command, also where the environment was made without it."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    (bundled,) = (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")
    return [sys.executable, str(bundled / "pip")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)], out)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("elsewhere")
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet"]
    run([*pip(), "install", *options, "--target", str(target), str(wheel)], target)
    return target


def test_the_wheel_holds_every_file_of_the_package_and_all_templates(wheel: Path) -> None:
    package, templates = ROOT / "vllm_bootstrap", ROOT / "templates"
    wanted = {
        f"vllm_bootstrap/{path.relative_to(package)}"
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and "_compiled" not in path.parts
    }
    wanted |= {f"vllm_bootstrap/_templates/{p.relative_to(templates)}" for p in templates.rglob("*") if p.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == wanted


def test_the_page_of_the_installed_package_is_drawn_from_its_own_templates(installed: Path) -> None:
    shown = json.loads(run([sys.executable, "-c", RENDER], installed, PYTHONPATH=str(installed)))
    assert Path(shown["from"]).is_relative_to(installed)
    assert Path(shown["folder"]) == installed / "vllm_bootstrap" / "_templates"
    assert "vllm-bootstrap 9.9" in shown["html"]
    assert set(shown["assets"]) == {path.name for path in (ROOT / "templates" / "assets").iterdir()}


def test_the_command_is_installed(installed: Path) -> None:
    out = run(
        [sys.executable, str(installed / "bin" / "vllm-bootstrap"), "--version"], installed, PYTHONPATH=str(installed)
    )
    assert out.startswith("vllm-bootstrap ")
