"""When is a dead launch's GPU really free? Baselines before spawn, settling after death, unsettled GPUs rechecked.

Invariant: a GPU whose memory has not come back near its baseline is never given out; after a time limit it is marked
unsettled, with the reason, and the launch ends anyway. What counts as back is decided in ``gpus.settle``; this module
brings readings, clock and database to it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from vllm_bootstrap.engines.base import Placement
from vllm_bootstrap.gpus import settle
from vllm_bootstrap.gpus.inventory import Inventory, Snapshot
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.launches.durably import durably
from vllm_bootstrap.launches.store import LaunchStore

POLL_S = 0.5
RECHECK_S = 5.0


class GpuUse(NamedTuple):
    """``used_bytes`` None: unreadable. ``others_milli``: shares of other launches, ``others_bytes``: what those use
    that sleep there."""

    used_bytes: int | None
    others_milli: int
    others_bytes: int


class GpuRelease:
    """``unsettled``: UUID to reason, of GPUs that may not be given out although nobody owns them."""

    def __init__(
        self, inventory: Inventory, ledger: Ledger, store: LaunchStore, *, timeout_s: float, tolerance_bytes: int
    ) -> None:
        self._inventory, self._ledger, self._store = inventory, ledger, store
        self._timeout_s, self._tolerance_bytes = timeout_s, tolerance_bytes
        self._baselines: dict[str, int] = {}
        self.unsettled: dict[str, str] = {}

    def restore(self, rows: Mapping[str, tuple[int, str]]) -> None:
        """Take over what an earlier daemon had marked: ``uuid -> (baseline bytes, reason)``."""
        self._baselines = {uuid: baseline for uuid, (baseline, _) in rows.items()}
        self.unsettled = {uuid: reason for uuid, (_, reason) in rows.items()}

    async def measure(self, launch_id: str, placement: Placement) -> dict[str, int]:
        """What is in use on each GPU before a start and is not ours to give back; unreadable GPUs are left out."""
        used = await self._used()
        return {
            gpu.uuid: settle.baseline(
                used[gpu.uuid],
                others_milli=self._others(gpu.uuid, launch_id),
                total_bytes=gpu.total_bytes,
                residue_bytes=self._ledger.residue_bytes(gpu.uuid, without=launch_id),
            )
            for gpu in placement.gpus
            if gpu.uuid in used
        }

    async def settle(self, launch_id: str, placement: Placement, baseline: Mapping[str, int]) -> tuple[str, ...]:
        """Wait until memory is back on every GPU that has a baseline; returns those that were given up."""
        began = time.monotonic()
        waiting = {gpu.uuid: gpu for gpu in placement.gpus if gpu.uuid in baseline}
        given_up: list[str] = []
        while waiting:
            used = await self._used()
            for uuid, gpu in list(waiting.items()):
                found = settle.judge(
                    baseline[uuid],
                    used.get(uuid),
                    tolerance_bytes=self._tolerance_bytes,
                    elapsed_s=time.monotonic() - began,
                    timeout_s=self._timeout_s,
                    others_milli=self._others(uuid, launch_id),
                    total_bytes=gpu.total_bytes,
                    residue_bytes=self._ledger.residue_bytes(uuid, without=launch_id),
                )
                if found.verdict is settle.Verdict.WAITING:
                    continue
                del waiting[uuid]
                if found.verdict is settle.Verdict.UNSETTLED:
                    await self._mark(uuid, baseline[uuid], f"launch {launch_id}: {found.reason}")
                    given_up.append(uuid)
            if waiting:
                await asyncio.sleep(POLL_S)
        return tuple(given_up)

    async def use(self, launch_id: str, placement: Placement) -> dict[str, GpuUse]:
        """What is in use on each GPU of a launch right now, and what of it others may use."""
        used = await self._used()
        return {
            gpu.uuid: GpuUse(
                used.get(gpu.uuid),
                self._others(gpu.uuid, launch_id),
                self._ledger.residue_bytes(gpu.uuid, without=launch_id),
            )
            for gpu in placement.gpus
        }

    async def recheck_forever(self) -> None:
        """Look at unsettled GPUs every few seconds and free those whose memory came back."""
        while True:
            await asyncio.sleep(RECHECK_S)
            if self.unsettled:
                await self.recheck()

    async def recheck(self) -> None:
        """One look at the unsettled GPUs. A GPU that some launch shares by now is judged without that share."""
        snapshot = await self._inventory.snapshot(max_age_s=0)
        used = _used_bytes(snapshot)
        for uuid in list(self.unsettled):
            reading = snapshot.reading(uuid)
            total = reading.gpu.total_bytes if reading is not None else 0
            back = settle.is_settled(
                self._baselines.get(uuid, 0),
                used.get(uuid),
                self._tolerance_bytes,
                others_milli=self._ledger.claimed_milli(uuid),
                total_bytes=total,
                residue_bytes=self._ledger.residue_bytes(uuid),
            )
            if back:
                await durably(f"GPU {uuid}", partial(self._store.clear_unsettled, uuid))
                self.unsettled.pop(uuid, None)

    async def _mark(self, uuid: str, baseline: int, reason: str) -> None:
        self.unsettled[uuid], self._baselines[uuid] = reason, baseline
        at = time.time()
        await durably(f"GPU {uuid}", lambda: self._store.mark_unsettled(uuid, baseline, reason, at))

    def _others(self, uuid: str, launch_id: str) -> int:
        return self._ledger.claimed_milli(uuid, without=launch_id)

    async def _used(self) -> dict[str, int]:
        return _used_bytes(await self._inventory.snapshot(max_age_s=0))


def _used_bytes(snapshot: Snapshot) -> dict[str, int]:
    return {r.gpu.uuid: r.used_bytes for r in snapshot.gpus if r.used_bytes is not None and r.unknown is None}
