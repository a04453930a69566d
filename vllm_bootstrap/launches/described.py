"""What is stored about a started engine for the next daemon: where it listens, and what it was found to be. PURE.

Invariant: a running engine is described by what was true when it was started. What lies on the disk by now, a newer
vLLM say, is the next attempt's business. No credential is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from vllm_bootstrap.engines.base import Traits
from vllm_bootstrap.serving import Endpoint, EngineRoute

_PLAIN = frozenset(field.name for field in fields(Traits)) - {"routes"}
_ROUTE = frozenset(field.name for field in fields(EngineRoute))


def row_of(endpoint: Endpoint, traits: Traits) -> dict[str, object]:
    """Both as JSON can hold them."""
    shown = {name: value for name, value in asdict(endpoint).items() if name != "credential"}
    routes = [{**asdict(route), "scopes": sorted(route.scopes)} for route in traits.routes]
    return {**shown, "traits": {**asdict(traits), "routes": routes}}


def traits_in(row: Mapping[str, Any] | None, fresh: Traits) -> Traits:
    """The traits that ``row_of`` stored; ``fresh`` where an earlier version stored none, or not all there are now."""
    stored = (row or {}).get("traits")
    if not isinstance(stored, Mapping):
        return fresh
    routes = tuple(
        EngineRoute(**{**{name: route[name] for name in _ROUTE & route.keys()}, "scopes": frozenset(route["scopes"])})
        for route in stored["routes"]
    )
    plain = {name: stored[name] for name in _PLAIN & stored.keys()}
    if "sleep_levels" in plain:
        plain["sleep_levels"] = tuple(plain["sleep_levels"])
    return replace(fresh, routes=routes, **plain)
