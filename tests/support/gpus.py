"""Short ways to say what GPUs look like."""

from __future__ import annotations

from typing import Any

from vllm_bootstrap.engines.base import Gpu
from vllm_bootstrap.gpus.readings import CPU_UUID, GpuProcess, GpuReading, Snapshot

GIB = 1024**3
TOTAL = 80 * GIB


def gpu(index: int, uuid: str | None = None) -> Gpu:
    return Gpu(uuid or f"GPU-{index}", index, "NVIDIA H200", TOTAL, (9, 0))


def reading(
    index: int, used: float | None = 0, *processes: GpuProcess, unknown: str | None = None, uuid: str | None = None
) -> GpuReading:
    """A GPU with ``used`` GiB in use."""
    used_bytes = None if used is None else int(used * GIB)
    return GpuReading(gpu(index, uuid), used_bytes, processes=processes, unknown=unknown)


def box(*readings: GpuReading, count: int = 0, **fields: Any) -> Snapshot:
    """A host with these GPUs, or with ``count`` idle ones."""
    return Snapshot("cuda", readings or tuple(reading(i) for i in range(count)), **fields)


def cpu_box(slots: int = 1) -> Snapshot:
    return Snapshot("cpu", (GpuReading(Gpu(CPU_UUID, 0, "CPU", TOTAL)),), cpu_slots=slots)


def process(pid: int | None, used: float | None = 1, *, graphics: bool = False, **who: str) -> GpuProcess:
    """A process with ``used`` GiB."""
    return GpuProcess(pid, used_bytes=None if used is None else int(used * GIB), graphics=graphics, **who)
