"""Launch requests on their way in: checked, placed, claimed and put on record, one request after the other.

Invariant: a GPU is claimed in the pure ledger first and in the database (whose trigger repeats the rule) before a
launch exists for anybody; one lock serialises "look, choose, claim". The replicas of one request are placed, claimed
and stored together, all or none. What happens to a launch afterwards is unknown here: ``begin`` takes it over.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import NamedTuple

from vllm_bootstrap.engines.base import Engine, LaunchSpec, Placement
from vllm_bootstrap.engines.spec import make_spec
from vllm_bootstrap.errors import BadRequest, Conflict, Draining, GpuConflict
from vllm_bootstrap.gpus.inventory import Inventory, Snapshot
from vllm_bootstrap.gpus.ledger import Ledger, LedgerConflict
from vllm_bootstrap.gpus.placement import PlacementWish, place
from vllm_bootstrap.gpus.replicas import place_replicas
from vllm_bootstrap.launches.config import SupervisorConfig
from vllm_bootstrap.launches.gpu_release import GpuRelease
from vllm_bootstrap.launches.intake import new_rows
from vllm_bootstrap.launches.spec_hash import args_hash, device_name
from vllm_bootstrap.launches.store import IdempotentReplay, LaunchRow, LaunchStore, NewLaunch
from vllm_bootstrap.launches.types import LaunchOrder

log = logging.getLogger(__name__)

# Fields of an order that did not exist from the beginning, with what stands for their absence.
_LATER: Mapping[str, object] = {
    "replicas": 1, "aliases": (), "adapters": {}, "max_parallel": None, "sleep": 0, "folder": None,
}  # fmt: skip


class Accepted(NamedTuple):
    """A launch that is on record with its claims and has no owner task yet."""

    row: LaunchRow
    spec: LaunchSpec
    placement: Placement
    engine: Engine
    estimate_s: float | None


async def fits_always(_spec: LaunchSpec, _placement: Placement) -> None:
    """Nobody judges whether a launch fits on its GPUs."""


class Acceptor:
    """``begin`` is called for each new launch right after it was stored; it must not fail nor wait. ``own_pids`` tells
    all processes of our launches, None when nobody can or needs to know. ``fit`` raises for what cannot fit."""

    def __init__(
        self,
        config: SupervisorConfig,
        store: LaunchStore,
        engines: Mapping[str, Engine],
        inventory: Inventory,
        ledger: Ledger,
        gpus: GpuRelease,
        begin: Callable[[Accepted], None],
        own_pids: Callable[[Snapshot], Awaitable[frozenset[int] | None]],
        fit: Callable[[LaunchSpec, Placement], Awaitable[None]] = fits_always,
    ) -> None:
        self._config, self._store, self._engines = config, store, engines
        self._inventory, self._ledger, self._gpus = inventory, ledger, gpus
        self._begin, self._own_pids, self._fit = begin, own_pids, fit
        self._placing = asyncio.Lock()
        self._refusing = False

    def refuse(self) -> None:
        """The daemon is about to end: accept nothing from now on."""
        self._refusing = True

    async def quiet(self) -> None:
        """Return when whatever was being accepted has been."""
        async with self._placing:
            pass

    async def accept(self, order: LaunchOrder, owner_id: str, idempotency_key: str | None = None) -> str:
        """Accept a request: when this returns, its launches are on disk with their claims and have begun. The id of
        the first of them, or of one of those that the same request made before."""
        self._refuse_at_the_end()
        request_hash = _hash_of(order)
        async with self._placing:
            # In here, because the same request may be on its way: it must not conflict with itself, and what is on
            # disk has no owner for a moment.
            if (known := await self._earlier(owner_id, idempotency_key, request_hash)) is not None:
                return known
            self._refuse_at_the_end()
            engine = self._engine(order.engine or self._config.default_engine)
            spec = make_spec(order, engine, self._config.allow_dangerous_args)
            placements = await self._place(order, spec, engine)
            for placement in placements:
                await engine.check(spec, placement)
                await self._fit(spec, placement)
            estimates = [await self.estimate(spec, placement) for placement in placements]
            rows = new_rows(order, spec, owner_id, self._config.node_id, len(placements))
            try:
                await self._claim(rows, placements, idempotency_key, request_hash)
            except IdempotentReplay as replay:
                return _replay(replay.request_hash, replay.launch_id, request_hash)
            # Nothing may come between: what is on disk has an owner, or its GPUs would be nobody's to give back.
            for row, placement, estimate_s in zip(rows, placements, estimates, strict=True):
                self._begin(Accepted(row, spec, placement, engine, estimate_s))
        log.info("launch %s of %s accepted for %s", ", ".join(row.id for row in rows), spec.model, owner_id)
        return rows[0].id

    async def estimate(self, spec: LaunchSpec, placement: Placement) -> float | None:
        """Seconds a start of this kind takes, None when there was none yet."""
        return await self._store.estimate(spec.model, spec.engine, device_name(placement), args_hash(spec))

    async def estimate_of(self, order: LaunchOrder) -> float | None:
        """Likewise for an order that is not placed yet: on the first GPUs, as many as it asks for (else one)."""
        engine = self._engine(order.engine or self._config.default_engine)
        spec = make_spec(order, engine, self._config.allow_dangerous_args)
        snapshot = await self._inventory.snapshot()
        gpus = tuple(reading.gpu for reading in snapshot.gpus)[: order.gpu_count or 1]
        return await self.estimate(spec, Placement(snapshot.kind, gpus))

    def _refuse_at_the_end(self) -> None:
        if self._refusing:
            raise Draining("The daemon is shutting down and accepts no launches.", retry_after=10)

    def _engine(self, name: str) -> Engine:
        engine = self._engines.get(name)
        if engine is None:
            raise BadRequest(f"Unknown engine {name!r}. Known: {', '.join(sorted(self._engines))}.", param="engine")
        return engine

    async def _earlier(self, owner_id: str, key: str | None, request_hash: str) -> str | None:
        known = await self._store.idempotent(owner_id, key) if key is not None else None
        return _replay(*known, request_hash) if known is not None else None

    async def _place(self, order: LaunchOrder, spec: LaunchSpec, engine: Engine) -> list[Placement]:
        if getattr(engine, "external", False):
            if order.replicas != 1:
                raise BadRequest(
                    f"The engine {engine.name!r} runs elsewhere and only once: it has no replicas.", param="replicas"
                )
            return [Placement("none")]
        wish = PlacementWish(
            gpu_ids=order.gpu_ids,
            gpu_count=order.gpu_count,
            gpu_share=order.gpu_share,
            tensor_parallel_size=order.tensor_parallel_size,
            pipeline_parallel_size=order.pipeline_parallel_size,
        )
        snapshot = await self._inventory.snapshot(max_age_s=0)
        ledger, unsettled, busy_bytes = self._ledger, self._gpus.unsettled, self._config.gpu_busy_bytes
        heads, own_pids = engine.attention_heads(spec), await self._own_pids(snapshot)
        if order.replicas == 1:
            one = place(wish, snapshot, ledger, unsettled, busy_bytes=busy_bytes, heads=heads, own_pids=own_pids)
            return [one]
        return place_replicas(
            wish, order.replicas, snapshot, ledger, unsettled,
            busy_bytes=busy_bytes, most=self._config.replicas_max, heads=heads, own_pids=own_pids,
        )  # fmt: skip

    async def _claim(
        self, rows: list[LaunchRow], placements: list[Placement], key: str | None, request_hash: str
    ) -> None:
        try:
            fresh = [self._claim_in_ledger(row, at) for row, at in zip(rows, placements, strict=True)]
            idempotency = (rows[0].owner_id, key, request_hash) if key is not None else None
            await self._store.create_all(fresh, idempotency)
        except BaseException:
            for row in rows:
                self._ledger.release(row.id)
            raise

    def _claim_in_ledger(self, row: LaunchRow, placement: Placement) -> NewLaunch:
        uuids = [gpu.uuid for gpu in placement.gpus]
        shared = placement.share_milli < 1000
        try:
            claims = self._ledger.claim(row.id, uuids, placement.share_milli, shared)
        except LedgerConflict as exc:  # placing looks at the same ledger under the same lock
            raise GpuConflict(f"GPU {exc.uuid} is owned by {', '.join(exc.owners)}.", param="gpu_ids") from exc
        return NewLaunch(row, claims, asdict(placement))


def _hash_of(order: LaunchOrder) -> str:
    """What makes two requests the same. One without what came later (replicas, names) hashes as it did before."""
    facts = asdict(order)
    for name, absent in _LATER.items():
        if facts[name] == absent:
            del facts[name]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _replay(known_hash: str, launch_id: str, request_hash: str) -> str:
    if known_hash != request_hash:
        raise Conflict("This Idempotency-Key was used for another launch request.", param="Idempotency-Key")
    return launch_id
