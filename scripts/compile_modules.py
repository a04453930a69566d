#!/usr/bin/env python3
"""Compile the data plane: ``python scripts/compile_modules.py`` (or ``make compiled``).

Makes the twins that ``vllm_bootstrap.compiled`` tells about, with mypyc, which comes with the type checker and needs
types that are right, as they must be here anyway. Takes a C compiler and Python's headers. What was made before from
the same sources is kept; what is new replaces the old all at once, and only when all of it could be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # where nothing is installed

from vllm_bootstrap import compiled  # noqa: E402

# Whole packages, and what each request needs of others.
PACKAGES = ("gateway", "scheduler")
MODULES = ("auth/guard.py", "refused.py", "tallies.py")
NOT_COMPILED = {
    "gateway/claims.py": "StrictProtocol inherits from it",
    "gateway/late.py": "inherits from uvicorn's protocol",
    "gateway/protocol.py": "inherits from uvicorn's protocol",
    "gateway/strict.py": "inherits from uvicorn's protocol",
    "scheduler/ports.py": "others inherit from its protocols",
    "gateway/uploads.py": "has an asynchronous generator, which mypyc does not know",
}


class CannotCompile(Exception):
    """What is missing, or went wrong."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--package", type=Path, default=ROOT / "vllm_bootstrap", help="the folder vllm_bootstrap")
    parser.add_argument("--optional", action="store_true", help="exit with 0 where it cannot be compiled")
    args = parser.parse_args()
    try:
        compile_package(args.package.resolve())
    except CannotCompile as exc:
        print(f"The data plane is not compiled: {exc}. It works all the same; a request costs twice the CPU time.")
        return 0 if args.optional else 1
    return 0


def compile_package(package: Path) -> None:
    """Raises ``CannotCompile``."""
    wanted = modules(package)
    home = compiled.folder(package)
    if is_current(home, wanted):
        print(f"The data plane is compiled already ({len(wanted)} modules)")
        return
    check_tools()
    print(f"Compiling {len(wanted)} modules of the data plane, once: about a minute ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="vllm-bootstrap-compile") as scratch:
        made = build(package, wanted, Path(scratch))
        write_manifest(made, package, wanted)
        check(made, package)
        home.parent.mkdir(exist_ok=True)
        fresh = home.with_name(f"{home.name}.{os.getpid()}")
        shutil.copytree(made, fresh)
        shutil.rmtree(home, ignore_errors=True)
        fresh.rename(home)
    print(f"Compiled into {home}")


def modules(package: Path) -> dict[str, Path]:
    """The sources to compile, by the modules' full names."""
    found = [path for name in PACKAGES for path in sorted((package / name).glob("*.py")) if path.name != "__init__.py"]
    found += [package / name for name in MODULES]
    kept = [path.relative_to(package) for path in found if path.relative_to(package).as_posix() not in NOT_COMPILED]
    return {".".join((package.name, *path.with_suffix("").parts)): package / path for path in kept}


def is_current(home: Path, wanted: dict[str, Path]) -> bool:
    try:
        known = json.loads((home / compiled.MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    sources = {name: source for name, (_, source) in known.items() if source is not None}
    whole = all((home / file).is_file() for file, _ in known.values())
    return whole and sources == {name: compiled.fingerprint(path) for name, path in wanted.items()}


def check_tools() -> None:
    cc = str(sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(cc) is None:
        raise CannotCompile(f"there is no C compiler ({cc})")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise CannotCompile("Python's headers are missing (Debian: python3-dev)")
    for module in ("mypyc.build", "setuptools"):
        if subprocess.run([sys.executable, "-c", f"import {module}"], check=False, capture_output=True).returncode:
            raise CannotCompile(f"{module.partition('.')[0]} is not installed")


BUILD = """
import os, sys
from mypyc.build import mypycify
from setuptools import Distribution
from setuptools.command.build_ext import build_ext
out, *paths = sys.argv[1:]
extensions = mypycify(paths, opt_level="2", debug_level="0", separate=True, target_dir=os.path.join(out, "c"))
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


def write_manifest(made: Path, package: Path, wanted: dict[str, Path]) -> None:
    """What ``compiled.use`` reads: for each module its file and its source; what they share has no source."""
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    files = {path.relative_to(made) for path in made.rglob(f"*{suffix}")}
    names = {str(path).removesuffix(suffix).replace("/", "."): path for path in files}
    missing = sorted(wanted.keys() - names.keys())
    if missing:
        raise CannotCompile(f"mypyc made nothing of {missing[0]}")
    manifest = {
        name: (str(path), compiled.fingerprint(wanted[name]) if name in wanted else None)
        for name, path in sorted(names.items())
    }
    (made / compiled.MANIFEST).write_text(json.dumps(manifest, indent=0))
    if package.name != "vllm_bootstrap":
        raise CannotCompile(f"{package} is not the folder vllm_bootstrap")


def check(made: Path, package: Path) -> None:
    """See that all of it can be imported."""
    program = (
        "import json, pathlib, sys, importlib; from vllm_bootstrap import compiled; made = pathlib.Path(sys.argv[1]);"
        "files = {name: made / file for name, (file, _) in json.loads((made / compiled.MANIFEST).read_text()).items()};"
        "sys.meta_path.insert(0, compiled.TwinFinder(files)); [importlib.import_module(name) for name in files]"
    )
    command = [sys.executable, "-c", program, str(made)]
    done = subprocess.run(command, cwd=package.parent, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise CannotCompile("what was compiled cannot be imported; the reason is above")


if __name__ == "__main__":
    sys.exit(main())
