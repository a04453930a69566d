"""What the daemon does at start: find every launch it had, adopt or bury it, sweep what belongs to nobody.

Invariant: before anything is launched, every stored launch has an owner again or is known to have ended, claims in the
ledger equal claims in the database, and no process marked as ours lives that no owner knows. A pid is only ever
touched through its shim or its marker, never because a number was written down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from vllm_bootstrap.engines.base import Gpu, Placement
from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.gpus.inventory import Inventory, Snapshot
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.launches import recovery
from vllm_bootstrap.launches.attempt import Attempt, AttemptDeps
from vllm_bootstrap.launches.context import ContextMaker
from vllm_bootstrap.launches.described import traits_in
from vllm_bootstrap.launches.gpu_release import GpuRelease
from vllm_bootstrap.launches.lifecycle import BOOTSTRAPPING, State
from vllm_bootstrap.launches.owner import LaunchOwner
from vllm_bootstrap.launches.process import ProcessHost, Shim, ShimLost
from vllm_bootstrap.launches.resting import facts_in
from vllm_bootstrap.launches.store import AttemptRow, LaunchRow, LaunchStore
from vllm_bootstrap.launches.supervisor import Supervisor

log = logging.getLogger(__name__)
SERVED = frozenset({State.READY, State.FALLING_ASLEEP, State.ASLEEP, State.WAKING})


class Resumed(NamedTuple):
    """A launch found at start. ``stop_heard``: its shim was told to stop, though that may not be written down."""

    owner: LaunchOwner
    attempt: Attempt
    finding: recovery.Finding
    stop_heard: bool


class Reconciler:
    """Runs once, before the port opens. Blocks as long as adopting takes (milliseconds for each launch)."""

    def __init__(
        self,
        supervisor: Supervisor,
        store: LaunchStore,
        host: ProcessHost,
        ledger: Ledger,
        gpus: GpuRelease,
        inventory: Inventory,
        contexts: ContextMaker,
        attempts: AttemptDeps,
    ) -> None:
        self._supervisor, self._store, self._host = supervisor, store, host
        self._ledger, self._gpus, self._inventory = ledger, gpus, inventory
        self._contexts, self._attempts = contexts, attempts

    async def run(self) -> None:
        """Restore claims and owners, then sweep. Raises only on storage failure."""
        for row in await self._store.list(active_only=False, limit=100_000):
            if row.phase.state in {State.STOPPED, State.FAILED}:
                self._supervisor.remember_ended(row)
        self._ledger.restore(await self._store.claims())
        self._ledger.restore_parked(await self._store.parked())
        self._gpus.restore(await self._store.unsettled())
        resumed: list[Resumed] = []
        adopted: set[tuple[str, int]] = set()
        snapshot = await self._inventory.snapshot(max_age_s=0)
        for row, attempt_row in await self._store.unfinished():
            found = await self._resume(row, attempt_row, snapshot)
            resumed.append(found)
            if isinstance(found.finding, recovery.Continue):
                adopted.add((row.id, row.attempt))
        swept = await self._host.sweep(adopted)
        for leftover in swept:
            log.warning("%s", leftover.in_words())
        # Adopted starts take their place in line for a GPU before fresh ones may begin.
        for found in sorted(resumed, key=lambda one: not isinstance(one.finding, recovery.Continue)):
            self._supervisor.adopt_owner(found.owner, found.attempt)
            if found.owner.phase.state is State.STOPPING:
                found.attempt.request_stop(force=False)
            elif found.stop_heard:
                found.owner.wish_stop(force=False)
            await asyncio.sleep(0)  # let the owner's task start its attempt, in this order

    async def _resume(self, row: LaunchRow, stored: AttemptRow | None, snapshot: Snapshot) -> Resumed:
        spec = recovery.spec_of(row.spec)
        placement = await self._placement(row, stored, snapshot)
        engine = self._supervisor.engines.get(row.engine) or self._supervisor.engines["vllm"]
        handle = recovery.handle_of(stored.handle if stored else None)
        config = self._attempts.config
        shim: Shim | None = None
        if handle is not None and handle.identity.boot_id == config.boot_id:
            shim = await self._host.adopt(handle)
        facts = recovery.Facts(
            external=placement.kind == "none",
            stopping=row.phase.state is State.STOPPING,
            handle=handle,
            engine_seen=stored is not None and stored.engine is not None,
            boot_id=config.boot_id,
            shim_alive=shim is not None,
            record=self._host.exit_record(handle) if handle is not None else None,
        )
        finding = recovery.find(facts, now=time.time())
        log.info("launch %s (%s): %s", row.id, row.phase.state, type(finding).__name__.lower())
        if isinstance(finding, recovery.Again):
            row = await self._next_attempt(row)
        # Looks the interpreter's version up once, so that nothing blocks on it later. What it thinks of the launch
        # does not matter any more: the engine runs already or ends here.
        with contextlib.suppress(ApiError):
            await engine.check(spec, placement)
        owner = LaunchOwner(self._supervisor.owner_deps, row, spec, placement, engine)
        attempt = self._attempt(owner, stored, finding, shim)
        return Resumed(owner, attempt, finding, shim is not None and await _heard_stop(shim))

    async def _next_attempt(self, row: LaunchRow) -> LaunchRow:
        await self._host.kill_marked(row.id, row.attempt)
        await self._store.transition(
            row.id, row.attempt, "begun_again", row.phase, BOOTSTRAPPING, time.time(), {}, new_attempt=row.attempt + 1
        )
        return replace(row, attempt=row.attempt + 1)

    def _attempt(
        self, owner: LaunchOwner, stored: AttemptRow | None, finding: recovery.Finding, shim: Shim | None
    ) -> Attempt:
        row, spec, placement, engine = owner.row, owner.spec, owner.placement, owner.engine
        deps, number = self._attempts, row.attempt
        was_ready = row.phase.state in SERVED or (stored is not None and stored.ready_at is not None)
        endpoint = self._contexts.restore_endpoint(row.id, number, stored.endpoint if stored else None)
        baseline = dict(stored.baseline) if stored else {}
        match finding:
            case recovery.Again():
                return Attempt(deps, row.id, number, spec, placement, engine, owner.post)
            case recovery.Finished(record):
                return Attempt(
                    deps, row.id, number, spec, placement, engine, owner.post,
                    finished=record, baseline=baseline, adopted_ready=was_ready,
                )  # fmt: skip
            case recovery.Lost(kind, message):
                return Attempt(
                    deps, row.id, number, spec, placement, engine, owner.post,
                    lost=(kind, message), baseline=baseline, adopted_ready=was_ready,
                )  # fmt: skip
            case recovery.Continue():
                traits = engine.traits(spec)
                if shim is not None:
                    traits = traits_in(stored.endpoint if stored else None, traits)
                else:  # external: where it listens, and what it is, is the engine's own knowledge
                    context = self._contexts.make(row.id, number, self._host.run_dir(row.id, number), needs_port=False)
                    endpoint = engine.command(spec, placement, context).endpoint
                return Attempt(
                    deps, row.id, number, spec, placement, engine, owner.post,
                    adopted=shim, adopted_endpoint=endpoint, adopted_traits=traits, adopted_ready=was_ready,
                    baseline=baseline, resumed=True, sleep=facts_in(stored.sleep if stored else None),
                )  # fmt: skip

    async def _placement(self, row: LaunchRow, stored: AttemptRow | None, snapshot: Snapshot) -> Placement:
        saved: Mapping[str, Any] = (stored.placement if stored else None) or await self._store.placement(row.id) or {}
        if not saved:
            return Placement("none")
        gpus = []
        current = {reading.gpu.uuid: reading.gpu for reading in snapshot.gpus}
        for known in saved["gpus"]:
            capability = tuple(known["capability"]) if known["capability"] else None
            remembered = Gpu(**{**known, "capability": capability})
            # Indices may have been permuted since; the UUID is what was claimed.
            gpus.append(current.get(remembered.uuid, remembered))
        return Placement(**{**saved, "gpus": tuple(gpus)})


async def _heard_stop(shim: Shim) -> bool:
    with contextlib.suppress(ShimLost, TimeoutError):
        return bool((await shim.status()).get("stop_requested"))
    return False
