"""Which devices does this daemon have, and where are they read from?

Invariant: a host has exactly one kind of device. ``cpu`` means that nothing of NVIDIA is there at all; a driver that is
there and does not answer means ``unknown``, never free and never ``cpu``.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Protocol

from vllm_bootstrap.gpus.cpu import CpuInventory
from vllm_bootstrap.gpus.mock import MockInventory
from vllm_bootstrap.gpus.processes import describe_process, pids_trusted
from vllm_bootstrap.gpus.readings import GpuProcess, GpuReading, Snapshot

__all__ = ["GpuProcess", "GpuReading", "Inventory", "Snapshot", "make_inventory", "nvidia_traces"]

LIBRARY = "libnvidia-ml.so.1"


class Inventory(Protocol):
    """Where device readings come from."""

    async def snapshot(self, max_age_s: float = 1.0) -> Snapshot:
        """All devices this daemon may use, read no longer than ``max_age_s`` before the call. Never raises: what is
        not known says so."""

    def close(self) -> None:
        """Give back what is held. Blocks at most a moment; idempotent."""


def make_inventory(
    mock_devices: int,
    devices: str | None = None,
    allowed: tuple[str, ...] = (),
    cpu_slots: int = 1,
    nvml_timeout_s: float = 5.0,
    *,
    mock_file: Path | None = None,
    root: Path = Path("/"),
) -> Inventory:
    """The inventory of this host. ``devices``: ``mock:N``, ``cuda``, ``cpu``, or None to look; ``allowed``: indices
    and UUIDs the daemon may touch, empty for all. ``root`` is where ``/dev`` and the like are looked for.

    Raises ``ValueError`` for another word in ``devices``. Loads nothing of NVIDIA unless there is a trace of it.
    """
    if mock_devices:
        return MockInventory(mock_devices, allowed=allowed, file=mock_file)
    if devices not in {None, "cuda", "cpu"}:
        raise ValueError(f"VLLM_BOOTSTRAP_DEVICES is {devices!r}: it must be mock:N, cuda or cpu")
    if devices == "cpu" or (devices is None and not nvidia_traces(root)):
        return CpuInventory(cpu_slots, allowed=allowed)
    # Imported here: a host without NVIDIA neither needs this code nor pays its memory.
    from vllm_bootstrap.gpus.nvml import NvmlInventory  # noqa: PLC0415

    return NvmlInventory(
        _load_pynvml,
        allowed=allowed,
        timeout_s=nvml_timeout_s,
        pids_trusted=pids_trusted(),
        describe=describe_process,
    )


def nvidia_traces(root: Path = Path("/")) -> list[str]:
    """What of NVIDIA is on this host: device files, the driver's folder, the library. Empty: nothing at all."""
    found = sorted(str(path) for path in (root / "dev").glob("nvidia*"))
    if (root / "proc/driver/nvidia").exists():
        found.append("/proc/driver/nvidia")
    with contextlib.suppress(OSError):
        if LIBRARY.encode() in (root / "etc/ld.so.cache").read_bytes():
            found.append(LIBRARY)
    return found


def _load_pynvml() -> Any:
    import pynvml  # noqa: PLC0415 - loads ctypes and a large module; runs in the NVML thread

    return pynvml
