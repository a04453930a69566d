"""Short ways to describe what an engine is asked to do."""

from __future__ import annotations

from typing import Any

from vllm_bootstrap.engines.base import EngineContext, Gpu, LaunchSpec, Placement
from vllm_bootstrap.launches.types import LaunchOrder

GIB = 1024**3
KEY = "internal-key-of-this-attempt"
HF_TOKEN = "hub-token-of-the-operator"


class VllmLike:
    """Enough of an engine for ``make_spec``: its name, and that it takes vLLM's flags."""

    name = "vllm"
    takes_vllm_flags = True
    serves_more_names = True


class Other:
    """An engine with options of its own."""

    name = "other"


def order(model: str = "org/model", **fields: Any) -> LaunchOrder:
    return LaunchOrder(model=model, **fields)


def spec(
    model: str = "org/model", *, served: str | None = None, extra: Any = None, env: Any = None, **fields: Any
) -> LaunchSpec:
    return LaunchSpec(model, "vllm", served or model, fields=fields, extra_args=extra or {}, env=env or {})


def cuda(
    count: int = 1, *, capability: tuple[int, int] | None = (9, 0), share: int = 1000, tp: int = 1, pp: int = 1
) -> Placement:
    gpus = tuple(Gpu(f"GPU-{'abcdefgh'[i]}", i + 2, "NVIDIA H200", 141 * GIB, capability) for i in range(count))
    return Placement("cuda", gpus, share, tp, pp)


def cpu() -> Placement:
    return Placement("cpu", (Gpu("cpu", 0, "CPU", 16 * GIB),))


def context(**changes: Any) -> EngineContext:
    values: dict[str, Any] = {
        "launch_id": "l0123456789",
        "attempt": 1,
        "run_dir": "/run/x/l0123456789/1",
        "tmp_dir": "/run/x/l0123456789/1/tmp",
        "uds_path": "/run/x/l0123456789/1/tmp/engine.sock",
        "internal_key": KEY,
        "port": 8101,
        "base_env": {"PATH": "/usr/bin", "HOME": "/root", "LANG": "C.UTF-8"},
        "hf_token": HF_TOKEN,
    }
    return EngineContext(**{**values, **changes})
