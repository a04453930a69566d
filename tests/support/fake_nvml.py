"""A stand-in for the ``pynvml`` module: GPUs to order, and any call may fail or hang."""

# ruff: noqa: N802 - the functions have the names they have in pynvml
from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

GIB = 1024**3
UNINITIALIZED, NOT_SUPPORTED, DRIVER_NOT_LOADED, FUNCTION_NOT_FOUND, GPU_IS_LOST, UNKNOWN = 1, 3, 9, 13, 15, 999


class FakeError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return {9: "Driver Not Loaded", 15: "GPU is lost", 3: "Not Supported"}.get(self.value, f"error {self.value}")


@dataclass
class FakeGpu:
    uuid: str
    used: int = 0
    reserved: int = GIB // 2
    total: int = 80 * GIB
    mig: int | None = None
    computing: list[tuple[int, int | None]] = field(default_factory=list)
    drawing: list[tuple[int, int | None]] = field(default_factory=list)


class FakeNvml:
    """``fail[name]`` is an error code, or a function of the GPU's UUID (None for calls without one) that returns a
    code or None. ``hang[name]`` is an event the call waits for. ``calls`` counts."""

    NVMLError = FakeError
    NVML_ERROR_NOT_SUPPORTED = NOT_SUPPORTED
    NVML_ERROR_FUNCTION_NOT_FOUND = FUNCTION_NOT_FOUND
    NVML_TEMPERATURE_GPU = 0
    nvmlMemory_v2 = 33554472  # noqa: N815 - the name it has there

    def __init__(self, *gpus: FakeGpu) -> None:
        self.gpus = list(gpus)
        self.fail: dict[str, int | Callable[[str | None], int | None]] = {}
        self.hang: dict[str, threading.Event] = {}
        self.calls: Counter[str] = Counter()
        self.threads: set[str] = set()
        self.initialised = 0
        self.has_v2 = True

    def _enter(self, name: str, gpu: FakeGpu | None = None) -> None:
        self.calls[name] += 1
        self.threads.add(threading.current_thread().name)
        if name in self.hang:
            self.hang[name].wait(30)
        fail = self.fail.get(name)
        code = fail(gpu.uuid if gpu else None) if callable(fail) else fail
        if code is not None:
            raise FakeError(code)
        if not self.initialised and name != "nvmlInit":
            raise FakeError(UNINITIALIZED)

    def nvmlInit(self) -> None:
        self._enter("nvmlInit")
        self.initialised += 1

    def nvmlShutdown(self) -> None:
        self._enter("nvmlShutdown")
        self.initialised -= 1

    def nvmlDeviceGetCount(self) -> int:
        self._enter("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        self._enter("nvmlDeviceGetHandleByIndex", self.gpus[index])
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        self._enter("nvmlDeviceGetUUID", gpu)
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:
        self._enter("nvmlDeviceGetName", gpu)
        return "NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu, version: int | None = None) -> Any:
        self._enter("nvmlDeviceGetMemoryInfo", gpu)
        if version is None:
            return SimpleNamespace(total=gpu.total, used=gpu.used + gpu.reserved)
        if not self.has_v2:
            raise FakeError(FUNCTION_NOT_FOUND)
        return SimpleNamespace(total=gpu.total, used=gpu.used, reserved=gpu.reserved)

    def nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGpu) -> tuple[int, int]:
        self._enter("nvmlDeviceGetCudaComputeCapability", gpu)
        return (9, 0)

    def nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> list[int]:
        self._enter("nvmlDeviceGetMigMode", gpu)
        if gpu.mig is None:
            raise FakeError(NOT_SUPPORTED)
        return [gpu.mig, gpu.mig]

    def nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu) -> Any:
        self._enter("nvmlDeviceGetUtilizationRates", gpu)
        return SimpleNamespace(gpu=37, memory=5)

    def nvmlDeviceGetPowerUsage(self, gpu: FakeGpu) -> int:
        self._enter("nvmlDeviceGetPowerUsage", gpu)
        return 123_400

    def nvmlDeviceGetTemperature(self, gpu: FakeGpu, sensor: int) -> int:
        self._enter("nvmlDeviceGetTemperature", gpu)
        assert sensor == self.NVML_TEMPERATURE_GPU
        return 41

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[Any]:
        self._enter("nvmlDeviceGetComputeRunningProcesses", gpu)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in gpu.computing]

    def nvmlDeviceGetGraphicsRunningProcesses(self, gpu: FakeGpu) -> list[Any]:
        self._enter("nvmlDeviceGetGraphicsRunningProcesses", gpu)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in gpu.drawing]
