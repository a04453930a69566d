"""What the keeper remembers of each model beside its launches: who asked, what is being done, what went wrong. PURE.

Invariant: a record says nothing about whether a model is loaded; its launches say that (``Seen``). Times are of one
monotonic clock unless they say otherwise. Nothing here decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from vllm_bootstrap.errors import ApiError, ModelFailed
from vllm_bootstrap.launches.types import LaunchView
from vllm_bootstrap.models.orders import MODEL_LABEL, ORDER_LABEL
from vllm_bootstrap.models.planning import State
from vllm_bootstrap.models.types import ModelEntry, ModelTrouble
from vllm_bootstrap.serving import RequestClass

COMES_BACK_S = 75.0
"""So long somebody who was told to come again later counts as waiting: the longest ``Retry-After``, and a bit."""

Doing = Literal["loading", "waking", "falling_asleep", "unloading"]


@dataclass(slots=True)
class Asked:
    """Somebody wants it and does not wait in a queue: since when, and until when that counts. ``stands``: somebody
    stands behind it (an operator has asked), instead of having been told to come back."""

    since: float
    until: float
    stands: bool = False


@dataclass(slots=True)
class Record:
    """One model. ``fingerprint``: of the order that its entry means now. ``obstacle``: what its load waits for.
    ``retry_at``: not before then after a failure, None when it may be tried now; infinity: not by itself. ``down``: an
    operator has unloaded it, so it is not preloaded again; ``hurry``: without waiting for what runs there.
    ``cut_short``: loads in a row that were ended on purpose before they were done.
    ``since``: when it was seen to enter its state. ``stopped``: launches that were ended on purpose. ``slept``: those
    that were asleep when it was last seen so, and have not served since. ``warmed``: its
    files were read ahead for the load that is waited for. ``began_at``, ``ready_at``: of the last load.
    ``load_est_s``: what a load takes, as far as is known."""

    entry: ModelEntry
    fingerprint: str
    asked: dict[RequestClass, Asked] = field(default_factory=dict)
    batch_since: float | None = None
    batch_lines: int = 0
    doing: Doing | None = None
    obstacle: str | None = None
    trouble: ModelTrouble | None = None
    failures: int = 0
    cut_short: int = 0
    retry_at: float | None = None
    down: bool = False
    hurry: bool = False
    warmed: bool = False
    began_at: float | None = None
    ready_at: float = 0.0
    launches: frozenset[str] = frozenset()
    stopped: frozenset[str] = frozenset()
    slept: frozenset[str] = frozenset()
    since: float = 0.0
    state: State = "unloaded"
    gpu_count: int | None = None
    estimated: bool = False
    load_est_s: float | None = None
    wake_est_s: float | None = None

    def ask(self, cls: RequestClass, now: float, lasting_s: float, *, stands: bool = False) -> None:
        """It is wanted for so long."""
        known = self.asked.get(cls)
        if known is None or known.until < now:
            self.asked[cls] = Asked(now, now + lasting_s, stands)
        else:
            known.stands = known.stands or stands
            known.until = max(known.until, now + lasting_s)

    def asks(self, cls: RequestClass, now: float) -> Asked | None:
        """Who wants it and does not wait in a queue, None where nobody does (any more)."""
        known = self.asked.get(cls)
        return known if known is not None and known.until > now else None

    def stirs(self, now: float) -> bool:
        """Whether something is being done with it or somebody may want it, as far as a record can tell. What is to be
        preloaded always does: it may become wanted without anybody asking."""
        if self.doing is not None or self.entry.preload:
            return True
        return any(asked.until > now for asked in self.asked.values())

    def loaded_for_whom(self, now: float) -> None:
        """It is loaded: those who were told to come back may take as long as that, an operator had only this wish."""
        for asked in self.asked.values():
            asked.stands = False
            if asked.until - now > COMES_BACK_S:
                asked.until = now

    def may_load(self, now: float) -> bool:
        return self.retry_at is None or self.retry_at <= now


class Seen(NamedTuple):
    """A model's launches at one moment. ``last_ends``: when a request of a class ended there last."""

    launches: tuple[LaunchView, ...] = ()
    state: State = "unloaded"
    running: int = 0
    running_batch: int = 0
    retired: bool = False
    last_ends: Mapping[RequestClass, float] = {}

    @property
    def in_flight(self) -> int:
        return self.running + self.running_batch


NOTHING = Seen()


def state_of(launches: Sequence[LaunchView]) -> State:
    """What its launches make of a model; the first that any of them is in: ready, starting, asleep, on its way out."""
    states = {view.state for view in launches}
    if not states:
        return "unloaded"
    if "ready" in states:
        return "loaded"
    if "bootstrapping" in states:
        return "loading"
    return "asleep" if "asleep" in states else "changing"


def by_model(views: Iterable[LaunchView]) -> dict[str, list[LaunchView]]:
    """Those launches that were made for models, by model."""
    found: dict[str, list[LaunchView]] = {}
    for view in views:
        name = view.labels.get(MODEL_LABEL)
        if name is not None:
            found.setdefault(name, []).append(view)
    return found


def others_serving(views: Iterable[LaunchView]) -> frozenset[str]:
    """Names served by launches that are nobody's but an operator's."""
    return frozenset(view.served_model_name for view in views if MODEL_LABEL not in view.labels)


def is_outdated(record: Record, seen: Seen) -> bool:
    """Whether its engine was ordered by another state of its entry."""
    return any(view.labels.get(ORDER_LABEL) != record.fingerprint for view in seen.launches)


def refusal(record: Record, now: float) -> ApiError | None:
    """Why a request for it must not wait: its last load has failed, and the next one is not due."""
    trouble = record.trouble
    if trouble is None or record.may_load(now):
        return None
    retry = record.retry_at if record.retry_at is not None and math.isfinite(record.retry_at) else None
    failure = {"class": trouble.failure_class, "hint": trouble.hint, "launch_id": trouble.launch_id}
    return ModelFailed(
        f"The model {record.entry.name!r} cannot be used at present: {trouble.message} {trouble.hint}".strip(),
        retry_after=None if retry is None else retry - now,
        should_retry=None if retry is not None else False,
        details={"failure": failure},
    )
