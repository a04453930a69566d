"""Keys under which start durations are remembered. PURE: the same launch on the same kind of device, same key."""

from __future__ import annotations

import hashlib
import json

from vllm_bootstrap.engines.base import LaunchSpec, Placement


def args_hash(spec: LaunchSpec) -> str:
    """A short hash of everything that changes how long a start takes, but for model, engine and device."""
    facts = [sorted(spec.fields.items()), sorted(spec.extra_args.items()), sorted(spec.env.items())]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def device_name(placement: Placement) -> str:
    """For example ``2 x NVIDIA H200``."""
    names = sorted({gpu.name for gpu in placement.gpus})
    return f"{len(placement.gpus)} x {', '.join(names)}" if names else placement.kind
