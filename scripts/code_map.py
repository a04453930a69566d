"""What the source says about itself, read without importing it: modules, their imports, which of them are pure.

A module declares itself pure by the word ``PURE`` in the first paragraph of its docstring. The architecture test and
the coverage gate both ask here, so that the two can never mean different modules.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vllm_bootstrap"


@dataclass(frozen=True)
class Module:
    """``name`` without the package (``launches.owner``), ``imports`` likewise; ``foreign`` are top-level names that are
    imported when the program runs (not those for the type checker only). ``typing_only`` are the ``imports`` that only
    the type checker follows."""

    name: str
    path: Path
    tree: ast.Module
    pure: bool
    imports: frozenset[str]
    foreign: frozenset[str]
    typing_only: frozenset[str]


def modules(root: Path = ROOT) -> dict[str, Module]:
    """Every module of the package by its short name; the package itself is ``""``."""
    paths = {_name(path.relative_to(root / PACKAGE)): path for path in sorted((root / PACKAGE).rglob("*.py"))}
    return {name: _read(name, path, set(paths)) for name, path in paths.items()}


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read(name: str, path: Path, known: set[str]) -> Module:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    first_paragraph = (ast.get_docstring(tree) or "").split("\n\n", 1)[0]
    ours: set[str] = set()
    at_run_time: set[str] = set()
    foreign: set[str] = set()
    typing_only = _typing_only(tree)
    for node, target in _imported(tree, name, is_package=path.name == "__init__.py"):
        if target == PACKAGE or target.startswith(PACKAGE + "."):
            closest = _closest_module(target[len(PACKAGE) + 1 :], known)
            ours.add(closest)
            if node not in typing_only:
                at_run_time.add(closest)
        elif node not in typing_only:
            foreign.add(target.split(".")[0])
    ours.discard(name)
    pure = "PURE" in first_paragraph
    return Module(name, path, tree, pure, frozenset(ours), frozenset(foreign), frozenset(ours - at_run_time))


def _typing_only(tree: ast.Module) -> set[ast.AST]:
    """All nodes below ``if TYPE_CHECKING:``."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def _imported(tree: ast.Module, name: str, *, is_package: bool) -> list[tuple[ast.AST, str]]:
    found: list[tuple[ast.AST, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                own = [PACKAGE, *name.split(".")] if name else [PACKAGE]
                parent = own[: len(own) - node.level + (1 if is_package else 0)]
                base = ".".join([*parent, base] if base else parent)
            names = [f"{base}.{alias.name}" for alias in node.names] if base.startswith(PACKAGE) else [base]
            found += [(node, target) for target in names]
    return found


def _closest_module(target: str, known: set[str]) -> str:
    """``launches.lifecycle.Event`` is a name inside ``launches.lifecycle``."""
    while target and target not in known:
        target = target.rpartition(".")[0]
    return target
