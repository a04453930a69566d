"""What takes time: loading a model, putting it to sleep, waking it, ending it. Each is one coroutine.

Invariant: an operation ends when the launches say that it is done, or were refused; it leaves nothing behind that the
next look at the launches would not show. Nothing here decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.models.outcomes import Outcomes
from vllm_bootstrap.models.ports import KeeperDeps
from vllm_bootstrap.models.record import Record, Seen

log = logging.getLogger(__name__)

OWNER = "catalogue"
"""Who launches on behalf of the catalogue, in the history of launches."""


class Operations:
    """See the module."""

    def __init__(self, deps: KeeperDeps, outcomes: Outcomes) -> None:
        self._deps, self._outcomes = deps, outcomes

    async def load(self, record: Record, gpu_ids: tuple[str, ...] | None) -> None:
        """Returns when the launch is accepted, or refused. On how few GPUs it fits is asked anew for the next one: its
        files may be there by then."""
        entry, deps = record.entry, self._deps
        record.began_at, record.obstacle = deps.tick(), None
        try:
            order = deps.book.order_of(entry, gpu_count=record.gpu_count, gpu_ids=gpu_ids)
            if order.replicas == 1:
                await deps.launches.launch(order, OWNER)
            else:
                await deps.launches.launch_group(order, OWNER)
        except ApiError as error:
            self._outcomes.refused(record, error)
        finally:
            record.gpu_count = None

    async def sleep(self, record: Record, seen: Seen, why: str) -> None:
        """Returns when it sleeps, or has ended because it could not."""
        name, level = record.entry.name, record.entry.sleep
        try:
            for view in seen.launches:
                await self._deps.launches.sleep(view.launch_id, level)
        except ApiError as error:
            log.warning("%s cannot sleep and is unloaded instead: %s", name, error.message)
            record.doing = "unloading"
            await self.stop(record, seen, why)
            return
        self._deps.tally.put_away(name, "sleep", why)
        log.info("%s sleeps (%s)", name, why)

    async def wake(self, record: Record, seen: Seen) -> None:
        """Returns when it answers, or could not be woken."""
        began = self._deps.tick()
        try:
            for view in seen.launches:
                await self._deps.launches.wake(view.launch_id)
        except ApiError as error:
            log.warning("%s could not be woken: %s", record.entry.name, error.message)
            self._outcomes.refused(record, error)
        else:
            record.wake_est_s = self._deps.tick() - began
            self._deps.tally.loaded(record.entry.name, "wake", record.wake_est_s)

    async def stop(self, record: Record, seen: Seen, why: str, *, force: bool = False) -> None:
        """Returns when its processes are dead and its GPUs are free (or given up)."""
        ids = _to_stop(seen)
        if record.state == "loading":
            self._outcomes.cut_short(record)
        record.stopped = frozenset(view.launch_id for view in seen.launches)
        await asyncio.gather(*(self._deps.launches.stop(launch_id, force=force) for launch_id in ids))
        self._deps.tally.put_away(record.entry.name, "stop", why)
        log.info("%s is unloaded (%s)", record.entry.name, why)


def _to_stop(seen: Seen) -> Iterable[str]:
    """A group at once, by its id."""
    return sorted({view.group_id if view.group_size > 1 else view.launch_id for view in seen.launches})
