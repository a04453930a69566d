"""The one task that loads models and puts them away. All others ask; only this one acts.

It looks again and again (at news, and a few times a second) at what is loaded and who waits, lets ``planning`` decide,
and begins what was decided. What is under way is a task of its own for each model; nothing else is remembered that
could contradict what launches say, so a daemon that was killed goes on where it was.

Invariants: a model has at most one operation under way, and at most one load however many ask; nothing is put away
while a request is in flight there (it is retired at the gate first, in the same turn of the loop in which it is seen to
be free); who waits for a load that fails is told so. Must not know: HTTP, processes, where entries come from.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Coroutine, Mapping
from typing import Any

from vllm_bootstrap.errors import ApiError, BadRequest, NotFound
from vllm_bootstrap.models import planning
from vllm_bootstrap.models.gathering import Gathering, needs_of
from vllm_bootstrap.models.operations import Operations
from vllm_bootstrap.models.orders import ORDER_LABEL
from vllm_bootstrap.models.outcomes import Outcomes
from vllm_bootstrap.models.planning import Facts
from vllm_bootstrap.models.ports import KeeperConfig, KeeperDeps
from vllm_bootstrap.models.record import NOTHING, Doing, Record, Seen
from vllm_bootstrap.models.rooms import Rooms
from vllm_bootstrap.models.types import ModelEntry, Origin
from vllm_bootstrap.pulse import until_pulse
from vllm_bootstrap.serving import Advert, RequestClass

log = logging.getLogger(__name__)

BUSY_TICK_S, IDLE_TICK_S = 0.1, 1.0
"""Between two looks without news: while somebody waits for room, and otherwise."""
DRAIN_LOOK_S = 0.05
ACCEPTING_PATIENCE_S = 5.0
OPERATOR_ASKS_S = 3600.0
FAULT_RETRY_S = 5.0
"""Until a load is tried again that failed by a mistake of this program."""
MOST_ADHOC = 256
"""Names that only requests have made up: so many are remembered without being loaded."""


class Keeper:
    """See the module. ``start`` once launches were taken over, ``close`` before they are stopped."""

    def __init__(self, config: KeeperConfig, deps: KeeperDeps) -> None:
        self._config, self._deps = config, deps
        self._gathering = Gathering(deps)
        self._outcomes = Outcomes(config, deps)
        self._work = Operations(deps, self._outcomes)
        self.records: dict[str, Record] = {}
        self._had_launches: frozenset[str] = frozenset()
        self._stirring: set[str] = set()  # so that a look need not go through all of a long catalogue
        self._kicked = asyncio.Event()
        self._changed, self._hurry = asyncio.Event(), asyncio.Event()
        self._operations: dict[str, asyncio.Task[None]] = {}
        self._running: asyncio.Task[None] | None = None
        self._closed = False

    # Life

    async def start(self) -> None:
        self.book_changed()
        self._running = asyncio.create_task(self._run(), name="keep models")

    async def close(self) -> None:
        """Begin nothing more; what is under way is left to the launches. Idempotent."""
        self._closed = True
        if self._running is not None:
            self._running.cancel()
        # A launch that is being accepted is on disk in a moment; cut off there, it would have nobody to own it.
        accepting = [task for name, task in self._operations.items() if self.records[name].doing == "loading"]
        if accepting:
            await asyncio.wait(accepting, timeout=ACCEPTING_PATIENCE_S)
        tasks = [*self._operations.values(), *([self._running] if self._running is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._operations.clear()

    def kick(self) -> None:
        """Something has changed: look now."""
        self._kicked.set()

    def advert(self, _advert: Advert) -> None:
        """A launch has changed."""
        self.kick()

    def book_changed(self) -> None:
        """The catalogue has changed."""
        entries = self._deps.book.entries()
        for known in self.records.values():
            self._outcomes.removed(known)
        for name, entry in entries.items():
            print_ = self._deps.book.fingerprint(entry)
            record = self.records.get(name)
            if record is None:
                self.records[name] = Record(entry, print_)
                continue
            if record.fingerprint != print_ or record.entry.gpus != entry.gpus:
                record.retry_at, record.failures, record.trouble = None, 0, None
                record.gpu_count, record.estimated = None, False
            record.entry, record.fingerprint = entry, print_
        self._stirring.update(name for name, entry in entries.items() if entry.preload)
        self._deps.queues.prospects_changed()
        self.kick()

    def changes(self) -> Coroutine[Any, Any, bool]:
        """Ends with the next change, from this call on, of anything that is shown of models."""
        return self._changed.wait()

    # What others ask

    def record_of(self, name: str) -> Record | None:
        """The record of the model whose engine serves ``name``."""
        entry = self._deps.book.find(name)
        if entry is None and self._config.on_demand == "any":
            known = self.records.get(name)
            if known is not None:
                return known
            entry = self._deps.book.adhoc(name)
            if entry is not None:
                self._forget_adhoc()
        if entry is None:
            return None
        record = self.records.get(entry.name)
        if record is None:
            record = self.records[entry.name] = Record(entry, self._deps.book.fingerprint(entry))
        return record

    def _forget_adhoc(self) -> None:
        """Names that requests have made up are not kept for ever, unless somebody wants them."""
        idle = [
            name
            for name, record in self.records.items()
            if record.entry.origin == "request" and not record.launches and name not in self._operations
        ]
        if len(idle) <= MOST_ADHOC:
            return
        now, demand = self._deps.tick(), self._deps.queues.demand()
        for name in idle[: len(idle) - MOST_ADHOC]:
            record = self.records[name]
            if not record.stirs(now) and not record.batch_lines and name not in demand:
                del self.records[name]

    def look(self) -> Mapping[str, Seen]:
        """The launches of all models that have any, now."""
        return self._gathering.look()

    def seen(self, name: str) -> Seen:
        """Its launches now."""
        return self.look().get(name, NOTHING)

    def ask(self, name: str, cls: RequestClass, lasting_s: float, *, stands: bool = False) -> None:
        """Somebody wants it and does not wait in a queue. See ``Asked``."""
        record = self.record_of(name)
        if record is not None:
            record.ask(cls, self._deps.tick(), lasting_s, stands=stands)
            self._stirring.add(record.entry.name)
            self.kick()

    async def load(self, name: str) -> None:
        """Have it loaded, whatever went wrong before. Returns at once."""
        record = self._must(name)
        record.retry_at, record.trouble, record.failures, record.down = None, None, 0, False
        self.ask(name, "realtime", OPERATOR_ASKS_S, stands=True)

    async def unload(self, name: str, *, force: bool) -> None:
        """Put it away and wait until that is done: when nothing runs there any more, with ``force`` at once. What is
        there or being loaded at this call is meant, not what is loaded meanwhile for those who wait."""
        record = self._must(name)
        own = record.entry.name
        record.asked.clear()
        record.down, record.hurry = True, force or (record.hurry and record.doing == "unloading")
        if force:
            self._hurry.set()
            self._hurry = asyncio.Event()
        meant = {view.launch_id for view in self.seen(own).launches}
        if (task := self._operations.get(own)) is not None:
            begun = record.doing
            await _done(task)
            if begun == "loading":  # it has its launch only now
                meant.update(view.launch_id for view in self.seen(own).launches)
        while not self._closed:
            left = [view for view in self.seen(own).launches if view.launch_id in meant]
            if not left:
                break
            if own not in self._operations:
                self._begin(record, "unloading", self._drain(record, self.seen(own)))
            await _done(self._operations[own])
        record.hurry = False
        self.kick()

    async def _drain(self, record: Record, seen: Seen) -> None:
        for view in seen.launches:
            self._deps.queues.retire(view.launch_id)
        while not record.hurry and self.seen(record.entry.name).in_flight:
            await _within(DRAIN_LOOK_S, self._hurry)
        await self._work.stop(record, seen, "asked", force=record.hurry)

    def _must(self, name: str) -> Record:
        record = self.record_of(name)
        if record is None:
            raise NotFound(f"There is no model {name!r} in the catalogue.", param="model")
        return record

    # The loop

    async def _run(self) -> None:
        wait_s = 0.0
        while True:
            await _within(wait_s, self._kicked)
            self._kicked.clear()
            try:
                wait_s = await self._step()
            except ApiError as error:
                log.warning("Models cannot be judged at the moment: %s", error.message)
                wait_s = IDLE_TICK_S
            except Exception:
                log.exception("A look at the models failed; the next one comes in a second")
                wait_s = IDLE_TICK_S

    async def _step(self) -> float:
        """One look. Returns how long to wait for the next one without news."""
        facts = self._facts()
        wanted = [fact for fact in facts if fact.wanted is not None]
        room: planning.Room = _NoRoom()
        if wanted:
            for record in [self.records[fact.name] for fact in wanted]:  # names may be forgotten meanwhile
                await self._learn(record)
            snapshot = await self._deps.devices.snapshot()
            own_pids = await self._deps.launches.own_pids(snapshot)
            facts = self._facts()  # what was seen before has changed meanwhile; from here on nothing waits
            concerned = {fact.name: self.records[fact.name] for fact in facts}
            room = Rooms(
                needs_of(concerned, self._gathering.seen, self._deps.ledger, self._config.externals),
                snapshot, self._deps.ledger, self._deps.gpus.unsettled,
                busy_bytes=self._config.busy_bytes, replicas_max=self._config.replicas_max, own_pids=own_pids,
            )  # fmt: skip
        plan = planning.plan(facts, room, self._deps.book.groups(), self._config.policy)
        for fact in facts:
            record = self.records[fact.name]
            if fact.wanted is not None:
                record.obstacle = plan.waits.get(fact.name)
                self._warm(record)
                self._refuse_what_can_never_be(record, room)
        for action in plan.actions:
            self._act(action, room)
        self._tell_changes()
        busy = any(fact.wanted is not None or fact.retired for fact in facts)
        return BUSY_TICK_S if busy else until_pulse(IDLE_TICK_S, self._deps.tick())

    def _facts(self) -> list[Facts]:
        seen = self._gathering.look()
        self._adopt(seen)
        for name in {*seen, *self._had_launches}:
            record = self.records.get(name)
            if record is not None and self._outcomes.note(record, seen.get(name, NOTHING)):
                self._tell_changes()
        self._had_launches = frozenset(seen)
        now, records = self._deps.tick(), self.records
        self._stirring = {name for name in self._stirring if name in records and records[name].stirs(now)}
        on_demand = self._config.on_demand != "off"
        for served, left in self._deps.batch_lines().items() if on_demand else ():
            if left:
                self.record_of(served)  # lines may be the first to name a model
        return self._gathering.facts(records, self._stirring, self._config, on_demand=on_demand)

    def _adopt(self, seen: Mapping[str, Seen]) -> None:
        """Launches of models that are not known (any more) are kept in the books until they are gone."""
        for name, found in seen.items():
            if name not in self.records:
                view = found.launches[0]
                origin: Origin = "request" if self._config.on_demand == "any" else "runtime"
                entry = ModelEntry(name, view.model, origin=origin, engine=view.engine)
                self.records[name] = Record(entry, view.labels.get(ORDER_LABEL, ""))
        for name in self.records.keys() - self._deps.book.entries().keys():
            record = self.records[name]
            if record.entry.origin == "request":
                continue
            if name in seen or name in self._operations:  # it is not in the catalogue any more: outdated
                record.fingerprint, record.retry_at = "", math.inf
            else:
                del self.records[name]

    def _refuse_what_can_never_be(self, record: Record, room: planning.Room) -> None:
        """A wish that this machine could not meet were it empty is not worth waiting for."""
        if record.obstacle is not None and isinstance(room, Rooms):
            error = room.refusal(record.entry.name)
            if isinstance(error, BadRequest):
                self._outcomes.refused(record, error)

    def _warm(self, record: Record) -> None:
        """While it waits for room, what it will be loaded from can be read already. Once for each wait."""
        if record.obstacle is not None and record.state == "unloaded" and not record.warmed:
            record.warmed = True
            self._deps.warm(record.entry)

    async def _learn(self, record: Record) -> None:
        """What must be known of a model before it is placed. One that cannot be launched as it is must not keep the
        others from it: it is refused."""
        try:
            await self._look_up(record)
        except ApiError as error:
            self._outcomes.refused(record, error)

    async def _look_up(self, record: Record) -> None:
        for launch_id in record.launches if record.state == "asleep" and record.wake_est_s is None else ():
            with contextlib.suppress(NotFound):  # gone meanwhile
                record.wake_est_s = await self._deps.launches.estimate_wake(launch_id)
        if not record.estimated:
            record.estimated = True
            record.load_est_s = await self._deps.estimate(record.entry) or record.load_est_s
        gpus = record.entry.gpus
        if record.gpu_count is None and gpus.count is None and gpus.ids is None:
            record.gpu_count = await self._deps.smallest(record.entry) or 1

    def _tell_changes(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # What is done

    def _act(self, action: planning.Action, room: planning.Room) -> None:
        record = self.records[action.name]
        seen = self._gathering.seen.get(action.name, NOTHING)
        queues = self._deps.queues
        if record.doing is not None:
            return
        if isinstance(action, planning.Load):
            self._begin(record, "loading", self._work.load(record, _chosen(room, action.name)))
        elif isinstance(action, planning.Wake):
            self._begin(record, "waking", self._work.wake(record, seen))
        elif isinstance(action, planning.Keep):
            for view in seen.launches:
                queues.restore(view.launch_id)
        elif isinstance(action, planning.Retire):
            log.info("%s makes room for %s as soon as nothing runs there", action.name, action.wanted_by)
            for view in seen.launches:
                queues.retire(view.launch_id)
        else:
            self._put_away(record, seen, action)

    def _put_away(self, record: Record, seen: Seen, action: planning.PutAway) -> None:
        for view in seen.launches:
            self._deps.queues.retire(view.launch_id)
        if action.how == "sleep":
            self._begin(record, "falling_asleep", self._work.sleep(record, seen, action.why))
        else:
            self._begin(record, "unloading", self._work.stop(record, seen, action.why))

    def _begin(self, record: Record, doing: Doing, work: Coroutine[Any, Any, None]) -> None:
        name = record.entry.name
        record.doing = doing
        self._stirring.add(name)
        task = asyncio.create_task(work, name=f"{doing} {name}")
        self._operations[name] = task
        task.add_done_callback(lambda done: self._over(name, record, done))

    def _over(self, name: str, record: Record, task: asyncio.Task[None]) -> None:
        record.doing = None
        self._operations.pop(name, None)
        if not task.cancelled() and (cause := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=cause)
            record.retry_at = self._deps.tick() + FAULT_RETRY_S
        self._tell_changes()
        self.kick()


class _NoRoom:
    """Nobody asks."""

    def fits(self, name: str, gone: frozenset[str], coming: tuple[str, ...]) -> bool:  # noqa: ARG002
        return False

    fits_elsewhere = fits


def _chosen(room: planning.Room, name: str) -> tuple[str, ...] | None:
    return room.named(name) if isinstance(room, Rooms) else None


async def _done(task: asyncio.Task[None]) -> None:
    """Wait for its end; the waiter's own does not end it. Raises what it failed with."""
    await asyncio.wait({task})
    if not task.cancelled() and (cause := task.exception()) is not None:
        raise cause


async def _within(seconds: float, event: asyncio.Event) -> None:
    """Wait for the event, at most so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
