"""The one device of a host without NVIDIA GPUs: ``cpu``, with a number of launches that may share it.

Its memory in use is not reported: it moves with everything else on the machine and says nothing about one launch.
"""

from __future__ import annotations

import os
from pathlib import Path

from vllm_bootstrap.engines.base import Gpu
from vllm_bootstrap.gpus.readings import CPU_UUID, GpuReading, Snapshot, restricted


class CpuInventory:
    kind = "cpu"

    def __init__(self, slots: int = 1, *, allowed: tuple[str, ...] = (), cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        device = GpuReading(Gpu(CPU_UUID, 0, _name(cpuinfo), total))
        self._snapshot = restricted(Snapshot("cpu", (device,), cpu_slots=slots), allowed)

    async def snapshot(self, max_age_s: float = 1.0) -> Snapshot:  # noqa: ARG002 - nothing here ages
        """The device. Never raises, never waits."""
        return self._snapshot

    def close(self) -> None:
        """Nothing to give back."""


def _name(cpuinfo: Path) -> str:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
