"""One catalogue out of its parts: the file's models, those added at run time, uploaded adapters. PURE.

Invariant: the file wins. What was added at run time and clashes with it is left out and said, never mixed in; it is
there again once the clash is gone. Models that can never all be loaded as they say are said, too. What is found by name
is found by one look into a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from vllm_bootstrap.models.types import AdapterEntry, Catalogue, Group, ModelEntry, Rewrite


@dataclass(frozen=True, slots=True)
class Assembled:
    """``by_name``: every name to the model whose engine serves it. ``rewrites`` has only names with something to do.
    ``notes`` say what was left out and why, and what cannot be as it is written."""

    catalogue: Catalogue = field(default_factory=Catalogue)
    by_name: Mapping[str, ModelEntry] = field(default_factory=dict)
    rewrites: Mapping[str, Rewrite] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def assemble(
    base: Catalogue, added: Iterable[ModelEntry], adapters: Callable[[str], Sequence[AdapterEntry]]
) -> Assembled:
    """See the module. ``adapters``: those uploaded for a model."""
    entries, notes = dict(base.entries), list[str]()
    taken = {name for entry in entries.values() for name in entry.served_names}
    for entry in added:
        if twice := taken & set(entry.served_names):
            notes.append(f"the added model {entry.name!r} is left out: {_listed(twice)} is a name of another model now")
        else:
            entries[entry.name] = entry
            taken |= set(entry.served_names)
    for name, entry in entries.items():
        fresh = []
        for adapter in adapters(name):
            if twice := taken & {adapter.name, *adapter.aliases}:
                notes.append(
                    f"the uploaded adapter {adapter.name!r} is left out: {_listed(twice)} is another's name now"
                )
            else:
                fresh.append(adapter)
                taken |= {adapter.name, *adapter.aliases}
        if fresh:
            entries[name] = replace(entry, adapters=(*entry.adapters, *fresh))
    notes += _rivals(base.groups, entries)
    by_name = {name: entry for entry in entries.values() for name in entry.served_names}
    rewrites = {name: entry.rewrite for name, entry in by_name.items() if entry.rewrite != Rewrite()}
    return Assembled(Catalogue(entries, base.groups), by_name, rewrites, tuple(notes))


def _rivals(groups: Iterable[Group], entries: Mapping[str, ModelEntry]) -> list[str]:
    """Of those that are to be loaded at the start and never put away, a group may let only one be loaded."""
    notes = []
    for group in groups:
        staying = [name for name in sorted(group.members) if entries[name].pin and entries[name].preload]
        if not group.together and len(staying) > 1:
            notes.append(
                f"{_listed(staying)} are pinned and preloaded, but the group {group.name!r} lets only one of them be "
                "loaded: the others never will be"
            )
    return notes


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
