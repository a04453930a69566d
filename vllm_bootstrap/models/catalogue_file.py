"""The catalogue's file: YAML into plain values, read whole and with care.

Invariant: what the text says twice or in a way that readers take differently is refused, never resolved silently: a
key that stands twice, keys that are no text, anchors and aliases. No tag makes anything but what JSON has. The size is
bounded. Blocking.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from vllm_bootstrap.models.parsing import CatalogueError

MAX_BYTES = 1024 * 1024
_STRING = "tag:yaml.org,2002:str"
_KINDS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map"))
# Read as text: a revision that looks like a day stays what was written.
_NOT_RESOLVED = frozenset({"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:merge"})

Identity = tuple[int, ...]


class _Loader(yaml.SafeLoader):
    """See the module."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            said = "anchors and aliases are not read: what models share stands below 'defaults'"
            raise yaml.composer.ComposerError(None, None, said, mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != _STRING:
                shown = getattr(key, "value", "")
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown!r} is not text: put it in quotes", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands here twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _KINDS
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NOT_RESOLVED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def values_of(text: str) -> Any:
    """The plain values of a YAML text. Raises ``CatalogueError`` naming line and column."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader, stricter still
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise CatalogueError([(where, exc.problem or "not YAML")]) from None
    except yaml.YAMLError as exc:
        raise CatalogueError([("", str(exc).replace("\n", " "))]) from None
    except (RecursionError, ValueError) as exc:
        reason = "nested too deeply" if isinstance(exc, RecursionError) else str(exc)
        raise CatalogueError([("", reason)]) from None


def read(path: Path) -> tuple[Any, Identity]:
    """The values in the file, and which version of it was read. Raises ``CatalogueError`` and ``OSError``."""
    with path.open("rb") as file:
        identity = identity_of(os.fstat(file.fileno()))
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise CatalogueError([("", f"larger than {MAX_BYTES} bytes")])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise CatalogueError([("", f"not UTF-8 at byte {exc.start}")]) from None
    return values_of(text), identity


def identity_of(facts: os.stat_result) -> Identity:
    """What changes whenever the file is written or replaced."""
    return (facts.st_ino, facts.st_dev, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
