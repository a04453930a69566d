"""What is there, who waits, who runs: facts for the plan, out of launches, queues and records. Reads only, never waits.

Invariant: what is said of one moment was seen in one turn of the event loop.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.gpus.placement import PlacementWish
from vllm_bootstrap.launches.types import LaunchView
from vllm_bootstrap.models.planning import Facts, State
from vllm_bootstrap.models.ports import KeeperConfig, KeeperDeps
from vllm_bootstrap.models.record import NOTHING, Record, Seen, by_model, is_outdated, others_serving, state_of
from vllm_bootstrap.models.rooms import Need
from vllm_bootstrap.scheduler.ports import Demand
from vllm_bootstrap.serving import RequestClass

UNKNOWN_LOAD_S = 30.0
"""Taken for a load whose duration nobody knows yet."""


class _Waiting(NamedTuple):
    """Of one class: how many, and for how long the first of them."""

    number: int = 0
    longest_s: float = 0.0


class Gathering:
    """``seen``: the last look, by model."""

    def __init__(self, deps: KeeperDeps) -> None:
        self._deps = deps
        self.seen: dict[str, Seen] = {}
        self._others: frozenset[str] = frozenset()
        self._had_lines: frozenset[str] = frozenset()

    def look(self) -> Mapping[str, Seen]:
        """All models that have launches."""
        views = self._deps.launches.list(include_ended=False)
        self._others = others_serving(views)
        self.seen = {name: self._seen(launches) for name, launches in by_model(views).items()}
        return self.seen

    def _seen(self, launches: list[LaunchView]) -> Seen:
        queues = self._deps.queues
        running: dict[str, int] = {"realtime": 0, "batch": 0}
        ends: dict[RequestClass, float] = {}
        for view in launches:
            for cls, number in queues.load(view.launch_id).in_flight.items():
                running[cls] += number
            for kind, at in queues.last_ends(view.launch_id).items():
                ends[kind] = max(at, ends.get(kind, 0.0))
        retired = any(queues.is_retired(view.launch_id) for view in launches)
        return Seen(tuple(launches), state_of(launches), running["realtime"], running["batch"], retired, ends)

    def facts(
        self, records: Mapping[str, Record], stirring: Collection[str], config: KeeperConfig, *, on_demand: bool
    ) -> list[Facts]:
        """One for each record that a plan can have to do with, as of the last look: most models of a long catalogue
        are not loaded and nobody wants them. ``stirring``: those of which something other than launches, queues and
        lines may say that they are wanted."""
        demand = self._by_model(self._deps.queues.demand(), records) if on_demand else {}
        lines = self._lines(records) if on_demand else {}
        concerned = {*self.seen, *demand, *lines, *self._had_lines, *stirring}
        self._had_lines = frozenset(lines)
        return [
            self._fact(name, records[name], self.seen.get(name, NOTHING), demand.get(name), lines.get(name, 0), config)
            for name in sorted(concerned)
            if name in records
        ]

    def _by_model(self, demand: Mapping[str, Demand], records: Mapping[str, Record]) -> dict[str, list[Demand]]:
        found: dict[str, list[Demand]] = {}
        for served, one in demand.items():
            name = self._model_of(served, records)
            if name is not None and not (served in self._others and name not in self.seen):
                found.setdefault(name, []).append(one)
        return found

    def _lines(self, records: Mapping[str, Record]) -> dict[str, int]:
        found: dict[str, int] = {}
        for served, number in self._deps.batch_lines().items():
            name = self._model_of(served, records)
            if number and name is not None and not (served in self._others and name not in self.seen):
                found[name] = found.get(name, 0) + number
        return found

    def _model_of(self, served: str, records: Mapping[str, Record]) -> str | None:
        entry = self._deps.book.find(served)
        if entry is not None:
            return entry.name
        return served if served in records else None

    def _fact(
        self, name: str, record: Record, seen: Seen, demand: list[Demand] | None, lines: int, config: KeeperConfig
    ) -> Facts:
        now, entry = self._deps.tick(), record.entry
        realtime, batch = self._waiting(record, demand or [], lines, now)
        loaded_s = now - record.since
        idle_s = min([loaded_s, *(now - at for at in seen.last_ends.values())])
        quiet_s = now - seen.last_ends["realtime"] if "realtime" in seen.last_ends else math.inf
        record.batch_lines = lines
        return Facts(
            name=name,
            state=self._state(record, seen),
            realtime=realtime.number,
            batch=batch.number,
            waits_s=realtime.longest_s,
            batch_waits_s=batch.longest_s,
            running=seen.running,
            running_batch=seen.running_batch,
            retired=seen.retired,
            idle_s=idle_s,
            quiet_s=quiet_s,
            loaded_s=loaded_s,
            reload_s=record.load_est_s or UNKNOWN_LOAD_S,
            load_s=record.load_est_s or 0.0,
            ttl_s=config.ttl_s if entry.ttl_s is None else entry.ttl_s,
            asleep_ttl_s=config.asleep_ttl_s,
            priority=entry.priority,
            absent=self._absent(record, demand or [], lines, realtime.number, now),
            pin=entry.pin,
            preload=entry.preload and not record.down,
            may_load=record.may_load(now),
            can_sleep=self._can_sleep(record, seen),
            outdated=is_outdated(record, seen),
        )

    def _state(self, record: Record, seen: Seen) -> State:
        if record.doing == "loading":
            return "loading" if seen.state in ("unloaded", "loading") else seen.state
        return seen.state if record.doing is None else "changing"

    def _waiting(self, record: Record, demand: Iterable[Demand], lines: int, now: float) -> tuple[_Waiting, _Waiting]:
        realtime, batch = self._asking(record, "realtime", now), self._asking(record, "batch", now)
        for one in demand:
            realtime = _more(realtime, one.realtime, one.since, now)
            batch = _more(batch, one.batch, one.batch_since, now)
        record.batch_since = (record.batch_since or now) if lines else None
        return realtime, _more(batch, lines, record.batch_since, now)

    def _absent(self, record: Record, demand: Iterable[Demand], lines: int, realtime: int, now: float) -> bool:
        """Whether nobody of the class that it is wanted for stands here: in a queue, with lines, or as an operator."""
        asked = record.asks("realtime" if realtime else "batch", now)
        if asked is None or asked.stands:
            return False
        return not (any(one.realtime for one in demand) if realtime else lines or any(one.batch for one in demand))

    def _asking(self, record: Record, cls: RequestClass, now: float) -> _Waiting:
        asked = record.asks(cls, now)
        return _Waiting() if asked is None else _Waiting(1, now - asked.since)

    def _can_sleep(self, record: Record, seen: Seen) -> bool:
        if not record.entry.sleep or seen.state != "loaded":
            return False
        return all(self._deps.launches.can_sleep(view.launch_id) for view in seen.launches)


def _more(known: _Waiting, count: int, since: float | None, now: float) -> _Waiting:
    longest = known.longest_s if since is None else max(known.longest_s, now - since)
    return _Waiting(known.number + count, longest)


def needs_of(
    records: Mapping[str, Record], seen: Mapping[str, Seen], ledger: Ledger, externals: frozenset[str]
) -> dict[str, Need]:
    """What each model asks for in GPUs."""
    return {name: _need(record, seen.get(name, NOTHING), ledger, externals) for name, record in records.items()}


def _need(record: Record, seen: Seen, ledger: Ledger, externals: frozenset[str]) -> Need:
    entry = record.entry
    ids = [view.launch_id for view in seen.launches]
    claims = tuple(each.claim for one in ids for each in ledger.parked(one)) if seen.state == "asleep" else ()
    wish = PlacementWish(
        gpu_ids=entry.gpus.ids,
        gpu_count=entry.gpus.count or (record.gpu_count if entry.gpus.ids is None else None),
        gpu_share=entry.gpus.share,
        tensor_parallel_size=entry.args.get("tensor_parallel_size"),
        pipeline_parallel_size=entry.args.get("pipeline_parallel_size"),
    )
    return Need(wish, entry.replicas, entry.gpus.min_memory, frozenset(ids), claims, entry.engine in externals)
