"""The synchronous client.

Invariant: it differs from the async one only in waiting: calls, answers and decisions are shared (``calls``,
``transport``, ``waiting``).
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Generator, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from vllm_bootstrap.sdk import calls, discovery, transport
from vllm_bootstrap.sdk.calls import ActivityFilter, LaunchFields, Replicas, RequestFilter
from vllm_bootstrap.sdk.failures import DaemonUnreachable
from vllm_bootstrap.sdk.launch import Launch, id_of
from vllm_bootstrap.sdk.sse import ServerEvent
from vllm_bootstrap.sdk.sync_batches import Batches, Files, Items
from vllm_bootstrap.sdk.sync_models import Models
from vllm_bootstrap.sdk.sync_wire import SyncWire
from vllm_bootstrap.sdk.transport import Verify
from vllm_bootstrap.sdk.waiting import OnProgress, ReadyWait
from vllm_bootstrap.wire import (
    Deleted,
    GpuListing,
    Health,
    LaunchEvent,
    LaunchGroup,
    LaunchStatus,
    Listing,
    LogPage,
    Stats,
    StopResult,
    Version,
)
from vllm_bootstrap.wire_requests import ActivityEntry, CancelResult, RequestEntry, UsageListing

T = TypeVar("T")


class Client:
    """Talks to one daemon. Usable as a context manager; may be shared between threads.

    ``url`` and ``key`` are found as ``discovery.find`` says when they are not given. ``timeout_s`` bounds each part of
    a call (sending, waiting for the answer) except where a method says otherwise; connecting gets 5 s. ``verify`` is
    what httpx takes: an ``ssl.SSLContext`` for a private certificate.

    Every method raises the daemon's own error (a class of ``vllm_bootstrap.errors``, all ``ApiError``),
    ``DaemonUnreachable`` when nobody answers, ``UnexpectedAnswer`` when something else does. Connections that break
    are tried once more where that is harmless; nothing else is retried.
    """

    def __init__(
        self, url: str | None = None, key: str | None = None, *, timeout_s: float = 60.0, verify: Verify = True
    ) -> None:
        self.target = discovery.find(url, key)
        self._verify: Verify = verify
        self._wire = SyncWire(self.target, timeout_s, verify)
        self.files, self.batches, self.items = Files(self._wire), Batches(self._wire), Items(self._wire)
        self.models = Models(self._wire)

    def close(self) -> None:
        """Close all connections. Idempotent."""
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- launches -----------------------------------------------------------------------------------------------

    @overload
    def launch(
        self,
        model: str,
        *,
        idempotency_key: str | None = None,
        replicas: Literal[1] | None = None,
        **fields: Unpack[LaunchFields],
    ) -> LaunchStatus: ...

    @overload
    def launch(
        self,
        model: str,
        *,
        idempotency_key: str | None = None,
        replicas: Replicas | None,
        **fields: Unpack[LaunchFields],
    ) -> LaunchStatus | LaunchGroup: ...

    def launch(
        self,
        model: str,
        *,
        idempotency_key: str | None = None,
        replicas: Replicas | None = None,
        **fields: Unpack[LaunchFields],
    ) -> LaunchStatus | LaunchGroup:
        """Start loading a model; returns as soon as the launch is on record. The same ``idempotency_key`` again gives
        the same launch; one is made when none is given. With ``replicas`` other than 1 it is a group of launches: all
        of them, or none. Raises ``GpuConflict``, ``GpuUnknown``, ``BadRequest``."""
        return self._wire.do(calls.launch(model, fields, idempotency_key or uuid.uuid4().hex, replicas))

    def status(self, launch_id: str) -> LaunchStatus:
        """State, progress, failure and load of one launch. Raises ``NotFound``."""
        return self._wire.do(calls.status(launch_id))

    def group(self, group_id: str) -> LaunchGroup:
        """A group of replicas, with the state of each. Raises ``NotFound``."""
        return self._wire.do(calls.group(group_id))

    def launches(
        self, *, include_ended: bool = False, after: str | None = None, limit: int = 100, group: str | None = None
    ) -> Listing[LaunchStatus]:
        """Launches, newest first, of one ``group`` only where one is given; ``after`` the last id of a page gives the
        next one."""
        return self._wire.do(calls.launches(include_ended=include_ended, after=after, limit=limit, group=group))

    def wait_ready(
        self, launch_id: str, *, timeout_s: float | None = None, on_progress: OnProgress | None = None
    ) -> LaunchStatus:
        """Wait until a launch is ready; ``on_progress`` gets every status seen on the way. Without ``timeout_s`` the
        daemon's own start timeout is the limit. Raises ``LaunchFailed`` when it ends, ``WaitTimeout`` (the launch goes
        on). A daemon that is restarted meanwhile is waited for."""
        waiting = ReadyWait(launch_id, timeout_s, on_progress)
        while True:
            try:
                status = self.status(launch_id)
                if waiting.saw(status):
                    return status
            except DaemonUnreachable as exc:
                waiting.missed(exc)
            time.sleep(waiting.pause())

    def wait_group(
        self, group_id: str, *, timeout_s: float | None = None, on_progress: OnProgress | None = None
    ) -> LaunchGroup:
        """Likewise until every replica of a group is ready; ``on_progress`` gets the status of each. Raises
        ``LaunchFailed`` with the first one that ends (the others go on)."""
        waiting = ReadyWait(group_id, timeout_s, on_progress)
        while True:
            try:
                group = self.group(group_id)
                if waiting.saw_group(group):
                    return group
            except DaemonUnreachable as exc:
                waiting.missed(exc)
            time.sleep(waiting.pause())

    @contextlib.contextmanager
    def launched(
        self,
        model: str,
        *,
        ready_timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
        replicas: Replicas | None = None,
        **fields: Unpack[LaunchFields],
    ) -> Generator[Launch]:
        """Launch, wait until it is ready (with ``replicas``, all of them), and stop it at the end, whatever happens in
        between::

        with client.launched("Qwen/Qwen3-0.6B") as launch:
            launch.openai().chat.completions.create(model=launch.served_model_name, messages=[...])
        """
        started = self.launch(model, replicas=replicas, **fields)
        wait = self.wait_group if isinstance(started, LaunchGroup) else self.wait_ready
        try:
            ready = wait(id_of(started), timeout_s=ready_timeout_s, on_progress=on_progress)
            yield Launch(ready, self.target, self._verify)
        finally:
            self.stop(id_of(started))

    def events(self, launch_id: str, *, after: int = 0, follow: bool = False) -> Generator[LaunchEvent]:
        """The history of a launch behind the event number ``after``; with ``follow``, live until it has ended."""
        if follow:
            stream = self._wire.follow(calls.follow_events(launch_id, after))
            yield from (LaunchEvent.model_validate_json(event.data) for event in stream)
            return
        more = True
        while more:
            page = self._wire.do(calls.events(launch_id, after, limit=1000))
            yield from page.data
            more, after = page.has_more, page.data[-1].seq if page.data else after

    def stop(self, launch_id: str, *, wait: bool = True, force: bool = False, timeout_s: float = 300.0) -> StopResult:
        """End a launch; idempotent. With ``wait`` returns when its process tree is seen dead and its GPUs are free
        again, for at most ``timeout_s``; ``force`` does not let running requests finish."""
        return self._wire.do(calls.stop(launch_id, wait=wait, force=force, timeout_s=timeout_s))

    def delete(self, launch_id: str) -> Deleted:
        """Forget an ended launch and its logs. Raises ``Conflict`` while it has not ended."""
        return self._wire.do(calls.delete(launch_id))

    # -- logs ---------------------------------------------------------------------------------------------------

    def logs(
        self,
        launch_id: str,
        *,
        offset: int | None = None,
        limit: int | None = None,
        tail: int | None = None,
        attempt: int | None = None,
    ) -> LogPage:
        """A piece of the engine's log, from the byte ``offset`` (default 0) or its last ``tail`` lines."""
        return self._wire.do(calls.logs(launch_id, offset=offset, limit=limit, tail=tail, attempt=attempt))

    def follow_logs(
        self, launch_id: str, *, offset: int | None = None, tail: int | None = None, attempt: int | None = None
    ) -> Generator[LogPage]:
        """The log of one attempt as it grows, until the attempt has ended. Taken up again without a gap when the
        connection breaks."""
        call = calls.follow_logs(launch_id, offset=offset, tail=tail, attempt=attempt)
        yield from (LogPage.model_validate_json(event.data) for event in self._wire.follow(call))

    # -- requests -----------------------------------------------------------------------------------------------

    def requests(self, **wanted: Unpack[RequestFilter]) -> Listing[RequestEntry]:
        """Inference requests under way, oldest first: being read, waiting for a slot, running."""
        return self._wire.do(calls.requests(wanted))

    def cancel_request(self, request_id: str) -> CancelResult:
        """End a request under way: one's own, or with the scope ``admin`` anybody's. Raises ``NotFound``."""
        return self._wire.do(calls.cancel_request(request_id))

    def activity(self, **wanted: Unpack[ActivityFilter]) -> Listing[ActivityEntry]:
        """Finished inference requests, newest first. Raises ``NotFound`` when the daemon keeps no history."""
        return self._wire.do(calls.activity(wanted))

    def usage(self, since: datetime | None = None) -> UsageListing:
        """Requests and tokens by key, class and model, as far back as the daemon's history goes. Raises
        ``NotFound`` when it keeps none."""
        return self._wire.do(calls.usage(since))

    # -- the box ------------------------------------------------------------------------------------------------

    def gpus(self) -> GpuListing:
        """Every device the daemon may use, with its owners and others' use."""
        return self._wire.do(calls.gpus())

    def stats(self) -> Stats:
        """Figures of host, GPUs and queues."""
        return self._wire.do(calls.stats())

    def version(self) -> Version:
        return self._wire.do(calls.version())

    def healthz(self) -> Health:
        """Raises ``Unavailable`` or ``Draining`` while the daemon cannot serve."""
        return self._wire.do(calls.healthz())

    # -- below --------------------------------------------------------------------------------------------------

    def request(self, method: str, path: str, body: Any = None, *, timeout_s: float | None = None) -> Any:
        """Any route, raw: JSON in, JSON out. Never repeated."""
        return self._wire.do(calls.raw(method, path, body, timeout_s))

    def stream(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
    ) -> Generator[ServerEvent]:
        """Server-sent events of any route, raw. Ends with the stream, complete or not."""
        return self._wire.events(method, path, transport.stream_options(headers or {}, params or {}, body))
