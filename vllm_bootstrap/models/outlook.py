"""What may come, for the scheduler and the data plane: who is worth waiting for, how long, and why not yet.

Implements ``scheduler.ports.Prospects``. Invariant: it answers from memory and decides nothing; what it passes on to
the keeper is only that somebody asked.
"""

from __future__ import annotations

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.models.keeper import Keeper
from vllm_bootstrap.models.ports import KeeperConfig, KeeperDeps
from vllm_bootstrap.models.record import COMES_BACK_S, Record, Seen, refusal
from vllm_bootstrap.serving import RequestClass


class Outlook:
    """See the module."""

    def __init__(self, config: KeeperConfig, deps: KeeperDeps, keeper: Keeper) -> None:
        self._on_demand, self._deps, self._keeper = config.on_demand, deps, keeper

    def base_of(self, name: str) -> str | None:
        record = None if self._on_demand == "off" else self._keeper.record_of(name)
        return None if record is None else record.entry.source

    def refusal(self, name: str) -> ApiError | None:
        record = self._keeper.record_of(name)
        return None if record is None else refusal(record, self._deps.tick())

    def asked(self, name: str, cls: RequestClass, *, comes_back: bool) -> None:
        if comes_back:
            self._keeper.ask(name, cls, COMES_BACK_S)
        else:
            self._keeper.kick()

    def ready_in_s(self, name: str) -> float | None:
        record = self._keeper.record_of(name)
        return None if record is None else self._ready_in_s(record, self._keeper.seen(record.entry.name))

    def _ready_in_s(self, record: Record, seen: Seen) -> float | None:
        if seen.state == "asleep" and record.wake_est_s is not None:
            return record.wake_est_s
        if seen.state == "loading":
            known = [view.progress.eta_s for view in seen.launches if view.progress is not None]
            eta = min((one for one in known if one is not None), default=None)
            if eta is not None:
                return eta
            if record.began_at is not None and record.load_est_s is not None:
                return max(1.0, record.load_est_s - (self._deps.tick() - record.began_at))
        return record.load_est_s

    def waits_for(self, name: str) -> str | None:
        record = self._keeper.record_of(name)
        if record is None or record.doing == "loading":
            return None
        if record.state == "loaded" and record.doing is None:
            seen = self._keeper.seen(record.entry.name)
            return "it makes room for another model" if seen.retired else "its engine does not respond at present"
        return record.obstacle

    # For streams that show how far a load is

    def wants_progress(self, name: str) -> bool:
        """Whether streams of this model show it without being asked to."""
        record = self._keeper.record_of(name)
        return record is not None and record.entry.show_loading

    def progress_of(self, name: str) -> str | None:
        """One line about the load of a model that nothing serves now; None where nothing is to be loaded."""
        record = self._keeper.record_of(name)
        if record is None:
            return None
        seen = self._keeper.seen(record.entry.name)
        if seen.state == "loaded" and not seen.retired:
            return None
        left = self._ready_in_s(record, seen)
        rest = "" if left is None else f", about {max(1, round(left))} s left"
        if record.obstacle is not None and seen.state != "loading":
            return f"waiting to load {record.entry.name}: {record.obstacle}"
        if seen.state == "asleep" or record.doing == "waking":
            return f"waking {record.entry.name}{rest}"
        return f"loading {record.entry.name}{_phase(seen)}{rest}"


def _phase(seen: Seen) -> str:
    for view in seen.launches:
        if view.progress is not None and view.progress.phase is not None:
            part = "" if view.progress.fraction is None else f" {view.progress.fraction:.0%}"
            return f": {view.progress.phase.replace('_', ' ')}{part}"
    return ""
