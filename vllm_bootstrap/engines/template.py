"""Command lines from templates, argument by argument, never through a shell. PURE.

A template element is text with ``{placeholders}``, or a list of such texts that is left out as a whole when one of its
placeholders has no value. ``{{`` and ``}}`` stand for braces. A value can only ever be a part of its own argument.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from vllm_bootstrap.errors import BadRequest

Element = str | tuple[str, ...]

_TOKEN = re.compile(r"\{\{|\}\}|\{([a-z_]+)\}|[{}]")


class TemplateError(ValueError):
    """A template that cannot be read. The message says why."""


def placeholders(text: str) -> frozenset[str]:
    """The names used in one text. Raises ``TemplateError`` for a stray brace."""
    names = set()
    for match in _TOKEN.finditer(text):
        if match[1] is not None:
            names.add(match[1])
        elif match[0] in {"{", "}"}:
            raise TemplateError(f"{text!r} has a stray {match[0]!r}: double it, or name a placeholder in braces")
    return frozenset(names)


def all_placeholders(elements: Iterable[Element]) -> frozenset[str]:
    texts = (text for element in elements for text in ([element] if isinstance(element, str) else element))
    return frozenset().union(*(placeholders(text) for text in texts))


def fill(text: str, values: Mapping[str, str]) -> str:
    """``text`` with its placeholders replaced. Raises ``KeyError`` for one without a value."""

    def replacement(match: re.Match[str]) -> str:
        return match[0][0] if match[1] is None else values[match[1]]

    return _TOKEN.sub(replacement, text)


def build(elements: Sequence[Element], values: Mapping[str, str]) -> list[str]:
    """The arguments. Raises ``BadRequest`` naming a placeholder that the launch must give and did not."""
    out: list[str] = []
    for element in elements:
        group = (element,) if isinstance(element, str) else element
        missing = all_placeholders(group) - values.keys()
        if not missing:
            out += [fill(text, values) for text in group]
        elif isinstance(element, str):
            name = min(missing)
            raise BadRequest(f"This engine needs {name}: give it in the launch.", param=name)
    return out
