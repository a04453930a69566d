"""Who may sleep, and who may wake: what is asked of a launch before its owner task is.

Invariant: a launch is sent to sleep only where the host keeps the operator's reserve of memory, and woken only onto
GPUs that nobody else uses. What becomes of it is its owner's; nothing is decided here about states.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from vllm_bootstrap.errors import BadRequest, Conflict, GpuConflict, GpuUnknown, SleepFailed
from vllm_bootstrap.gpus.condition import GpuState, assess
from vllm_bootstrap.gpus.inventory import Inventory, Snapshot
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.launches.attempt import Attempt
from vllm_bootstrap.launches.config import SupervisorConfig
from vllm_bootstrap.launches.downloads import blobs_dir, cached_bytes
from vllm_bootstrap.launches.gpu_release import GpuRelease
from vllm_bootstrap.launches.host_memory import available_bytes
from vllm_bootstrap.launches.owner import LaunchOwner
from vllm_bootstrap.launches.resting import GpuLook, too_little_host_memory, weights_bytes
from vllm_bootstrap.launches.spec_hash import args_hash, device_name
from vllm_bootstrap.launches.store import LaunchStore

WITH_MEMORY = frozenset({"cuda", "mock"})


class SleepDesk:
    """``owners`` is the supervisor's own mapping, read only."""

    def __init__(
        self,
        config: SupervisorConfig,
        store: LaunchStore,
        inventory: Inventory,
        ledger: Ledger,
        gpus: GpuRelease,
        owners: Mapping[str, LaunchOwner],
        own_pids: Callable[[Snapshot], Awaitable[frozenset[int] | None]],
    ) -> None:
        self._config, self._store, self._inventory = config, store, inventory
        self._ledger, self._gpus, self._owners, self._own_pids = ledger, gpus, owners, own_pids

    def can_sleep(self, launch_id: str) -> bool:
        owner = self._owners.get(launch_id)
        return owner is not None and self._why_not(owner) is None

    async def sleep(self, launch_id: str, level: int) -> None:
        """See ``Supervisor.sleep``."""
        owner = self._owner(launch_id)
        why = self._why_not(owner)
        if why is None and owner.attempt is not None and level not in owner.attempt.traits.sleep_levels:
            why = f"It can sleep at the levels {', '.join(map(str, owner.attempt.traits.sleep_levels))}."
        if why is not None:
            raise BadRequest(f"Launch {launch_id} cannot sleep at level {level}: {why}", param="level")
        if level == 1 and (refusal := await self._host_refuses(owner)) is not None:
            raise SleepFailed(f"Launch {launch_id} stays awake: {refusal}.")
        await owner.rest(level)

    async def wake(self, launch_id: str) -> None:
        """See ``Supervisor.wake``."""
        owner = self._owner(launch_id)
        if self._ledger.parked(launch_id):
            await self._refuse_busy_gpus(owner)
        await owner.rest(0)

    async def estimate(self, launch_id: str) -> float | None:
        """See ``Supervisor.estimate_wake``."""
        owner = self._owners.get(launch_id)
        if owner is None:
            return None
        spec, attempt = owner.spec, owner.attempt
        level = attempt.sleep.level if attempt is not None and attempt.sleep is not None else spec.sleep
        key = (spec.model, spec.engine, device_name(owner.placement), args_hash(spec))
        return await self._store.estimate_wake(*key, level)

    def _owner(self, launch_id: str) -> LaunchOwner:
        owner = self._owners.get(launch_id)
        if owner is None:
            raise Conflict(f"Launch {launch_id} has ended.")
        return owner

    def _why_not(self, owner: LaunchOwner) -> str | None:
        attempt = owner.attempt
        if not owner.spec.sleep:
            return "It was not launched with sleep."
        if owner.placement.kind not in WITH_MEMORY:
            return "It holds no GPU memory."
        if attempt is None or not attempt.traits.sleep_levels:
            return "Its engine has no sleep mode."
        return None if attempt.can_sleep else "The process that supervises it is of an earlier release."

    async def _host_refuses(self, owner: LaunchOwner) -> str | None:
        available = await asyncio.to_thread(available_bytes)
        if available is None:
            return "nobody can tell how much memory the host has left"
        blobs = blobs_dir(owner.spec.model, self._config.hf_home)
        on_disk = await asyncio.to_thread(cached_bytes, blobs) if blobs is not None else None
        attempt = owner.attempt
        on_gpus = await self._on_gpus(owner, attempt) if attempt is not None else 0
        weights = weights_bytes(on_disk, on_gpus)
        return too_little_host_memory(1, weights, available, self._config.sleep_memory_reserve_bytes)

    async def _on_gpus(self, owner: LaunchOwner, attempt: Attempt) -> int:
        use = await self._gpus.use(owner.row.id, owner.placement)
        looks = [
            GpuLook(gpu, attempt.baseline.get(gpu.uuid), seen.used_bytes, None, seen.others_milli, seen.others_bytes)
            for gpu in owner.placement.gpus
            if (seen := use[gpu.uuid])
        ]
        return sum(look.used(look.before or 0) for look in looks)

    async def _refuse_busy_gpus(self, owner: LaunchOwner) -> None:
        snapshot = await self._inventory.snapshot(max_age_s=0)
        own_pids = await self._own_pids(snapshot)
        for gpu in owner.placement.gpus:
            reading = snapshot.reading(gpu.uuid)
            if reading is None:
                raise GpuUnknown(f"GPU {gpu.uuid} cannot be seen any more.", param="launch_id")
            found = assess(
                reading, snapshot, self._ledger, self._gpus.unsettled,
                busy_bytes=self._config.gpu_busy_bytes, own_pids=own_pids,
            )  # fmt: skip
            if found.state is GpuState.UNKNOWN:
                raise GpuUnknown(f"GPU {gpu.index} {found.reason}.", param="launch_id")
            if found.is_busy or found.state is GpuState.UNSETTLED:
                raise GpuConflict(f"GPU {gpu.index} {found.reason}.", param="launch_id")
