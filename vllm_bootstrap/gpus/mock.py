"""Mock GPUs: everything but the hardware, for trying things out and for tests of a whole daemon.

Nothing uses their memory unless a test says so, in the process by ``set_used`` and the like, or from outside by a
JSON file that is read for every snapshot::

    {"used": {"GPU-mock-0": 1000}, "processes": [{"uuid": "GPU-mock-0", "pid": 7, "used_bytes": 1000}],
     "fail": "init", "order": ["GPU-mock-1", "GPU-mock-0"], "pids_trusted": false}

``fail`` is ``init`` or ``count`` (nothing can be judged), or another call (``handle``, ``memory``, ``processes``,
``utilization``: no GPU can be judged), or ``{"call": "memory", "uuids": [...]}`` (those cannot). ``order`` gives the
indices. A file that is missing changes nothing; one that cannot be read makes everything unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_bootstrap.engines.base import Gpu
from vllm_bootstrap.gpus.readings import GpuProcess, GpuReading, Snapshot, restricted

TOTAL_BYTES = 80 * 1024**3
FAILS_FOR_ALL = ("init", "count")


@dataclass(frozen=True, slots=True)
class MockState:
    """What is wrong or in use. ``fail`` and the others mean what they mean in the file."""

    used: Mapping[str, int] = field(default_factory=dict)
    processes: Sequence[Mapping[str, Any]] = ()
    fail: str | Mapping[str, Any] | None = None
    order: Sequence[str] | None = None
    pids_trusted: bool = True


class MockInventory:
    kind = "mock"

    def __init__(self, count: int, *, allowed: tuple[str, ...] = (), file: Path | None = None) -> None:
        self._gpus = {
            uuid: Gpu(uuid, index, "Mock GPU", TOTAL_BYTES, (9, 0))
            for index, uuid in enumerate(f"GPU-mock-{number}" for number in range(count))
        }
        self._allowed, self._file = allowed, file
        self.state = MockState()

    async def snapshot(self, max_age_s: float = 1.0) -> Snapshot:  # noqa: ARG002 - always fresh
        """The mock GPUs as they are told to look. Never raises."""
        try:
            return self._look(self._from_file())
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as exc:
            return self._all_unknown(f"{self._file} cannot be used: {exc!r}")

    def _look(self, state: MockState) -> Snapshot:
        if state.fail in FAILS_FOR_ALL:
            return self._all_unknown(f"mock {state.fail} fails")
        gpus = [self._gpus[uuid] for uuid in state.order or self._gpus if uuid in self._gpus]
        readings = tuple(_reading(replace(gpu, index=index), state) for index, gpu in enumerate(gpus))
        return restricted(Snapshot("mock", readings, pids_trusted=state.pids_trusted), self._allowed)

    def close(self) -> None:
        """Nothing to give back."""

    def set_used(self, uuid: str, used_bytes: int) -> None:
        """Let a GPU show so much memory in use."""
        self.state = replace(self.state, used={**self.state.used, uuid: used_bytes})

    def set_processes(self, *processes: Mapping[str, Any]) -> None:
        """Let these processes be seen: ``uuid`` and the fields of ``GpuProcess``."""
        self.state = replace(self.state, processes=processes)

    def set_fail(self, fail: str | Mapping[str, Any] | None) -> None:
        """Let a call fail, or None: let it work again."""
        self.state = replace(self.state, fail=fail)

    def set_order(self, *uuids: str) -> None:
        """Give the GPUs other indices."""
        self.state = replace(self.state, order=uuids)

    def _from_file(self) -> MockState:
        if self._file is None:
            return self.state
        try:
            stored = json.loads(self._file.read_text())
        except FileNotFoundError:
            return self.state
        return replace(self.state, **stored)

    def _all_unknown(self, reason: str) -> Snapshot:
        readings = tuple(GpuReading(gpu, unknown=reason) for gpu in self._gpus.values())
        return restricted(Snapshot("mock", readings, unknown=reason), self._allowed)


def _reading(gpu: Gpu, state: MockState) -> GpuReading:
    fail = state.fail
    if isinstance(fail, str):
        fail = {"call": fail}
    if fail is not None and gpu.uuid in fail.get("uuids", [gpu.uuid]):
        return GpuReading(gpu, unknown=f"mock {fail['call']} fails")
    fields = [{**process} for process in state.processes if process.get("uuid") == gpu.uuid]
    processes = tuple(GpuProcess(**{k: v for k, v in each.items() if k != "uuid"}) for each in fields)
    if not state.pids_trusted:
        processes = tuple(replace(process, pid=None, user=None, name=None) for process in processes)
    used = state.used.get(gpu.uuid, 0)
    return GpuReading(gpu, used, used / TOTAL_BYTES, 40, 100.0, processes)
