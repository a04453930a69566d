"""Models of the catalogue as JSON can hold them, and back. PURE.

Invariant: what an earlier version stored can be read: absent fields get their defaults, fields that are gone are left
out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from vllm_bootstrap.models.types import AdapterEntry, GpuNeed, ModelEntry, Rewrite

_FIELDS = frozenset(field.name for field in fields(ModelEntry))


def to_json(entry: ModelEntry) -> dict[str, Any]:
    """The entry as plain values."""
    values = asdict(entry)
    return {**values, "rewrite": {**values["rewrite"], "strip": sorted(entry.rewrite.strip)}}


def from_json(stored: Mapping[str, Any]) -> ModelEntry:
    """The entry that ``to_json`` made."""
    known = {name: value for name, value in stored.items() if name in _FIELDS}
    rewrite = stored.get("rewrite", {})
    return ModelEntry(
        **{
            **known,
            "aliases": tuple(stored.get("aliases", ())),
            "gpus": _need(stored.get("gpus", {})),
            "rewrite": Rewrite(rewrite.get("defaults", {}), frozenset(rewrite.get("strip", ()))),
            "adapters": tuple(_adapter(one) for one in stored.get("adapters", ())),
        }
    )


def _need(stored: Mapping[str, Any]) -> GpuNeed:
    ids = stored.get("ids")
    return GpuNeed(
        count=stored.get("count"),
        ids=None if ids is None else tuple(ids),
        min_memory=stored.get("min_memory"),
        share=stored.get("share"),
    )


def _adapter(stored: Mapping[str, Any]) -> AdapterEntry:
    return AdapterEntry(stored["name"], stored["source"], tuple(stored.get("aliases", ())))
