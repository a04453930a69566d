"""The compiled twins of the modules that every request goes through, used where they are at hand.

``scripts/compile_modules.py`` makes them from the very sources beside this file, with mypyc: the same code as machine
code, for half of what a request costs. They lie in ``_compiled``, in a folder for each kind of interpreter.

Invariant: what runs is what the sources say. The twins are used all together or not at all, only if each was made from
its source as it is now, and only in a process that has not imported any of these modules yet. Without them, or with old
ones, the same modules are interpreted. Must not know: what is compiled, and who asks.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
MANIFEST = "manifest.json"


class Unusable(Exception):
    """Why the twins are not used, in words."""


class NotCompiled(Unusable):
    """There are none for this interpreter."""


def folder(package: Path = PACKAGE) -> Path:
    """Where those for this interpreter lie: what is compiled for another one does not fit."""
    return package / "_compiled" / str(sysconfig.get_config_var("SOABI"))


def fingerprint(source: Path) -> str:
    """By what a source is known."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def source_of(name: str, package: Path = PACKAGE) -> Path:
    """The source of a module, by its full name."""
    return package.joinpath(*name.split(".")[1:]).with_suffix(".py")


def use(package: Path = PACKAGE) -> int:
    """From now on import the twins. Returns how many there are; 0: they are in use already. Raises ``Unusable``: then
    nothing has changed. Reads all of their sources, which takes milliseconds."""
    if in_use():
        return 0
    files = _read_manifest(package)
    early = sorted(name for name in files if name in sys.modules)
    if early:
        raise Unusable(f"{early[0]} was imported before")
    sys.meta_path.insert(0, TwinFinder(files))
    return len(files)


def in_use() -> bool:
    """Whether this process imports the twins."""
    return any(isinstance(finder, TwinFinder) for finder in sys.meta_path)


def _read_manifest(package: Path) -> dict[str, Path]:
    """The file of each module that is compiled, checked against its source."""
    home = folder(package)
    try:
        manifest = json.loads((home / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise NotCompiled("nothing was compiled for this Python") from None
    except (OSError, ValueError) as exc:
        raise Unusable(f"{home / MANIFEST} cannot be read: {exc}") from None
    files: dict[str, Path] = {}
    for name, (file, source) in manifest.items():
        if not (home / file).is_file():
            raise Unusable(f"{home / file} is missing")
        if source is not None and not _is_from(source_of(name, package), source):
            raise Unusable(f"{name} has changed since it was compiled")
        files[name] = home / file
    return files


def _is_from(source: Path, known: str) -> bool:
    try:
        return fingerprint(source) == known
    except OSError:
        return False


class TwinFinder(MetaPathFinder):
    """Finds modules in these files before anybody looks for their sources."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the interface's
        target: ModuleType | None = None,  # noqa: ARG002 - the interface's
    ) -> ModuleSpec | None:
        file = self._files.get(fullname)
        if file is None:
            return None
        loader = importlib.machinery.ExtensionFileLoader(fullname, str(file))
        return spec_from_file_location(fullname, file, loader=loader)
