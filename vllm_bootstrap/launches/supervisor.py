"""All launches of this daemon: hands each accepted one to its owner task, answers questions about all of them.

Invariant: what becomes of a launch is its owner task's; readers get snapshots. A group of replicas is nothing but its
launches: what is asked of it is asked of each of them. Who carries the traffic is told by adverts; this module knows
nothing about traffic.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_bootstrap.engines.base import Engine, LaunchSpec, Placement
from vllm_bootstrap.errors import ApiError, BadRequest, Conflict, NotFound, StorageFailed
from vllm_bootstrap.gpus.inventory import Inventory, Snapshot
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.launches import groups, restart, views
from vllm_bootstrap.launches.accepting import Accepted, Acceptor, fits_always
from vllm_bootstrap.launches.attempt import Attempt, AttemptDeps
from vllm_bootstrap.launches.config import SupervisorConfig
from vllm_bootstrap.launches.gpu_release import GpuRelease
from vllm_bootstrap.launches.logs import LogReader, ended_logs_cap
from vllm_bootstrap.launches.owner import LaunchOwner, OwnerDeps
from vllm_bootstrap.launches.sleep_desk import SleepDesk
from vllm_bootstrap.launches.store import LaunchRow, LaunchStore
from vllm_bootstrap.launches.types import EventView, GroupView, LaunchOrder, LaunchView, StopOutcome
from vllm_bootstrap.serving import Advert

log = logging.getLogger(__name__)
WRITING_PATIENCE_S = 3.0
BIRTH_PATIENCE_S = 3.0

# Named here because the class has a method called list.
Events = list[EventView]
Outcomes = list[StopOutcome]
Owners = list[LaunchOwner]


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
        fit: Callable[[LaunchSpec, Placement], Awaitable[None]] = fits_always,
    ) -> None:
        self.engines = engines
        self._config, self._store, self._ledger, self._attempts = config, store, ledger, attempts
        self._on_advert, self._on_forget, self._on_fatal = on_advert, on_forget, on_fatal
        self._on_event = on_event
        self._owners: dict[str, LaunchOwner] = {}
        self._ended: dict[str, LaunchView] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: set[asyncio.Queue[EventView]] = set()
        self._groups: dict[str, set[str]] = {}
        self._acceptor = Acceptor(config, store, engines, inventory, ledger, gpus, self._begin, self.own_pids, fit)
        limits = restart.RestartLimits(
            max_attempts=config.restart_max_attempts,
            backoff_s=config.restart_backoff_s,
            backoff_max_s=config.restart_backoff_max_s,
            reset_s=config.restart_reset_s,
        )
        self._sleep = SleepDesk(config, store, inventory, ledger, gpus, self._owners, self.own_pids)
        self._owner_deps = OwnerDeps(
            store, ledger, limits, self._fresh_attempt, self._changed, self._event_written, self._owner_ended
        )

    # -- launching ----------------------------------------------------------------------------------------------

    async def launch(self, order: LaunchOrder, owner_id: str, idempotency_key: str | None = None) -> LaunchView:
        """Accept a launch: when this returns, it is on disk with its claims and its owner task runs."""
        return self.get(await self._acceptor.accept(order, owner_id, idempotency_key))

    async def launch_group(self, order: LaunchOrder, owner_id: str, idempotency_key: str | None = None) -> GroupView:
        """Likewise for an order with ``replicas`` other than 1: all of them, or none."""
        first = self.get(await self._acceptor.accept(order, owner_id, idempotency_key))
        return self._group(first.group_id)

    def _begin(self, new: Accepted) -> None:
        owner = LaunchOwner(self._owner_deps, new.row, new.spec, new.placement, new.engine)
        self.adopt_owner(owner, self._first_or_next(owner, new.estimate_s))

    async def _fresh_attempt(self, owner: LaunchOwner) -> Attempt:
        return self._first_or_next(owner, await self._acceptor.estimate(owner.spec, owner.placement))

    def _first_or_next(self, owner: LaunchOwner, estimate_s: float | None) -> Attempt:
        return Attempt(
            self._attempts, owner.row.id, owner.row.attempt, owner.spec, owner.placement, owner.engine, owner.post,
            estimate_s=estimate_s,
        )  # fmt: skip

    async def estimate(self, order: LaunchOrder) -> float | None:
        """Seconds its start will take on GPUs as there are here, None when there was none like it yet. Raises
        ``BadRequest`` for an order that could not be launched."""
        return await self._acceptor.estimate_of(order)

    # -- owners -------------------------------------------------------------------------------------------------

    @property
    def owner_deps(self) -> OwnerDeps:
        return self._owner_deps

    def adopt_owner(self, owner: LaunchOwner, attempt: Attempt) -> None:
        """Give a launch to its task: a new one, or one found at start."""
        owner.attempt = attempt  # readers see its progress before the task has had its first turn
        self._owners[owner.row.id] = owner
        self._join(owner.row)
        self._in_background(owner.run(attempt), f"owner {owner.row.id}")

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def remember_ended(self, row: LaunchRow) -> None:
        """Show an ended launch of an earlier daemon."""
        self._ended[row.id] = views.of_row(row)
        self._join(row)

    def _join(self, row: LaunchRow) -> None:
        if row.group_id != row.id:
            self._groups.setdefault(row.group_id, set()).add(row.id)

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
        """A snapshot of one launch. Raises ``NotFound``, for a group ``BadRequest`` with the ids. Never blocks."""
        owner = self._owners.get(launch_id)
        view = views.of_owner(owner) if owner is not None else self._ended.get(launch_id)
        if view is None:
            raise self._no_launch(launch_id)
        return self._sized(view)

    def _sized(self, view: LaunchView) -> LaunchView:
        members = self._groups.get(view.group_id)
        return view if members is None else replace(view, group_size=len(members))

    def _no_launch(self, launch_id: str) -> ApiError:
        members = sorted(self._groups.get(launch_id, ()))
        if not members:
            return NotFound(f"No launch {launch_id!r}.", param="launch_id")
        return BadRequest(
            f"{launch_id} is a group of replicas. Name one of its launches: {', '.join(members)}.",
            param="launch_id",
            details={"replicas": members},
        )

    def group(self, group_id: str) -> GroupView | None:
        """A snapshot of a group of replicas, None when this is not the id of one. Never blocks."""
        return self._group(group_id) if group_id in self._groups else None

    def _group(self, group_id: str) -> GroupView:
        return groups.view_of(group_id, [self.get(launch_id) for launch_id in self._groups[group_id]])

    def _members(self, launch_id: str) -> list[str]:
        """The launches an id stands for: itself, or those of a group. Raises ``NotFound``."""
        if launch_id in self._groups:
            return sorted(self._groups[launch_id])
        return [self.get(launch_id).launch_id]

    def has_ended(self, launch_id: str) -> bool:
        """Whether a launch or group of this id exists and is terminal."""
        members = self._groups.get(launch_id, {launch_id})
        return all(member in self._ended for member in members)

    def list(self, *, include_ended: bool, group: str | None = None) -> list[LaunchView]:
        """Snapshots, newest first; of one group only, when one is given. Never blocks."""
        found = [views.of_owner(owner) for owner in self._owners.values()]
        if include_ended:
            found.extend(self._ended.values())
        wanted = [self._sized(view) for view in found if group in {None, view.group_id}]
        return sorted(wanted, key=lambda view: view.launch_id, reverse=True)

    async def events(self, launch_id: str, after_seq: int, limit: int) -> Events:
        """The history of a launch, or of all launches of a group, oldest first."""
        if launch_id in self._groups:
            return await self._store.group_events(launch_id, after_seq, limit)
        self.get(launch_id)
        return await self._store.events(launch_id, after_seq, limit)

    async def watch(self, launch_id: str, after_seq: int = 0) -> AsyncIterator[EventView]:
        """History and then news of a launch or a group; ends after the event that ended it."""
        members = self._members(launch_id)
        queue: asyncio.Queue[EventView] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            last = after_seq
            for event in await self.events(launch_id, after_seq, 10_000):
                last = event.seq
                yield event
            while (living := self._living(members)) or not queue.empty():
                news = await _next_event(queue, living)
                if news is not None and news.launch_id in members and news.seq > last:
                    yield news
        finally:
            self._watchers.discard(queue)

    def _living(self, launch_ids: Sequence[str]) -> Owners:
        return [self._owners[launch_id] for launch_id in launch_ids if launch_id in self._owners]

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

    async def own_pids(self, snapshot: Snapshot) -> frozenset[int] | None:
        """All processes of our launches, as far as they are needed to tell others' on the GPUs of ``snapshot`` from
        them; None where none are seen there or their ids mean nothing."""
        if not snapshot.pids_trusted or not any(reading.processes for reading in snapshot.gpus):
            return None
        attempts = [owner.attempt for owner in self._owners.values() if owner.attempt is not None]
        return await self._attempts.host.trees(one.shim_pid for one in attempts if one.shim_pid is not None)

    async def dropped_log_bytes(self) -> int:
        """Bytes of output that the logs of active launches could not take. Asks each shim, for a second at most."""
        attempts = [owner.attempt for owner in self._owners.values() if owner.attempt is not None]
        return sum(await asyncio.gather(*(attempt.dropped_log_bytes() for attempt in attempts)))

    # -- sleeping -----------------------------------------------------------------------------------------------

    def can_sleep(self, launch_id: str) -> bool:
        """Whether a launch was started so that it can sleep. Raises ``NotFound``. Never blocks."""
        self.get(launch_id)
        return self._sleep.can_sleep(launch_id)

    async def sleep(self, launch_id: str, level: int) -> LaunchView:
        """Send a ready launch to sleep; returns when its GPUs are seen free and its claims are parked. Requests that
        run on it are aborted: let them end before. Raises ``SleepFailed`` (it serves as before, or has failed: stop it
        instead), ``BadRequest`` when it cannot at all, ``Conflict`` when it is not ready."""
        self.get(launch_id)
        await self._sleep.sleep(launch_id, level)
        return self.get(launch_id)

    async def wake(self, launch_id: str) -> LaunchView:
        """Wake a launch; returns when it answers. Raises ``GpuConflict`` when its GPUs are not free and ``WakeFailed``
        when they are locked (it sleeps on), or when it did not wake (it ends as failed), ``Conflict`` when it does not
        sleep."""
        self.get(launch_id)
        await self._sleep.wake(launch_id)
        return self.get(launch_id)

    async def estimate_wake(self, launch_id: str) -> float | None:
        """Seconds that waking takes, by earlier times of the same kind; None when there were none."""
        self.get(launch_id)
        return await self._sleep.estimate(launch_id)

    # -- ending -------------------------------------------------------------------------------------------------

    async def stop(self, launch_id: str, *, wait: bool = True, force: bool = False) -> StopOutcome:
        """End a launch, or all of a group at once. Idempotent. With ``wait``, returns when every tree is seen dead and
        its GPUs have settled."""
        members = self._members(launch_id)
        for owner in self._living(members):
            owner.wish_stop(force=force)
        outcomes = await asyncio.gather(*[self._outcome(member, wait=wait) for member in members])
        return groups.outcome_of(launch_id, outcomes) if launch_id in self._groups else outcomes[0]

    async def _outcome(self, launch_id: str, *, wait: bool) -> StopOutcome:
        owner = self._owners.get(launch_id)
        if owner is not None and wait:
            return await owner.stopped()
        return StopOutcome(launch_id, self.get(launch_id).state, None, ())

    async def delete(self, launch_id: str) -> None:
        """Forget an ended launch, or a group whose launches have all ended, with their logs. Raises ``NotFound``,
        ``Conflict`` while one has not ended."""
        members = self._members(launch_id)
        if living := [owner.row.id for owner in self._living(members)]:
            raise Conflict(f"Not ended yet: {', '.join(living)}. Stop what is to be forgotten.", param="launch_id")
        await self._store.delete(*members)
        for member in members:
            await self._drop(member)

    async def _drop(self, launch_id: str) -> None:
        view = self._ended.pop(launch_id, None)
        if view is not None and (others := self._groups.get(view.group_id)) is not None:
            others.discard(launch_id)
            if not others:
                del self._groups[view.group_id]
        self._on_forget(launch_id)
        await asyncio.to_thread(shutil.rmtree, self._log_dir(launch_id), ignore_errors=True)

    async def stop_all(self, *, force: bool = False) -> Outcomes:
        """End every launch and refuse new ones. Returns when all are dead and, unless the disk does not take it within
        some seconds, written down; what is not is found out from the exit records by the next daemon."""
        self._acceptor.refuse()
        outcomes = await self._stop_owned(force=force)
        await self._acceptor.quiet()  # one that was being accepted meanwhile has its owner now
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
        """Let go of everything without harming a launch; the next daemon finds them again. What is being started this
        very moment is given some seconds, so that it need not be begun anew."""
        self._acceptor.refuse()
        births = [
            asyncio.ensure_future(owner.attempt.at_rest.wait()) for owner in self._owners.values() if owner.attempt
        ]
        if births:
            await asyncio.wait(births, timeout=BIRTH_PATIENCE_S)
            for birth in births:
                birth.cancel()
        for owner in self._owners.values():
            if owner.attempt is not None:
                owner.attempt.detach()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _log_dir(self, launch_id: str) -> Path:
        return self._config.log_base / launch_id


async def _next_event(queue: asyncio.Queue[EventView], living: Owners) -> EventView | None:
    """The next event, or None when one of ``living`` has ended first."""
    if not living:
        return queue.get_nowait() if not queue.empty() else None
    news = asyncio.ensure_future(queue.get())
    ends = [asyncio.ensure_future(owner.ended.wait()) for owner in living]
    try:
        done, _ = await asyncio.wait({news, *ends}, return_when=asyncio.FIRST_COMPLETED)
        return news.result() if news in done else None
    finally:  # also when the listener goes away
        for waiting in (news, *ends):
            waiting.cancel()
