"""The NVIDIA GPUs of this host through NVML, keyed by UUID.

Invariants: NVML is called in a thread of its own only, with a time limit on each call; whatever fails makes one GPU or
all of them ``unknown``, never free; after any failure NVML is initialised anew. GPUs once seen stay in the snapshot,
as unknown, until the daemon ends, because launches may own them.

MIG is not supported: a GPU in MIG mode is reported as unknown and says so. Knows nothing of launches and claims.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from vllm_bootstrap.engines.base import Gpu
from vllm_bootstrap.gpus.readings import GpuProcess, GpuReading, Snapshot, restricted
from vllm_bootstrap.gpus.timed import Step, StepTimeout, TimedThread

log = logging.getLogger(__name__)

Describe = Callable[[int], tuple[str | None, str | None]]
MIG_ON = "MIG mode is on and MIG devices are not supported: switch it off, or leave this GPU out of VLLM_BOOTSTRAP_GPUS"
GONE = "it is not listed any more; restart the daemon if it was removed on purpose"


class NvmlInventory:
    """``load`` returns the ``pynvml`` module; it is called in the NVML thread. ``describe`` names a process id and is
    asked only if ``pids_trusted``."""

    kind = "cuda"

    def __init__(
        self,
        load: Callable[[], Any],
        *,
        allowed: tuple[str, ...] = (),
        timeout_s: float = 5.0,
        pids_trusted: bool,
        describe: Describe,
    ) -> None:
        self._load, self._allowed, self._pids_trusted = load, allowed, pids_trusted
        self._describe = describe if pids_trusted else None
        self._thread = TimedThread("nvml", timeout_s)
        self._reader: NvmlReader | None = None
        self._known: dict[str, Gpu] = {}
        self._last: tuple[float, Snapshot] | None = None
        self._lock = asyncio.Lock()

    async def snapshot(self, max_age_s: float = 1.0) -> Snapshot:
        """All GPUs, from a reading that began at most ``max_age_s`` before this call. Never raises.

        Takes as long as NVML takes, at most the time limit for each of its calls.
        """
        wanted_since = time.monotonic() - max_age_s
        async with self._lock:
            if self._last is None or self._last[0] < wanted_since:
                begun = time.monotonic()
                snapshot = await self._read()
                self._report_changes(snapshot)
                self._last = (begun, snapshot)
            return self._last[1]

    def close(self) -> None:
        """Shut NVML down and end its thread. Blocks for a moment; idempotent."""
        self._thread.close()

    async def _read(self) -> Snapshot:
        reader = self._reader = self._reader or NvmlReader(self._load, self._describe)
        known = dict(self._known)
        try:
            readings = await self._thread.run(lambda step: reader.read(step, known))
        except (StepTimeout, NvmlTrouble) as exc:
            if isinstance(exc, StepTimeout):
                self._reader = None  # it belongs to the thread that hangs
            return self._compose((), str(exc))
        except Exception as exc:
            log.exception("reading the GPUs failed in an unexpected way")
            return self._compose((), f"reading them failed: {exc!r}")
        self._known.update({reading.gpu.uuid: reading.gpu for reading in readings if reading.gpu.uuid})
        return self._compose(readings, None)

    def _compose(self, readings: Iterable[GpuReading], trouble: str | None) -> Snapshot:
        """The readings, and every GPU seen earlier that is not among them, as unknown."""
        named = {reading.gpu.uuid: reading for reading in readings if reading.gpu.uuid}
        lost = {reading.gpu.index: reading for reading in readings if not reading.gpu.uuid}
        for uuid, gpu in self._known.items():
            if uuid not in named:
                # A reading that failed before it told its UUID most likely speaks of the GPU last seen at its index.
                failed = lost.pop(gpu.index, None)
                named[uuid] = GpuReading(gpu, unknown=trouble or (failed.unknown if failed else GONE))
        for index, reading in lost.items():
            gpu = replace(reading.gpu, uuid=f"unknown-{index}")
            named[gpu.uuid] = replace(reading, gpu=gpu)
        snapshot = Snapshot("cuda", tuple(named.values()), trouble, self._pids_trusted)
        return restricted(snapshot, self._allowed)

    def _report_changes(self, new: Snapshot) -> None:
        before = _troubles(self._last[1]) if self._last is not None else {}
        after = _troubles(new)
        for name, reason in after.items():
            if before.get(name) != reason:
                log.warning("%s cannot be judged: %s", name, reason)
        for name in before.keys() - after.keys():
            log.info("%s can be judged again", name)


def _troubles(snapshot: Snapshot) -> dict[str, str]:
    if snapshot.unknown is not None:
        return {"the GPUs": snapshot.unknown}
    return {f"GPU {r.gpu.index} ({r.gpu.uuid})": r.unknown for r in snapshot.gpus if r.unknown is not None}


class NvmlTrouble(Exception):
    """A call into NVML failed; the message names the call and what NVML said."""


class NvmlReader:
    """Reads all GPUs, in the NVML thread. Keeps NVML initialised between readings until something fails."""

    def __init__(self, load: Callable[[], Any], describe: Describe | None) -> None:
        self._load, self._describe = load, describe
        self._nvml: Any = None
        self._step: Step = lambda _: None
        self._is_initialised = False

    def read(self, step: Step, known: Mapping[str, Gpu]) -> tuple[GpuReading, ...]:
        """One reading for each GPU; its UUID is empty where not even that could be read. Raises ``NvmlTrouble``."""
        self._step = step
        try:
            self._initialise()
            count = self._call("nvmlDeviceGetCount")
        except NvmlTrouble:
            self._shut_down()
            raise
        readings = tuple(self._gpu(index, known) for index in range(count))
        if any(reading.unknown not in {None, MIG_ON} for reading in readings):
            self._shut_down()  # handles may be stale: begin anew next time
        return readings

    def _initialise(self) -> None:
        if self._nvml is None:
            self._step("loading NVML")
            try:
                self._nvml = self._load()
            except ImportError as exc:
                raise NvmlTrouble(f"the Python package nvidia-ml-py is not usable: {exc}") from exc
        if not self._is_initialised:
            self._call("nvmlInit")
            self._is_initialised = True

    def _shut_down(self) -> None:
        if self._is_initialised:
            self._is_initialised = False
            try:
                self._call("nvmlShutdown")
            except NvmlTrouble as exc:
                log.debug("%s", exc)  # it is broken already; the next nvmlInit tells

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self._step(name)
        try:
            return getattr(self._nvml, name)(*args, **kwargs)
        except self._nvml.NVMLError as exc:
            raise NvmlTrouble(f"{name}: {exc}") from exc

    def _optional(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The answer, or None where this GPU or driver does not have it. Any other failure counts."""
        try:
            return self._call(name, *args, **kwargs)
        except NvmlTrouble as exc:
            missing = {self._nvml.NVML_ERROR_NOT_SUPPORTED, self._nvml.NVML_ERROR_FUNCTION_NOT_FOUND}
            if getattr(exc.__cause__, "value", None) in missing:
                return None
            raise

    def _gpu(self, index: int, known: Mapping[str, Gpu]) -> GpuReading:
        gpu = Gpu("", index, f"GPU {index}", 0)
        try:
            handle = self._call("nvmlDeviceGetHandleByIndex", index)
            uuid = self._call("nvmlDeviceGetUUID", handle)
            gpu = replace(known[uuid], index=index) if uuid in known else replace(gpu, uuid=uuid)
            return self._reading(gpu, handle)
        except NvmlTrouble as exc:
            return GpuReading(gpu, unknown=str(exc))

    def _reading(self, gpu: Gpu, handle: Any) -> GpuReading:
        memory = self._optional("nvmlDeviceGetMemoryInfo", handle, version=self._nvml.nvmlMemory_v2)
        if memory is None:
            memory = self._call("nvmlDeviceGetMemoryInfo", handle)
        gpu = Gpu(
            uuid=gpu.uuid,
            index=gpu.index,
            name=self._call("nvmlDeviceGetName", handle),
            total_bytes=memory.total,
            capability=self._optional("nvmlDeviceGetCudaComputeCapability", handle),
        )
        mig = self._optional("nvmlDeviceGetMigMode", handle)
        if mig is not None and mig[0]:
            return GpuReading(gpu, memory.used, unknown=MIG_ON)
        utilization = self._optional("nvmlDeviceGetUtilizationRates", handle)
        power_mw = self._optional("nvmlDeviceGetPowerUsage", handle)
        return GpuReading(
            gpu,
            used_bytes=memory.used,
            utilization=None if utilization is None else utilization.gpu / 100,
            temperature_c=self._optional("nvmlDeviceGetTemperature", handle, self._nvml.NVML_TEMPERATURE_GPU),
            power_w=None if power_mw is None else power_mw / 1000,
            processes=self._processes(handle),
        )

    def _processes(self, handle: Any) -> tuple[GpuProcess, ...]:
        computing = self._optional("nvmlDeviceGetComputeRunningProcesses", handle) or []
        drawing = self._optional("nvmlDeviceGetGraphicsRunningProcesses", handle) or []
        pids = {process.pid for process in computing}
        found = [self._process(process, graphics=False) for process in computing]
        found += [self._process(process, graphics=True) for process in drawing if process.pid not in pids]
        return tuple(found)

    def _process(self, process: Any, *, graphics: bool) -> GpuProcess:
        if self._describe is None:  # the number means another process here, or none
            return GpuProcess(None, used_bytes=process.usedGpuMemory, graphics=graphics)
        self._step(f"naming process {process.pid}")
        user, name = self._describe(process.pid)
        return GpuProcess(process.pid, user, name, process.usedGpuMemory, graphics)
