"""From names and values to command-line elements, so that a value can never become another option. PURE.

Invariant: an element is ``--flag``, ``--no-flag``, ``--flag=value``, or a value after its list flag that does not
start with a dash. No element holds control characters. Nothing here is ever joined to a shell line.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from vllm_bootstrap.errors import BadRequest

MAX_TEXT = 8192
_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_PARENT = re.compile(r"(?:^|[/\\=,:])\.\.(?:$|[/\\])")
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
# Control, surrogate and unassigned characters, line and paragraph separators. Cf (zero-width joiners, bidi marks) too:
# they make two different names look the same.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"})


def normal_name(given: str, param: str) -> str:
    """The canonical spelling of an option: no dashes in front, dashes inside. Raises ``BadRequest``."""
    name = given.removeprefix("--").replace("_", "-")
    if "." in name:
        base = name.split(".", 1)[0]
        raise BadRequest(f"{given!r}: give an object as the value of {base!r} instead of dotted names.", param=param)
    if not _NAME.fullmatch(name) or len(name) > 100:
        raise BadRequest(f"{given[:100]!r} is not the name of an option.", param=param)
    return name


def plain_text(value: str, param: str, limit: int = MAX_TEXT) -> str:
    """``value`` when nothing in it can hide or break a line. Raises ``BadRequest``."""
    if len(value) > limit:
        raise BadRequest(f"{param} is longer than {limit} characters.", param=param)
    if any(unicodedata.category(char) in _HIDDEN for char in value):
        raise BadRequest(f"{param} holds control or invisible characters.", param=param)
    return value


def safe_name(value: str, param: str) -> str:
    """A model or served name: plain, not empty, no option, no way out of a directory. Raises ``BadRequest``."""
    plain_text(value, param, 512)
    if not value or value != value.strip():
        raise BadRequest(f"{param} must not be empty, nor begin or end with blanks.", param=param)
    if value.startswith("-"):
        raise BadRequest(f"{param} must not start with a dash.", param=param)
    no_parent(value, param)
    return value


def no_parent(value: str, param: str) -> None:
    """Refuse ``..`` as a step of a path."""
    if _PARENT.search(value):
        raise BadRequest(f"{param} must not hold '..' as a part of a path.", param=param)


def word(value: Any, param: str) -> str:
    """A value that is a plain word, neither path nor import path with separators. Raises ``BadRequest``."""
    if not isinstance(value, str) or not _WORD.fullmatch(value):
        raise BadRequest(f"{param} must be a plain word.", param=param)
    return value


def check_value(value: Any, param: str, depth: int = 0) -> None:
    """Refuse values that no command line should hold, at any depth of a JSON value. Raises ``BadRequest``."""
    if depth > 8:
        raise BadRequest(f"{param} is nested too deeply.", param=param)
    if isinstance(value, str):
        plain_text(value, param)
        no_parent(value, param)
    elif isinstance(value, dict):
        for key, inner in value.items():
            plain_text(str(key), param)
            check_value(inner, param, depth + 1)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            check_value(inner, param, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadRequest(f"{param} must be a finite number.", param=param)
    elif value is None and depth == 0:
        raise BadRequest(f"{param} has no value: leave it out instead.", param=param)


def render(flag: str, kind: str, value: Any, param: str) -> list[str]:
    """The elements that give ``flag`` its value, as ``kind`` takes it (see ``capabilities``).

    ``value`` was checked. False turns a toggle off and leaves out a switch. Raises ``BadRequest`` when the value does
    not fit the kind.
    """
    if kind in {"switch", "toggle"}:
        if not isinstance(value, bool):
            raise BadRequest(f"{param} is turned on or off: give true or false.", param=param)
        off = [f"--no-{flag.removeprefix('--')}"] if kind == "toggle" else []
        return [flag] if value else off
    if kind == "optional" and isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, bool):
        raise BadRequest(f"{param} needs a value, not true or false.", param=param)
    if kind == "append":
        return [f"{flag}={_text(item)}" for item in _items(value)]
    if kind == "list":
        return [flag, *_list_items(value, param)]
    return [f"{flag}={_text(value)}"]


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _list_items(value: Any, param: str) -> list[str]:
    texts = [_text(item) for item in _items(value)]
    if not texts or any(not text or text.startswith("-") for text in texts):
        raise BadRequest(f"{param} needs at least one value, and none may be empty or start with a dash.", param=param)
    return texts


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
