"""What routes may call: one bundle of collaborators, described from the routes' point of view.

Invariant: routes reach the rest of the daemon only through this bundle. It holds no behaviour of its own beyond
saying whether the daemon can serve and what waits. Knows nothing of HTTP requests.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Protocol

from fastapi import Depends
from starlette.requests import Request

from vllm_bootstrap.activity import ActivityFilter, ActivityRow, UsageRow
from vllm_bootstrap.api import views
from vllm_bootstrap.api.model_desk import ModelDesk
from vllm_bootstrap.auth import scopes
from vllm_bootstrap.auth.guard import Guard
from vllm_bootstrap.auth.keys import KeyRing
from vllm_bootstrap.auth.sessions import Sessions
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.batches.types import BatchEvent, BatchView, FileRow, ItemView, NewBatch, NewItem
from vllm_bootstrap.errors import ApiError, Draining, Unavailable
from vllm_bootstrap.gateway.inflight import RequestInfo
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.gpus.readings import Snapshot
from vllm_bootstrap.launches.logs import LogReader
from vllm_bootstrap.launches.types import EventView, GroupView, LaunchOrder, LaunchView, StopOutcome
from vllm_bootstrap.metrics import Metrics
from vllm_bootstrap.models.idle_time import IdleReport
from vllm_bootstrap.scheduler.ports import BudgetReport
from vllm_bootstrap.serving import Advert, LoadReport
from vllm_bootstrap.settings import Settings


class Launches(Protocol):
    """All launches. ``get``, ``group`` and ``list`` answer at once from memory; unknown ids raise ``NotFound``. Where
    nothing else is said, the id of a group of replicas stands for all its launches."""

    async def launch(self, order: LaunchOrder, owner_id: str, idempotency_key: str | None = None) -> LaunchView:
        """Accept a launch; on disk when this returns. The same key again returns the same launch."""

    async def launch_group(self, order: LaunchOrder, owner_id: str, idempotency_key: str | None = None) -> GroupView:
        """The same for an order with ``replicas`` other than 1: all of them are accepted, or none."""

    def get(self, launch_id: str) -> LaunchView:
        """One launch. Raises ``BadRequest`` for a group, which names its launches."""

    def group(self, group_id: str) -> GroupView | None:
        """A group of replicas, None when this is not the id of one."""

    def list(self, *, include_ended: bool, group: str | None = None) -> Sequence[LaunchView]:
        """Newest first."""

    async def events(self, launch_id: str, after_seq: int, limit: int) -> Sequence[EventView]:
        """History, oldest first."""

    def watch(self, launch_id: str, after_seq: int = 0) -> AsyncIterator[EventView]:
        """History, then news, until the launch has ended."""

    def log_reader(self, launch_id: str, attempt: int | None = None) -> LogReader: ...

    def log_ended(self, launch_id: str, attempt: int | None = None) -> bool: ...

    async def stop(self, launch_id: str, *, wait: bool = True, force: bool = False) -> StopOutcome:
        """Idempotent. With ``wait``, returns when the tree is seen dead."""

    async def delete(self, launch_id: str) -> None:
        """Forget an ended launch. Raises ``Conflict`` while it has not ended."""

    async def own_pids(self, snapshot: Snapshot) -> frozenset[int] | None:
        """All processes of our launches, None where that is not known or not needed."""

    async def dropped_log_bytes(self) -> int:
        """Bytes of output that the logs of active launches could not take. Answers within about a second."""


class Traffic(Protocol):
    """Requests in flight and queued, from memory."""

    def load(self, launch_id: str) -> LoadReport: ...

    def queues(self) -> dict[str, LoadReport]: ...

    def adverts(self) -> list[Advert]: ...

    def budgets(self) -> Mapping[str, BudgetReport]:
        """What batch may use of each launch, by its id."""


class Underway(Protocol):
    """Requests of the data plane that have begun and not ended, from memory."""

    def list(self) -> Sequence[RequestInfo]:
        """Oldest first."""

    def get(self, request_id: str, /) -> RequestInfo | None: ...

    def cancel(self, request_id: str, /) -> bool:
        """End it. False: there is none of that id."""


class History(Protocol):
    """Finished requests. Reading raises ``NotFound`` where no history is kept; ``off`` says why."""

    off: str
    dropped: int

    async def page(
        self, wanted: ActivityFilter, *, after: int | None = None, limit: int = 100
    ) -> tuple[Sequence[ActivityRow], bool]:
        """Newest first, and whether there are more."""

    async def usage(self, since: float | None = None) -> tuple[Sequence[UsageRow], float | None]:
        """Sums, and when the oldest request began that the history holds."""


class Devices(Protocol):
    async def snapshot(self, max_age_s: float = 1.0) -> Snapshot:
        """The devices as last seen, at most ``max_age_s`` seconds old. Never raises: what is not known says so."""


class FileShelf(Protocol):
    """Stored files. ``owner`` None stands for an administrator, who sees everybody's; a file of somebody else is
    ``NotFound``. What a method returned is on disk; all raise ``StorageFull`` and ``StorageFailed``."""

    def receive(
        self, owner: str, purpose: str, filename: str, expires_after_s: float | None, *, expected_bytes: int = 0
    ) -> IncomingFile:
        """Begin to take a file in; ``expected_bytes`` at least. Raises ``PayloadTooLarge``, ``StorageFull`` when there
        is no room, ``Unavailable`` when too many come at once."""

    async def get(self, file_id: str, owner: str | None) -> FileRow: ...

    async def list(
        self, owner: str | None, *, purpose: str | None, after: str | None, limit: int, ascending: bool
    ) -> tuple[Sequence[FileRow], bool]:
        """A page, and whether there are more. ``after``: the last id of the page before."""

    async def open(self, file_id: str, owner: str | None) -> tuple[FileRow, Path]:
        """A file to be read; deleting it meanwhile does not disturb who has opened the path."""

    async def delete(self, file_id: str, owner: str | None) -> None: ...


class IncomingFile(Protocol):
    """A file on its way in: ``write`` pieces, then ``commit`` (or ``abort``, idempotent and after ``commit`` without
    effect). Does not block the loop. ``purpose`` and ``expires_after_s`` may be set until ``commit``: a form may name
    them after the file."""

    purpose: str
    expires_after_s: float | None

    async def write(self, piece: bytes) -> None:
        """Raises ``PayloadTooLarge``, ``StorageFull``, ``StorageFailed``."""

    async def commit(self) -> FileRow:
        """On disk, file and row, when this returns."""

    async def abort(self) -> None: ...


class BatchDesk(Protocol):
    """Batches. ``owner`` None stands for an administrator; a batch of somebody else is ``NotFound``. What a method
    returned is on disk; all that change something raise ``StorageFull`` and ``StorageFailed``."""

    async def create(self, new: NewBatch) -> BatchView:
        """Accept a batch; its input is validated afterwards. The same idempotency key again returns the same batch, or
        raises ``BadRequest`` for another request."""

    async def get(self, batch_id: str, owner: str | None) -> BatchView: ...

    async def list(self, owner: str | None, *, after: str | None, limit: int) -> tuple[Sequence[BatchView], bool]:
        """Newest first."""

    async def cancel(self, batch_id: str, owner: str | None) -> BatchView:
        """Idempotent; a batch that has ended stays as it is."""

    async def pause(self, batch_id: str, owner: str | None) -> BatchView:
        """Nothing new is begun, what runs ends. Idempotent. Raises ``Conflict`` when it has ended."""

    async def resume(self, batch_id: str, owner: str | None) -> BatchView: ...

    async def retry(self, batch_id: str, owner: str | None) -> BatchView:
        """Run the failed lines of an ended batch again. Raises ``Conflict`` where there are none or it runs."""

    async def set_priority(self, batch_id: str, owner: str | None, priority: int) -> BatchView: ...

    async def delete(self, batch_id: str, owner: str | None) -> None:
        """Forget an ended batch; its files stay. Raises ``Conflict`` while it has not ended."""

    async def events(self, batch_id: str, owner: str | None, *, after: int, limit: int) -> Sequence[BatchEvent]: ...

    def states(self) -> Mapping[str, int]:
        """Those that have not ended by state, and how many of them are ``paused``."""

    def watch(self, batch_id: str, owner: str | None) -> AsyncGenerator[BatchView, None]:
        """Its view now and after each change, at most twice a second, until it has ended. Raises ``NotFound``."""

    def partial(self, batch_id: str, owner: str | None, *, failed: bool) -> AsyncGenerator[bytes, None]:
        """The records there are so far, as lines of the output file (or the error file)."""


class ItemDesk(Protocol):
    """Single items, with the same meaning of ``owner``."""

    @property
    def waiting(self) -> int:
        """How many have not ended."""

    async def submit(self, new: NewItem) -> ItemView: ...

    async def get(self, item_id: str, owner: str | None, *, wait_s: float = 0) -> ItemView:
        """``wait_s``: how long to wait for its end before answering."""

    async def list(
        self, owner: str | None, *, state: str | None, after: str | None, limit: int
    ) -> tuple[Sequence[ItemView], bool]:
        """Newest first."""

    async def cancel(self, item_id: str, owner: str | None) -> ItemView:
        """Idempotent; an item that has ended stays as it is."""


class IdleDesk(Protocol):
    def report(self) -> IdleReport:
        """How long the box and its devices have been idle, from memory."""


class GpuBook(Protocol):
    """GPUs that may not be given out although nobody owns them: UUID to reason."""

    @property
    def unsettled(self) -> Mapping[str, str]: ...


@dataclass(slots=True)
class Services:
    """``phase`` is moved by the composition root: ``starting`` until launches are taken over, ``draining`` at the end.
    ``started_at`` and ``clock`` are unix seconds."""

    settings: Settings
    guard: Guard
    keys: KeyRing
    sessions: Sessions
    supervisor: Launches
    gate: Traffic
    requests: Underway
    activity: History
    files: FileShelf
    batches: BatchDesk
    items: ItemDesk
    models: ModelDesk
    inventory: Devices
    gpus: GpuBook
    ledger: Ledger
    metrics: Metrics
    version: str
    started_at: float
    clock: Callable[[], float]
    idle: IdleDesk | None = None
    not_ready: Callable[[], ApiError | None] = lambda: None
    phase: Literal["starting", "ok", "draining"] = field(default="starting")

    def queues(self) -> views.Waiting:
        """What waits and what batch may use, everywhere, at this moment."""
        return views.waiting(self.requests.list(), self.gate.budgets())

    def outage(self) -> Unavailable | None:
        """Why nothing can be taken on at this moment, None when it can."""
        if self.phase == "draining":
            return Draining("The daemon is shutting down.", retry_after=10)
        return None if self.phase == "ok" else Unavailable("The daemon is starting.", retry_after=1)

    def refuse_in_outage(self) -> None:
        """Raise ``Unavailable`` while nothing can be taken on."""
        error = self.outage()
        if error is not None:
            raise error

    def listener(self, caller: Principal) -> Callable[[], bool]:
        """Whether a stream to ``caller`` may go on: asked again and again while it lasts."""
        return lambda: self.phase != "draining" and self.guard.is_current(caller)


def services_of(request: Request) -> Services:
    found = request.app.state.services
    assert isinstance(found, Services)  # noqa: S101  (narrows a type; set by build_api)
    return found


async def _services(request: Request) -> Services:
    return services_of(request)


async def _caller(request: Request) -> Principal:
    found = request.state.principal
    assert isinstance(found, Principal)  # noqa: S101  (narrows a type; the route's rule is not public)
    return found


async def _owner(request: Request) -> str | None:
    caller = await _caller(request)
    return None if scopes.allows(caller.scopes, frozenset({scopes.ADMIN})) else caller.name


Api = Annotated[Services, Depends(_services)]
Caller = Annotated[Principal, Depends(_caller)]
Owner = Annotated[str | None, Depends(_owner)]
"""Whose things a caller may see: those of its own name; None: an administrator's, everybody's."""
