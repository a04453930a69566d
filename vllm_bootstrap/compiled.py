"""The compiled twins of the modules that every request goes through, used where they are at hand.

``scripts/compile_modules.py`` makes them from the very sources beside this file, with mypyc: the same code as machine
code, for little more than half of what a request costs. They lie in ``_compiled``, in a folder for each kind of
interpreter.

Invariant: what runs is what the sources say. The twins are used all together or not at all: only if these sources and
all that these build upon are as they were when the twins were made, only if every one of them can be loaded, and only
in a process that has not imported any of them yet. Else the same modules are interpreted. Must not know: what is
compiled, and who asks.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import json
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Manifest:
    """``sources``: fingerprints of what was compiled and of what that builds upon, by path below the package.
    ``files``: of each module to import, and of what they share, the file below the folder and its size in bytes.
    ``made_with``: by which compiler."""

    sources: Mapping[str, str]
    files: Mapping[str, tuple[str, int]]
    made_with: str


def folder(package: Path = PACKAGE) -> Path:
    """Where those for this interpreter lie: what is compiled for another one does not fit."""
    return package / "_compiled" / str(sysconfig.get_config_var("SOABI"))


def fingerprint(source: Path) -> str:
    """By what a source is known; empty for one that cannot be read."""
    try:
        return hashlib.sha256(source.read_bytes()).hexdigest()
    except OSError:
        return ""


def read_manifest(package: Path = PACKAGE) -> Manifest:
    """What was compiled. Raises ``Unusable``."""
    path = folder(package) / MANIFEST
    try:
        told = json.loads(path.read_bytes())
        files = {str(name): (str(file), int(size)) for name, (file, size) in told["files"].items()}
        sources = {str(name): str(known) for name, known in told["sources"].items()}
        return Manifest(sources, files, str(told["made_with"]))
    except FileNotFoundError:
        raise NotCompiled("nothing was compiled for this Python") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
        raise Unusable(f"{path} cannot be read ({type(exc).__name__}: {exc})") from None


def check(manifest: Manifest, package: Path = PACKAGE) -> None:
    """See that the sources have not changed and the files are whole. Raises ``Unusable``."""
    for name, known in manifest.sources.items():
        if fingerprint(package / name) != known:
            raise Unusable(f"{name} has changed since they were compiled")
    for file, size in manifest.files.values():
        path = folder(package) / file
        if not path.is_file() or path.stat().st_size != size:
            raise Unusable(f"{path} is not as it was made")
    if not manifest.sources or not manifest.files:
        raise Unusable("there are none in the manifest")


def use(package: Path = PACKAGE) -> int:
    """Import the twins, now. Returns how many there are; 0: they are in use already. Raises ``Unusable``: then nothing
    has changed. Reads their sources and all that these build upon, which takes milliseconds."""
    if in_use():
        return 0
    manifest = read_manifest(package)
    check(manifest, package)
    early = sorted(name for name in manifest.files if name in sys.modules)
    if early:
        raise Unusable(f"{early[0]} was imported before")
    before = set(sys.modules)
    finder = TwinFinder({name: folder(package) / file for name, (file, _) in manifest.files.items()})
    sys.meta_path.insert(0, finder)
    try:
        for name in manifest.files:
            importlib.import_module(name)
    except Exception as exc:  # noqa: BLE001 - whatever it is, the sources may do without
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:  # what was imported meanwhile may hold on to some of them
            if name in manifest.files or name.partition(".")[0] == PACKAGE.name:
                del sys.modules[name]
        raise Unusable(f"they cannot be loaded ({type(exc).__name__}: {exc})") from None
    return len(manifest.files)


def in_use() -> bool:
    """Whether this process has imported the twins."""
    return any(isinstance(finder, TwinFinder) for finder in sys.meta_path)


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
