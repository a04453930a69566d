"""What the keeper of models asks of others, described from its point of view. PURE: interfaces only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.gpus.readings import Snapshot
from vllm_bootstrap.launches.types import GroupView, LaunchOrder, LaunchView, StopOutcome
from vllm_bootstrap.models.planning import Policy
from vllm_bootstrap.models.types import Group, ModelEntry, OnDemand
from vllm_bootstrap.scheduler.ports import Demand
from vllm_bootstrap.serving import LoadReport, RequestClass


class Launches(Protocol):
    """All launches. Raise ``ApiError``."""

    async def launch(self, order: LaunchOrder, owner_id: str) -> LaunchView: ...

    async def launch_group(self, order: LaunchOrder, owner_id: str) -> GroupView: ...

    def get(self, launch_id: str) -> LaunchView: ...

    def list(self, *, include_ended: bool) -> Sequence[LaunchView]: ...

    async def stop(self, launch_id: str, *, wait: bool = True, force: bool = False) -> StopOutcome: ...

    def can_sleep(self, launch_id: str) -> bool: ...

    async def sleep(self, launch_id: str, level: int) -> object:
        """Returns when it is seen asleep. Raises when it is not; it is then as it was, or gone."""

    async def wake(self, launch_id: str) -> object:
        """Returns when it answers. Raises ``GpuConflict`` when its GPUs are somebody else's by now."""

    async def estimate_wake(self, launch_id: str) -> float | None:
        """Seconds a wake takes, None when there was none of the kind."""

    async def own_pids(self, snapshot: Snapshot) -> frozenset[int] | None: ...


class Queues(Protocol):
    """Who waits and who runs, from memory. Times are of the clock of the event loop."""

    def demand(self) -> Mapping[str, Demand]: ...

    def load(self, launch_id: str) -> LoadReport: ...

    def last_ends(self, launch_id: str) -> Mapping[RequestClass, float]: ...

    def is_retired(self, launch_id: str) -> bool: ...

    def retire(self, launch_id: str) -> None: ...

    def restore(self, launch_id: str) -> None: ...

    def refuse(self, name: str, error: ApiError) -> None: ...

    def prospects_changed(self) -> None: ...


class Book(Protocol):
    """The catalogue."""

    def entries(self) -> Mapping[str, ModelEntry]:
        """By name."""

    def groups(self) -> Sequence[Group]: ...

    def find(self, name: str) -> ModelEntry | None:
        """Whose engine serves that name: its own, an alias, an adapter."""

    def adhoc(self, name: str) -> ModelEntry | None:
        """The entry of a model that is only known from a request; None for what can be no model's name."""

    def order_of(
        self, entry: ModelEntry, *, gpu_count: int | None = None, gpu_ids: Sequence[int | str] | None = None
    ) -> LaunchOrder: ...

    def fingerprint(self, entry: ModelEntry) -> str:
        """What tells its launches from those of another state of the entry."""


class Devices(Protocol):
    async def snapshot(self, max_age_s: float = 1.0) -> Snapshot: ...


class Unsettled(Protocol):
    @property
    def unsettled(self) -> Mapping[str, str]: ...


class Tally(Protocol):
    """Who counts what happens to models."""

    def loaded(self, name: str, how: Literal["start", "wake"], seconds: float) -> None: ...

    def load_failed(self, name: str, failure_class: str) -> None: ...

    def put_away(self, name: str, how: Literal["stop", "sleep"], why: str) -> None: ...


@dataclass(frozen=True, slots=True)
class KeeperConfig:
    """Settings of the same names; seconds. ``externals``: engines that run elsewhere and need no place here."""

    on_demand: OnDemand
    policy: Policy
    ttl_s: float
    asleep_ttl_s: float
    backoff_s: float
    backoff_max_s: float
    busy_bytes: int
    replicas_max: int
    externals: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class KeeperDeps:
    """``smallest(entry)``: on how few GPUs it fits, None where that is not known. ``estimate(entry)``: what a load
    takes, seconds. ``batch_lines()``: lines of batches by model name. ``tick``: the loop's clock, ``clock``: unix.
    ``warm(entry)``: it will be loaded as soon as there is room; get its files ready. Does not block or raise."""

    launches: Launches
    queues: Queues
    book: Book
    devices: Devices
    ledger: Ledger
    gpus: Unsettled
    smallest: Callable[[ModelEntry], Awaitable[int | None]]
    estimate: Callable[[ModelEntry], Awaitable[float | None]]
    batch_lines: Callable[[], Mapping[str, int]]
    tally: Tally
    tick: Callable[[], float]
    clock: Callable[[], float]
    warm: Callable[[ModelEntry], None] = lambda _entry: None
