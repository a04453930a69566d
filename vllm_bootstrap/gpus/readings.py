"""What was seen on the GPUs at one moment. PURE values, made by the inventories and judged by placement and settling.

Invariant: "unknown" is said, never guessed. A reading whose ``unknown`` is set proves nothing about the GPU, least of
all that it is free. Nothing here knows where the numbers come from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vllm_bootstrap.engines.base import Gpu

DeviceKind = Literal["cuda", "mock", "cpu"]
CPU_UUID = "cpu"


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds GPU memory. ``pid``, ``user`` and ``name`` are None where they cannot be trusted (another
    pid namespace); ``used_bytes`` is None where the driver does not say. ``graphics``: it only draws."""

    pid: int | None
    user: str | None = None
    name: str | None = None
    used_bytes: int | None = None
    graphics: bool = False


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU at one moment. ``unknown`` says why nothing may be concluded; the other values are then None or old.

    ``utilization`` is 0 to 1. Memory in bytes, without what the driver reserves for itself where it says so.
    """

    gpu: Gpu
    used_bytes: int | None = None
    utilization: float | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    processes: tuple[GpuProcess, ...] = ()
    unknown: str | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All devices the daemon may use, in index order.

    ``unknown`` is set when no device can be judged at all (NVML does not answer). ``pids_trusted``: process ids mean
    what they mean on this host. ``cpu_slots``: launches that may share the ``cpu`` device.
    """

    kind: DeviceKind
    gpus: tuple[GpuReading, ...] = ()
    unknown: str | None = None
    pids_trusted: bool = True
    cpu_slots: int = 1

    def reading(self, uuid: str) -> GpuReading | None:
        """The reading of one GPU, None when the daemon may not use it or never saw it."""
        return next((r for r in self.gpus if r.gpu.uuid == uuid), None)


def restricted(snapshot: Snapshot, allowed: tuple[str, ...]) -> Snapshot:
    """The snapshot limited to ``allowed`` (indices and UUIDs, empty for all), in index order.

    A driver that answers but leaves no GPU to use is not believed: that is said as ``unknown``.
    """
    wanted = {entry.lower() for entry in allowed}
    readings = sorted(snapshot.gpus, key=lambda r: r.gpu.index)
    kept = [r for r in readings if not wanted or str(r.gpu.index) in wanted or r.gpu.uuid.lower() in wanted]
    unknown = snapshot.unknown
    if not kept and unknown is None:
        here = ", ".join(f"{r.gpu.index} ({r.gpu.uuid})" for r in readings) or "none"
        unknown = "the driver answers, but names no GPU"
        if allowed:
            unknown = f"VLLM_BOOTSTRAP_GPUS allows {', '.join(allowed)}, but this host has: {here}"
    return replace(snapshot, gpus=tuple(kept), unknown=unknown)
