"""What became of loads: noticed from what launches say, remembered in the records, told to who waits.

Invariant: each failure of a launch is noticed once, and everybody who waits for its model then is refused with it; a
model that is loaded has no failures. Nothing here begins anything.
"""

from __future__ import annotations

import contextlib
import logging
import math

from vllm_bootstrap.errors import ApiError, BadRequest, ModelNotFound, NotFound, StorageFull
from vllm_bootstrap.launches.types import LaunchView
from vllm_bootstrap.models.ports import KeeperConfig, KeeperDeps
from vllm_bootstrap.models.record import Record, Seen, refusal
from vllm_bootstrap.models.types import ModelTrouble

log = logging.getLogger(__name__)

OBSTACLE_RETRY_S = 2.0
"""After a launch was refused for something that passes."""


class Outcomes:
    """See the module."""

    def __init__(self, config: KeeperConfig, deps: KeeperDeps) -> None:
        self._config, self._deps = config, deps

    def note(self, record: Record, seen: Seen) -> bool:
        """Take in what is seen of a model now. Whether that is news to readers."""
        now = self._deps.tick()
        before, record.state = record.state, seen.state
        if before != seen.state:
            record.since = now
        if seen.state == "asleep":
            record.slept = frozenset(view.launch_id for view in seen.launches)
        gone = record.launches - {view.launch_id for view in seen.launches}
        record.launches = frozenset(view.launch_id for view in seen.launches)
        if seen.state == "loaded":
            if before != "loaded":
                self._loaded(record, now)
            if seen.in_flight or any(at >= record.ready_at for at in seen.last_ends.values()):
                record.asked.clear()  # whoever was told to come back has had the time to
            return before != seen.state  # where one engine serves, the end of another is its launch's to tell
        if seen.state == "loading" and record.began_at is None:
            record.began_at = now
        for view in seen.launches:
            if view.failure is not None and view.next_attempt_at is not None:
                self._failed(record, view.launch_id, max(0.0, view.next_attempt_at - self._deps.clock()))
        for launch_id in gone:
            self._ended(record, launch_id)
        return before != seen.state

    def _loaded(self, record: Record, now: float) -> None:
        if record.began_at is not None and record.doing != "waking":
            record.load_est_s = now - record.began_at
            self._deps.tally.loaded(record.entry.name, "start", record.load_est_s)
        record.began_at = record.trouble = record.retry_at = record.obstacle = None
        record.slept = frozenset()
        record.failures, record.cut_short, record.down, record.warmed, record.ready_at = 0, 0, False, False, now
        record.loaded_for_whom(now)

    def _ended(self, record: Record, launch_id: str) -> None:
        record.began_at = None
        with contextlib.suppress(NotFound):
            view = self._deps.launches.get(launch_id)
            if view.state == "stopped" and launch_id not in record.stopped:
                record.down = True  # by an operator, who does not want to see it come back by itself
            if view.state == "failed" and view.failure is not None and self._died_asleep(record, view):
                log.warning("%s slept, and is unloaded now: %s", record.entry.name, view.failure.message)
                record.obstacle = record.retry_at = None
            elif view.state == "failed" and view.failure is not None:
                record.failures += 1
                wait = min(self._config.backoff_max_s, self._config.backoff_s * 2 ** (record.failures - 1))
                self._failed(record, launch_id, math.inf if view.failure.permanent else wait)

    def _died_asleep(self, record: Record, view: LaunchView) -> bool:
        """Whether it ended without having been woken: no load has failed, and the next one may come at once."""
        failure = view.failure
        return view.launch_id in record.slept and failure is not None and failure.failure_class != "wake_failed"

    def _failed(self, record: Record, launch_id: str, retry_in_s: float) -> None:
        """A launch of it has failed: whoever waits is told."""
        view = self._deps.launches.get(launch_id)
        failure, known = view.failure, record.trouble
        assert failure is not None  # noqa: S101 - callers have looked
        if known is not None and (known.launch_id, known.at) == (launch_id, view.changed_at):
            return
        at = None if math.isinf(retry_in_s) else self._deps.clock() + retry_in_s
        kind, message, hint = failure.failure_class, failure.message, failure.hint
        self._trouble(record, ModelTrouble(kind, message, hint, view.changed_at, at, launch_id), retry_in_s)

    def refused(self, record: Record, error: ApiError) -> None:
        """A launch was not accepted: for good, or for something that passes."""
        record.began_at = None
        if isinstance(error, BadRequest) and error.retry_after is None:
            hint = "Correct its entry in the catalogue."
            trouble = ModelTrouble(error.code, error.message, hint, self._deps.clock(), None)
            self._trouble(record, trouble, math.inf)
            return
        record.obstacle = error.message.rstrip(".")
        record.retry_at = self._deps.tick() + (error.retry_after or OBSTACLE_RETRY_S)
        for served in record.entry.served_names if isinstance(error, StorageFull) else ():
            self._deps.queues.refuse(served, error)  # nothing that goes on here makes room on a disk

    def removed(self, record: Record) -> None:
        """The catalogue has changed, the record not yet: who waits for a name that is no model's any more is told so,
        also where any name may be asked for: what was asked for is not there any more."""
        for served in record.entry.served_names if record.entry.origin != "request" else ():
            if self._deps.book.find(served) is None:
                error = ModelNotFound(f"The model {served!r} was taken out of the catalogue.", param="model")
                self._deps.queues.refuse(served, error)

    def cut_short(self, record: Record) -> None:
        """Its load is ended on purpose. The next one comes at once; when that happens again and again without any load
        that came to its end, later and later: a loop of somebody else's must not become one of processes."""
        if record.cut_short:
            wait = min(self._config.backoff_max_s, self._config.backoff_s * 2 ** (record.cut_short - 1))
            record.retry_at = max(record.retry_at or 0.0, self._deps.tick() + wait)
            record.obstacle = "its loads were ended again and again before they were done"
        record.cut_short += 1

    def _trouble(self, record: Record, trouble: ModelTrouble, retry_in_s: float) -> None:
        record.trouble, record.retry_at = trouble, self._deps.tick() + retry_in_s
        record.obstacle = None
        record.asked.clear()
        name = record.entry.name
        log.warning("The model %s could not be loaded: %s", name, trouble.message)
        self._deps.tally.load_failed(name, trouble.failure_class)
        error = refusal(record, self._deps.tick())
        if error is not None:
            for served in record.entry.served_names:
                self._deps.queues.refuse(served, error)
