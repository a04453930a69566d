#!/usr/bin/env python3
"""Compile the data plane: ``python scripts/compile_modules.py`` (or ``make compiled``).

Makes the twins that ``vllm_bootstrap.compiled`` tells about, with mypyc, which comes with the type checker and needs
types that are right, as they must be here anyway. Takes a C compiler and Python's headers. What was made before from
the same sources is kept. New files lie in a folder of their own; they count from the moment on at which the manifest
names them, so that nobody ever sees a part, and two of these at once do not harm each other.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # where nothing is installed

import code_map  # noqa: E402

from vllm_bootstrap import compiled  # noqa: E402

# Whole packages, and what each request needs of others.
PACKAGES = ("gateway", "scheduler")
MODULES = ("auth/guard.py", "refused.py", "tallies.py")
NOT_COMPILED = {
    "gateway/claims.py": "StrictProtocol inherits from it",
    "gateway/late.py": "inherits from uvicorn's protocol",
    "gateway/protocol.py": "inherits from uvicorn's protocol",
    "gateway/strict.py": "inherits from uvicorn's protocol",
    "gateway/uploads.py": "has an asynchronous generator, which mypyc does not know",
    "scheduler/ports.py": "others inherit from its protocols",
}


LEFT_OVER_S = 600
"""Folders that the manifest does not name are removed once they are so old."""


class CannotCompile(Exception):
    """What is missing, or went wrong."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--package", type=Path, default=ROOT / "vllm_bootstrap", help="the folder vllm_bootstrap of a checkout"
    )
    parser.add_argument("--optional", action="store_true", help="exit with 0 where it cannot be compiled")
    args = parser.parse_args()
    try:
        compile_package(args.package.resolve())
    except (CannotCompile, OSError) as exc:
        print(f"The data plane is not compiled: {exc}. It works without; a request costs nearly twice the CPU time.")
        return 0 if args.optional else 1
    return 0


def compile_package(package: Path) -> None:
    """Raises ``CannotCompile``, ``OSError``."""
    if package.name != "vllm_bootstrap":
        raise CannotCompile(f"{package} is not the folder vllm_bootstrap")
    wanted = modules(package)
    if is_current(package, wanted):
        print(f"The data plane is compiled already ({len(wanted)} modules)")
        return
    check_tools()
    home = compiled.folder(package)
    home.mkdir(parents=True, exist_ok=True)  # before the minute that it takes: perhaps nobody may write here
    print(f"Compiling {len(wanted)} modules of the data plane, once: about a minute on two cores ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="vllm-bootstrap-compile") as scratch:
        sources = fingerprints(package, wanted)  # of what is compiled now: a later edit makes it stale
        made = build(package, wanted, Path(scratch))
        install(made, package, wanted, sources)
    print(f"Compiled into {home}")


def modules(package: Path) -> dict[str, Path]:
    """The sources to compile, by the modules' full names."""
    found = [path for name in PACKAGES for path in sorted((package / name).glob("*.py")) if path.name != "__init__.py"]
    found += [package / name for name in MODULES]
    kept = [path.relative_to(package) for path in found if path.relative_to(package).as_posix() not in NOT_COMPILED]
    return {".".join((package.name, *path.with_suffix("").parts)): package / path for path in kept}


def fingerprints(package: Path, wanted: dict[str, Path]) -> dict[str, str]:
    """Of these sources and all they import, for the types too: machine code relies on what those are."""
    known = code_map.modules(package.parent)
    names = {name.partition(".")[2] for name in wanted}
    left = list(names)
    while left:
        fresh = known[left.pop()].imports - names
        names |= fresh
        left += fresh
    paths = sorted(known[name].path for name in names)
    return {path.relative_to(package).as_posix(): compiled.fingerprint(path) for path in paths}


def compiler() -> str:
    """What compiles: a newer one may make better code of the same sources."""
    try:
        return f"mypy {importlib.metadata.version('mypy')}"
    except importlib.metadata.PackageNotFoundError:
        raise CannotCompile("mypy is not installed") from None


def is_current(package: Path, wanted: dict[str, Path]) -> bool:
    """Whether what there is may stay."""
    try:
        manifest = compiled.read_manifest(package)
        compiled.check(manifest, package)
        made = {name for name in manifest.files if name.partition(".")[0] == package.name}
        return made == wanted.keys() and manifest.made_with == compiler()
    except (compiled.Unusable, CannotCompile):
        return False


def check_tools() -> None:
    compiler()
    cc = str(sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(cc) is None:
        raise CannotCompile(f"there is no C compiler ({cc})")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise CannotCompile("Python's headers are missing (Debian: python3-dev)")
    for module in ("mypyc.build", "setuptools"):
        if subprocess.run([sys.executable, "-c", f"import {module}"], check=False, capture_output=True).returncode:
            raise CannotCompile(f"{module.partition('.')[0]} is not installed")


# Four libraries can be compiled side by side. One for each module could, too, but would cost 10 MB of memory.
BUILD = """
import os, sys
from mypyc.build import mypycify
from setuptools import Distribution
from setuptools.command.build_ext import build_ext
out, *paths = sys.argv[1:]
groups = [(paths[first::4], None) for first in range(4)]
extensions = mypycify(paths, opt_level="2", debug_level="0", separate=groups, target_dir=os.path.join(out, "c"))
command = build_ext(Distribution({"name": "twins", "ext_modules": extensions}))
command.build_lib, command.build_temp = os.path.join(out, "twins"), os.path.join(out, "o")
command.parallel = os.cpu_count()
command.ensure_finalized()
command.run()
"""


def build(package: Path, wanted: dict[str, Path], scratch: Path) -> Path:
    """Compile into a folder below ``scratch``; returns which. In another process, because mypyc exits by itself."""
    paths = [str(path.relative_to(package.parent)) for path in wanted.values()]
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(scratch), *paths],
        cwd=package.parent, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.stderr.write("\n".join(done.stdout.splitlines()[-40:]) + "\n")
        raise CannotCompile("mypyc or the C compiler has failed; what they said is above")
    return scratch / "twins"


def install(made: Path, package: Path, wanted: dict[str, Path], sources: dict[str, str]) -> None:
    """Have the daemon find what was made: the files first, each whole on the disk, then the manifest that names them.
    Raises ``CannotCompile``, ``OSError``; then what was there before still counts."""
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    paths = {path.relative_to(made): path for path in made.rglob(f"*{suffix}")}
    found = {str(below).removesuffix(suffix).replace("/", "."): path for below, path in paths.items()}
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise CannotCompile(f"mypyc made nothing of {missing[0]}")
    home = compiled.folder(package)
    fresh = home / secrets.token_hex(8)
    try:
        files = {}
        for name, path in sorted(found.items()):
            file = fresh / path.relative_to(made)
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, path.read_bytes())
            files[name] = (str(file.relative_to(home)), file.stat().st_size)
        try_to_import({name: home / file for name, (file, _) in files.items()}, package)
        manifest = {"made_with": compiler(), "sources": sources, "files": files}
        draft = fresh / compiled.MANIFEST
        write(draft, json.dumps(manifest, indent=0).encode())
        draft.replace(home / compiled.MANIFEST)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    for other in home.iterdir():  # not what another of these is writing just now, nor what a daemon is just loading
        if other.is_dir() and other != fresh and time.time() - other.stat().st_mtime > LEFT_OVER_S:
            shutil.rmtree(other, ignore_errors=True)


def write(path: Path, data: bytes) -> None:
    """So that it is there after a power cut, too."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def try_to_import(files: dict[str, Path], package: Path) -> None:
    """See that all of it can be imported."""
    program = (
        "import importlib, json, pathlib, sys; sys.path.insert(0, sys.argv[1]); from vllm_bootstrap import compiled;"
        "files = json.loads(sys.argv[2]);"
        "sys.meta_path.insert(0, compiled.TwinFinder({name: pathlib.Path(file) for name, file in files.items()}));"
        "[importlib.import_module(name) for name in files]"
    )
    told = json.dumps({name: str(file) for name, file in files.items()})
    command = [sys.executable, "-c", program, str(package.parent), told]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise CannotCompile("what was compiled cannot be imported; the reason is above")


if __name__ == "__main__":
    sys.exit(main())
