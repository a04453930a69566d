"""Looks at the box once a second, keeps count of its idle time, and has the hook fired when it has been idle for long.

Invariants: one task samples; what it counts is stored at most every ``SAVE_EVERY_S`` and at the end, so a daemon that
is killed loses no more than that. Nobody waits for the hook: it runs beside the sampling, and ``close`` ends it. What
is counted and when something is due is decided by ``idle_time`` and ``idle_alarm``.

It does not know what keeps a box busy (``Seen`` says so), nor what an action does.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import StorageFailed, StorageFull, Unavailable
from vllm_bootstrap.ids import new_id
from vllm_bootstrap.models.idle_alarm import Alarm, Spell
from vllm_bootstrap.models.idle_hook import Action, IdleFacts
from vllm_bootstrap.models.idle_time import (
    BOX,
    ActionView,
    DeviceTime,
    IdleAccount,
    IdleReport,
    Spent,
    Use,
)
from vllm_bootstrap.pulse import until_pulse

log = logging.getLogger(__name__)

SAMPLE_EVERY_S = 1.0
SAVE_EVERY_S = 30.0
DEVICES_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class Seen:
    """The box at one moment. ``busy_because`` None: nothing is done, and nothing that could be waits. ``working``:
    requests are in flight on engines. ``devices`` as ``Look`` was asked for them."""

    busy_because: str | None
    working: bool
    devices: Mapping[str, Use]


Look = Callable[[Sequence[str]], Seen]
Devices = Callable[[], Awaitable[Mapping[str, int]]]
"""All devices now: their UUIDs with their indices. Empty: not known at the moment."""


@dataclass(slots=True)
class _Armed:
    """An action with its alarm and what came of it last. ``event_id`` is of the spell in which it was begun."""

    action: Action
    alarm: Alarm
    last_at: float | None = None
    event: tuple[int, str] = (-1, "")
    task: asyncio.Task[None] | None = field(default=None)


class IdleBox:
    """``start`` once, ``close`` once. ``after_s`` 0: the hook is off. ``count(action, outcome)`` hears of each attempt
    that ended. ``clock`` gives unix seconds, ``monotonic`` seconds that only grow, ``entropy`` bytes for an id."""

    def __init__(
        self,
        db: Database,
        look: Look,
        devices: Devices,
        actions: Sequence[Action],
        *,
        after_s: float,
        node_id: str,
        count: Callable[[str, str], None],
        entropy: Callable[[], bytes],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._db, self._look, self._find_devices = db, look, devices
        self._armed = [_Armed(action, Alarm(after_s)) for action in actions]
        self._after_s, self._node_id, self._count, self._entropy = after_s, node_id, count, entropy
        self._clock, self._monotonic = clock, monotonic
        self._account, self._spell = IdleAccount(), Spell()
        self._since: dict[str, float] = {}
        self._devices: dict[str, int] = {}
        self._busy: str | None = "the daemon has only just started"
        self._found_at = self._saved_at = float("-inf")
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take up what earlier starts counted, then begin to look. Raises what reading the database raises."""
        rows = await self._db.read(_stored)
        self._since = {row["device"]: row["since"] for row in rows}
        self._account = IdleAccount(
            {row["device"]: Spent(row["claimed_s"], row["working_s"], row["idle_s"]) for row in rows}
        )
        self._saved_at = self._monotonic()
        self._task = asyncio.create_task(self._run(), name="idle time")
        self._task.add_done_callback(_tell_failure)

    async def close(self) -> None:
        """End the hook's child if there is one, and store what was counted. Idempotent."""
        if self._task is None:
            return
        tasks = [self._task, *(armed.task for armed in self._armed if armed.task is not None)]
        self._task = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._save()

    async def _run(self) -> None:
        while True:
            await self.tick()
            await asyncio.sleep(until_pulse(SAMPLE_EVERY_S, time.monotonic()))

    async def tick(self) -> None:
        """One look, and what follows from it."""
        if self._monotonic() - self._found_at >= DEVICES_EVERY_S:
            self._devices = dict(await self._find_devices()) or self._devices
            self._found_at = self._monotonic()
        now = self._monotonic()
        seen = self._look(tuple(self._devices))
        box = Use(any(use.claimed for use in seen.devices.values()) or seen.working, seen.working)
        counted = self._account.sample(now, {**seen.devices, BOX: box})
        for device in (*seen.devices, BOX):
            self._since.setdefault(device, self._clock())
        self._busy = seen.busy_because
        self._spell.sample(counted, busy=seen.busy_because is not None)
        for armed in self._armed:
            if armed.alarm.due(self._spell):
                self._fire(armed)
        if now - self._saved_at >= SAVE_EVERY_S:
            self._saved_at = now
            await self._save()

    # The hook

    def _fire(self, armed: _Armed) -> None:
        armed.alarm.begin()
        now, spell = self._clock(), self._spell
        if armed.event[0] != spell.number:
            armed.event = spell.number, new_id("evt_", int(now * 1000), self._entropy())
        facts = IdleFacts(
            event_id=armed.event[1],
            idle_s=spell.idle_s,
            since=now - spell.idle_s,
            after_s=self._after_s,
            attempt=armed.alarm.attempts,
            node_id=self._node_id,
            gpus=len(self._devices),
        )
        log.info("idle for %.0f s: the idle %s begins (attempt %d)", spell.idle_s, armed.action.name, facts.attempt)
        armed.task = asyncio.create_task(self._act(armed, facts), name=f"idle {armed.action.name}")
        armed.task.add_done_callback(_tell_failure)

    async def _act(self, armed: _Armed, facts: IdleFacts) -> None:
        error = await armed.action.run(facts)
        armed.last_at = self._clock()
        armed.alarm.ended(error, self._spell)
        self._count(armed.action.name, "completed" if error is None else "failed")
        if error is None:
            log.info("the idle %s has worked", armed.action.name)
        else:
            log.error("the idle %s has failed (attempt %d): %s", armed.action.name, facts.attempt, error)

    # What was counted

    def report(self) -> IdleReport:
        """As it is now."""
        waits = [armed.alarm.fires_in_s(self._spell) for armed in self._armed]
        return IdleReport(
            idle_s=self._spell.idle_s,
            busy_because=self._busy,
            box=self._device(BOX, None),
            gpus=tuple(self._device(device, index) for device, index in self._devices.items()),
            after_s=self._after_s if self._armed else 0.0,
            fires_in_s=min((wait for wait in waits if wait is not None), default=None),
            actions=tuple(self._action(armed) for armed in self._armed),
        )

    def _action(self, armed: _Armed) -> ActionView:
        alarm = armed.alarm
        return ActionView(armed.action.name, alarm.state(self._spell), alarm.attempts, armed.last_at, alarm.error)

    def _device(self, device: str, index: int | None) -> DeviceTime:
        since = self._since.get(device, self._clock())
        return DeviceTime(device, index, since, self._account.total(device), self._account.this_start(device))

    async def _save(self) -> None:
        rows = [
            (device, self._since[device], spent.claimed_s, spent.working_s, spent.idle_s)
            for device, spent in self._account.totals().items()
        ]
        try:
            await self._db.write(partial(_store, rows=rows))
        except (StorageFull, StorageFailed, Unavailable) as exc:
            log.warning("idle time cannot be stored: %s", exc)


def _stored(conn: sqlite3.Connection) -> list[sqlite3.Row]:
    return conn.execute("SELECT device, since, claimed_s, working_s, idle_s FROM idle_time").fetchall()


def _store(conn: sqlite3.Connection, rows: Sequence[tuple[str, float, float, float, float]]) -> None:
    conn.executemany(
        "INSERT INTO idle_time (device, since, claimed_s, working_s, idle_s) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (device) DO UPDATE SET claimed_s = excluded.claimed_s, working_s = excluded.working_s, "
        "idle_s = excluded.idle_s",
        rows,
    )


def _tell_failure(task: asyncio.Task[None]) -> None:
    """Nothing of this may fail; if it does, what is missing in the figures must not be a riddle."""
    if not task.cancelled() and (exc := task.exception()) is not None:
        log.critical("%s has failed", task.get_name(), exc_info=exc)
