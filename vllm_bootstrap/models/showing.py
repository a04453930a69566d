"""A model as readers see it, from its record and its launches. PURE."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_bootstrap.models.record import Doing, Record, Seen, is_outdated
from vllm_bootstrap.models.types import ModelLaunch, ModelProgress, ModelState, ModelView
from vllm_bootstrap.scheduler.ports import Demand
from vllm_bootstrap.serving import LoadReport

_DOING: Mapping[Doing, ModelState] = {
    "loading": "loading",
    "waking": "waking",
    "falling_asleep": "falling_asleep",
    "unloading": "unloading",
}


def state_of(record: Record, seen: Seen, now: float) -> ModelState:
    """1. what is being done with it  2. what its launches are in  3. none, and the last load failed  4. none yet, but
    somebody has asked for it and nothing is in the way  5. unloaded."""
    if record.doing is not None and not (record.doing == "loading" and seen.state == "loaded"):  # 1
        return _DOING[record.doing]
    if seen.state == "loaded":  # 2
        ready = [view for view in seen.launches if view.state == "ready"]
        return "unresponsive" if all(view.unresponsive for view in ready) else "loaded"
    if seen.state in ("loading", "asleep"):
        return "loading" if seen.state == "loading" else "asleep"
    if seen.state == "changing":
        states = {view.state for view in seen.launches}
        return "falling_asleep" if "falling_asleep" in states else "waking" if "waking" in states else "unloading"
    if record.trouble is not None and not record.may_load(now):  # 3
        return "failed"
    about_to = record.asks("realtime", now) is not None and record.obstacle is None and record.may_load(now)
    return "loading" if about_to else "unloaded"  # 4, 5


def why(record: Record, seen: Seen) -> str | None:
    """One sentence about what it waits for, or about its trouble."""
    if record.obstacle is not None and seen.state in ("unloaded", "asleep"):
        return record.obstacle
    if record.trouble is not None and seen.state != "loaded":
        return record.trouble.message
    return "it makes room as soon as nothing runs there" if seen.retired else None


def view_of(
    record: Record,
    seen: Seen,
    demand: Mapping[str, Demand],
    loads: Mapping[str, LoadReport],
    now: float,
) -> ModelView:
    """``demand`` by served name, ``loads`` by launch id, ``now`` of the clock of the records."""
    names = [name for name in record.entry.served_names if name in demand]
    ready = [at for view in seen.launches if (at := view.transitions.get("ready")) is not None]
    ended = [at for at in seen.last_ends.values() if at >= record.ready_at]
    idle = now - max([record.ready_at, *ended]) if seen.state == "loaded" and not seen.in_flight else None
    group = next((view.group_id for view in seen.launches if view.group_size > 1), None)
    return ModelView(
        entry=record.entry,
        state=state_of(record, seen, now),
        why=why(record, seen),
        launches=[_launch(view.launch_id, view.state, loads.get(view.launch_id)) for view in seen.launches],
        group_id=group,
        progress=_progress(seen),
        trouble=record.trouble,
        load_est_s=record.load_est_s,
        wake_est_s=record.wake_est_s,
        waiting={
            "realtime": sum(demand[name].realtime for name in names),
            "batch": sum(demand[name].batch for name in names),
        },
        in_flight=seen.in_flight,
        batch_lines=record.batch_lines,
        idle_s=idle,
        loaded_at=max(ready, default=None) if seen.state == "loaded" else None,
        outdated=is_outdated(record, seen),
    )


def _launch(launch_id: str, state: str, load: LoadReport | None) -> ModelLaunch:
    return ModelLaunch(launch_id, state, sum(load.in_flight.values()) if load is not None else 0)


def _progress(seen: Seen) -> ModelProgress | None:
    for view in seen.launches:
        if view.progress is not None:
            one = view.progress
            return ModelProgress(one.phase, one.fraction, one.elapsed_s, one.eta_s, one.detail)
    return None
