"""All launches of this daemon: accepts new ones, hands each to its owner task, answers questions about all of them.

Invariant: a GPU is claimed in the pure ledger first and in the database (whose trigger repeats the rule) before a
launch exists for anybody; one lock serialises "look, choose, claim". Everything after that is the owner task's.
Readers get snapshots. Who carries the traffic is told by adverts; this module knows nothing about traffic.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_bootstrap.engines.base import Engine, LaunchSpec, Placement
from vllm_bootstrap.engines.spec import make_spec
from vllm_bootstrap.errors import ApiError, BadRequest, Conflict, Draining, GpuConflict, NotFound, StorageFailed
from vllm_bootstrap.gpus.inventory import Inventory
from vllm_bootstrap.gpus.ledger import Claim, Ledger, LedgerConflict
from vllm_bootstrap.gpus.placement import PlacementWish, place
from vllm_bootstrap.launches import restart, views
from vllm_bootstrap.launches.attempt import Attempt, AttemptDeps
from vllm_bootstrap.launches.config import SupervisorConfig
from vllm_bootstrap.launches.gpu_release import GpuRelease
from vllm_bootstrap.launches.intake import new_row
from vllm_bootstrap.launches.logs import LogReader, ended_logs_cap
from vllm_bootstrap.launches.owner import LaunchOwner, OwnerDeps
from vllm_bootstrap.launches.spec_hash import args_hash, device_name
from vllm_bootstrap.launches.store import IdempotentReplay, LaunchRow, LaunchStore
from vllm_bootstrap.launches.types import EventView, LaunchOrder, LaunchView, StopOutcome
from vllm_bootstrap.serving import Advert

log = logging.getLogger(__name__)
WRITING_PATIENCE_S = 3.0

# Named here because the class has a method called list.
Events = list[EventView]
Outcomes = list[StopOutcome]


class Supervisor:
    """The public face of launches. Methods raise ``errors.ApiError`` subclasses. Single event loop."""

    def __init__(
        self,
        config: SupervisorConfig,
        store: LaunchStore,
        engines: Mapping[str, Engine],
        inventory: Inventory,
        ledger: Ledger,
        gpus: GpuRelease,
        attempts: AttemptDeps,
        *,
        on_advert: Callable[[Advert], None],
        on_forget: Callable[[str], None],
        on_fatal: Callable[[BaseException], None],
        on_event: Callable[[EventView], None] = lambda _event: None,
    ) -> None:
        self.engines = engines
        self._config, self._store, self._inventory = config, store, inventory
        self._ledger, self._gpus, self._attempts = ledger, gpus, attempts
        self._on_advert, self._on_forget, self._on_fatal = on_advert, on_forget, on_fatal
        self._on_event = on_event
        self._owners: dict[str, LaunchOwner] = {}
        self._ended: dict[str, LaunchView] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: set[asyncio.Queue[EventView]] = set()
        self._placing = asyncio.Lock()
        self._refusing = False
        limits = restart.RestartLimits(
            max_attempts=config.restart_max_attempts,
            backoff_s=config.restart_backoff_s,
            backoff_max_s=config.restart_backoff_max_s,
            reset_s=config.restart_reset_s,
        )
        self._owner_deps = OwnerDeps(
            store, limits, self._fresh_attempt, self._changed, self._event_written, self._owner_ended
        )

    # -- launching ----------------------------------------------------------------------------------------------

    async def launch(self, order: LaunchOrder, owner_id: str, idempotency_key: str | None = None) -> LaunchView:
        """Accept a launch: when this returns, it is on disk with its claims and its owner task runs."""
        self._refuse_at_the_end()
        request_hash = hashlib.sha256(json.dumps(asdict(order), sort_keys=True, default=str).encode()).hexdigest()
        async with self._placing:
            # In here, because the same request may be on its way: it must not conflict with itself, and what is on
            # disk has no owner for a moment.
            if (known := await self._earlier(owner_id, idempotency_key, request_hash)) is not None:
                return known
            self._refuse_at_the_end()
            engine = self._engine(order.engine or self._config.default_engine)
            spec = make_spec(order, engine, self._config.allow_dangerous_args)
            placement = await self._place(order, spec, engine)
            await engine.check(spec, placement)
            estimate = await self._estimate(spec, placement)
            row = new_row(order, spec, owner_id, self._config.node_id)
            try:
                await self._claim(row, placement, idempotency_key, request_hash)
            except IdempotentReplay as replay:
                return self._replay(replay.request_hash, replay.launch_id, request_hash)
            # Nothing may come between: what is on disk has an owner, or its GPUs would be nobody's to give back.
            owner = LaunchOwner(self._owner_deps, row, spec, placement, engine)
            self.adopt_owner(owner, self._first_or_next(owner, estimate))
        log.info("launch %s of %s accepted for %s", row.id, row.model, owner_id)
        return views.of_owner(owner)

    def _refuse_at_the_end(self) -> None:
        if self._refusing:
            raise Draining("The daemon is shutting down and accepts no launches.", retry_after=10)

    def _engine(self, name: str) -> Engine:
        engine = self.engines.get(name)
        if engine is None:
            raise BadRequest(f"Unknown engine {name!r}. Known: {', '.join(sorted(self.engines))}.", param="engine")
        return engine

    async def _earlier(self, owner_id: str, key: str | None, request_hash: str) -> LaunchView | None:
        known = await self._store.idempotent(owner_id, key) if key is not None else None
        return self._replay(*known, request_hash) if known is not None else None

    def _replay(self, known_hash: str, launch_id: str, request_hash: str) -> LaunchView:
        if known_hash != request_hash:
            raise Conflict("This Idempotency-Key was used for another launch request.", param="Idempotency-Key")
        return self.get(launch_id)

    async def _place(self, order: LaunchOrder, spec: LaunchSpec, engine: Engine) -> Placement:
        if getattr(engine, "external", False):
            return Placement("none")
        wish = PlacementWish(
            gpu_ids=order.gpu_ids,
            gpu_count=order.gpu_count,
            gpu_share=order.gpu_share,
            tensor_parallel_size=order.tensor_parallel_size,
            pipeline_parallel_size=order.pipeline_parallel_size,
        )
        return place(
            wish,
            await self._inventory.snapshot(max_age_s=0),
            self._ledger,
            self._gpus.unsettled,
            busy_bytes=self._config.gpu_busy_bytes,
            heads=engine.attention_heads(spec),
        )

    async def _claim(self, row: LaunchRow, placement: Placement, key: str | None, request_hash: str) -> None:
        uuids = [gpu.uuid for gpu in placement.gpus]
        shared = placement.share_milli < 1000
        try:
            self._ledger.claim(row.id, uuids, placement.share_milli, shared)
        except LedgerConflict as exc:  # place() looks at the same ledger under the same lock
            raise GpuConflict(f"GPU {exc.uuid} is owned by {', '.join(exc.owners)}.", param="gpu_ids") from exc
        try:
            idempotency = (row.owner_id, key, request_hash) if key is not None else None
            claims = [Claim(uuid, placement.share_milli, shared) for uuid in uuids]
            await self._store.create(row, claims, idempotency, placement=asdict(placement))
        except BaseException:
            self._ledger.release(row.id)
            raise

    async def _fresh_attempt(self, owner: LaunchOwner) -> Attempt:
        return self._first_or_next(owner, await self._estimate(owner.spec, owner.placement))

    async def _estimate(self, spec: LaunchSpec, placement: Placement) -> float | None:
        key = (spec.model, spec.engine, device_name(placement), args_hash(spec))
        return await self._store.estimate(*key)

    def _first_or_next(self, owner: LaunchOwner, estimate_s: float | None) -> Attempt:
        return Attempt(
            self._attempts, owner.row.id, owner.row.attempt, owner.spec, owner.placement, owner.engine, owner.post,
            estimate_s=estimate_s,
        )  # fmt: skip

    # -- owners -------------------------------------------------------------------------------------------------

    @property
    def owner_deps(self) -> OwnerDeps:
        return self._owner_deps

    def adopt_owner(self, owner: LaunchOwner, attempt: Attempt) -> None:
        """Give a launch to its task: a new one, or one found at start."""
        owner.attempt = attempt  # readers see its progress before the task has had its first turn
        self._owners[owner.row.id] = owner
        self._in_background(owner.run(attempt), f"owner {owner.row.id}")

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def remember_ended(self, row: LaunchRow) -> None:
        """Show an ended launch of an earlier daemon."""
        self._ended[row.id] = views.of_row(row)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (cause := task.exception()) is not None:
            log.critical("%s failed", task.get_name(), exc_info=cause)
            self._on_fatal(cause)

    def _changed(self, owner: LaunchOwner) -> None:
        self._on_advert(views.advert_of(owner))

    def _event_written(self, event: EventView) -> None:
        self._on_event(event)
        for queue in self._watchers:
            queue.put_nowait(event)

    def _owner_ended(self, owner: LaunchOwner) -> None:
        row = owner.row
        self._ledger.release(row.id)
        self._attempts.contexts.release(row.id)
        self._ended[row.id] = views.of_row(row, views.claim_views(owner.placement))
        del self._owners[row.id]
        self._in_background(self._tidy(), "tidy ended launches")

    async def _tidy(self) -> None:
        try:
            for launch_id in await self._store.prune(self._config.ended_launches_kept):
                await self._drop(launch_id)
            ended = [self._log_dir(launch_id) for launch_id in self._ended]
            await asyncio.to_thread(ended_logs_cap, ended, self._config.ended_logs_max_bytes)
        except StorageFailed:
            raise
        except (ApiError, OSError) as exc:  # a full disk, mostly; nothing depends on it, and the next end tries again
            log.warning("what is left of ended launches could not be tidied up: %s", exc)

    # -- questions ----------------------------------------------------------------------------------------------

    def get(self, launch_id: str) -> LaunchView:
        """A snapshot by launch or group id. Raises ``NotFound``. Never blocks."""
        owner = self._owners.get(launch_id)
        if owner is not None:
            return views.of_owner(owner)
        view = self._ended.get(launch_id)
        if view is None:
            raise NotFound(f"No launch {launch_id!r}.", param="launch_id")
        return view

    def has_ended(self, launch_id: str) -> bool:
        """Whether a launch of this id exists and is terminal."""
        return launch_id in self._ended

    def list(self, *, include_ended: bool) -> list[LaunchView]:
        """Snapshots, newest first. Never blocks."""
        found = [views.of_owner(owner) for owner in self._owners.values()]
        if include_ended:
            found.extend(self._ended.values())
        return sorted(found, key=lambda view: view.launch_id, reverse=True)

    async def events(self, launch_id: str, after_seq: int, limit: int) -> Events:
        """The history of a launch, oldest first."""
        self.get(launch_id)
        return await self._store.events(launch_id, after_seq, limit)

    async def watch(self, launch_id: str, after_seq: int = 0) -> AsyncIterator[EventView]:
        """History and then news of a launch; ends after the event that ended the launch."""
        queue: asyncio.Queue[EventView] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            last = after_seq
            for event in await self.events(launch_id, after_seq, 10_000):
                last = event.seq
                yield event
            while launch_id in self._owners or not queue.empty():
                news = await self._next_event(queue, launch_id)
                if news is not None and news.launch_id == launch_id and news.seq > last:
                    yield news
        finally:
            self._watchers.discard(queue)

    async def _next_event(self, queue: asyncio.Queue[EventView], launch_id: str) -> EventView | None:
        owner = self._owners.get(launch_id)
        if owner is None:
            return queue.get_nowait() if not queue.empty() else None
        news = asyncio.ensure_future(queue.get())
        end = asyncio.ensure_future(owner.ended.wait())
        try:
            done, _ = await asyncio.wait({news, end}, return_when=asyncio.FIRST_COMPLETED)
            return news.result() if news in done else None
        finally:  # also when the listener goes away
            news.cancel()
            end.cancel()

    def log_reader(self, launch_id: str, attempt: int | None = None) -> LogReader:
        """The log of one attempt, the current one by default. Raises ``NotFound``."""
        view = self.get(launch_id)
        number = view.attempt if attempt is None else attempt
        if not 1 <= number <= view.attempt:
            raise NotFound(f"Launch {launch_id} has no attempt {number}.", param="attempt")
        return LogReader(self._log_dir(launch_id) / str(number))

    def log_ended(self, launch_id: str, attempt: int | None = None) -> bool:
        """Whether nothing more can be written to that log."""
        view = self.get(launch_id)
        return view.state in {"stopped", "failed"} or (attempt is not None and attempt < view.attempt)

    async def dropped_log_bytes(self) -> int:
        """Bytes of output that the logs of active launches could not take. Asks each shim, for a second at most."""
        attempts = [owner.attempt for owner in self._owners.values() if owner.attempt is not None]
        return sum(await asyncio.gather(*(attempt.dropped_log_bytes() for attempt in attempts)))

    # -- ending -------------------------------------------------------------------------------------------------

    async def stop(self, launch_id: str, *, wait: bool = True, force: bool = False) -> StopOutcome:
        """End a launch. Idempotent. With ``wait``, returns when its tree is seen dead and its GPUs have settled."""
        view = self.get(launch_id)
        owner = self._owners.get(launch_id)
        if owner is None:
            return StopOutcome(launch_id, view.state, None, ())
        if wait:
            return await owner.stop(force=force)
        owner.wish_stop(force=force)
        return StopOutcome(launch_id, view.state, None, ())

    async def delete(self, launch_id: str) -> None:
        """Forget an ended launch and its logs. Raises ``NotFound``, ``Conflict`` while it is not ended."""
        self.get(launch_id)
        if launch_id in self._owners:
            raise Conflict(f"Launch {launch_id} has not ended: stop it first.", param="launch_id")
        await self._store.delete(launch_id)
        await self._drop(launch_id)

    async def _drop(self, launch_id: str) -> None:
        self._ended.pop(launch_id, None)
        self._on_forget(launch_id)
        await asyncio.to_thread(shutil.rmtree, self._log_dir(launch_id), ignore_errors=True)

    async def stop_all(self, *, force: bool = False) -> Outcomes:
        """End every launch and refuse new ones. Returns when all are dead and, unless the disk does not take it within
        some seconds, written down; what is not is found out from the exit records by the next daemon."""
        self._refusing = True
        outcomes = await self._stop_owned(force=force)
        async with self._placing:  # one that was being accepted meanwhile has its owner now
            pass
        return outcomes + await self._stop_owned(force=force)

    async def _stop_owned(self, *, force: bool) -> Outcomes:
        owners = list(self._owners.values())
        for owner in owners:
            owner.wish_stop(force=force)
        await asyncio.gather(*[owner.dead.wait() for owner in owners])
        written = [asyncio.ensure_future(owner.ended.wait()) for owner in owners]
        if written:
            _, unwritten = await asyncio.wait(written, timeout=WRITING_PATIENCE_S)
            for waiting in unwritten:
                waiting.cancel()
        return [owner.stop_outcome() for owner in owners]

    async def leave(self) -> None:
        """Let go of everything without harming a launch; the next daemon finds them again."""
        self._refusing = True
        for owner in self._owners.values():
            if owner.attempt is not None:
                owner.attempt.detach()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _log_dir(self, launch_id: str) -> Path:
        return self._config.log_base / launch_id
