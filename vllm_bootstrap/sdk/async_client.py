"""The asynchronous client.

Invariant: it differs from the sync one only in waiting: calls, answers and decisions are shared (``calls``,
``transport``, ``waiting``).
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from vllm_bootstrap.sdk import calls, discovery, transport
from vllm_bootstrap.sdk.async_batches import AsyncBatches, AsyncFiles, AsyncItems
from vllm_bootstrap.sdk.async_models import AsyncModels
from vllm_bootstrap.sdk.async_wire import AsyncWire
from vllm_bootstrap.sdk.calls import ActivityFilter, LaunchFields, Replicas, RequestFilter
from vllm_bootstrap.sdk.failures import DaemonUnreachable
from vllm_bootstrap.sdk.launch import Launch, id_of
from vllm_bootstrap.sdk.sse import ServerEvent
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


class AsyncClient:
    """Talks to one daemon. Usable as an async context manager; belongs to one event loop.

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
        self._wire = AsyncWire(self.target, timeout_s, verify)
        self.files, self.batches, self.items = AsyncFiles(self._wire), AsyncBatches(self._wire), AsyncItems(self._wire)
        self.models = AsyncModels(self._wire)

    async def aclose(self) -> None:
        """Close all connections. Idempotent."""
        await self._wire.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- launches -----------------------------------------------------------------------------------------------

    @overload
    async def launch(
        self,
        model: str,
        *,
        idempotency_key: str | None = None,
        replicas: Literal[1] | None = None,
        **fields: Unpack[LaunchFields],
    ) -> LaunchStatus: ...

    @overload
    async def launch(
        self,
        model: str,
        *,
        idempotency_key: str | None = None,
        replicas: Replicas | None,
        **fields: Unpack[LaunchFields],
    ) -> LaunchStatus | LaunchGroup: ...

    async def launch(
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
        return await self._wire.do(calls.launch(model, fields, idempotency_key or uuid.uuid4().hex, replicas))

    async def status(self, launch_id: str) -> LaunchStatus:
        """State, progress, failure and load of one launch. Raises ``NotFound``."""
        return await self._wire.do(calls.status(launch_id))

    async def group(self, group_id: str) -> LaunchGroup:
        """A group of replicas, with the state of each. Raises ``NotFound``."""
        return await self._wire.do(calls.group(group_id))

    async def launches(
        self, *, include_ended: bool = False, after: str | None = None, limit: int = 100, group: str | None = None
    ) -> Listing[LaunchStatus]:
        """Launches, newest first, of one ``group`` only where one is given; ``after`` the last id of a page gives the
        next one."""
        return await self._wire.do(calls.launches(include_ended=include_ended, after=after, limit=limit, group=group))

    async def wait_ready(
        self, launch_id: str, *, timeout_s: float | None = None, on_progress: OnProgress | None = None
    ) -> LaunchStatus:
        """Wait until a launch is ready; ``on_progress`` gets every status seen on the way. Without ``timeout_s`` the
        daemon's own start timeout is the limit. Raises ``LaunchFailed`` when it ends, ``WaitTimeout`` (the launch goes
        on). A daemon that is restarted meanwhile is waited for."""
        waiting = ReadyWait(launch_id, timeout_s, on_progress)
        while True:
            try:
                status = await self.status(launch_id)
                if waiting.saw(status):
                    return status
            except DaemonUnreachable as exc:
                waiting.missed(exc)
            await asyncio.sleep(waiting.pause())

    async def wait_group(
        self, group_id: str, *, timeout_s: float | None = None, on_progress: OnProgress | None = None
    ) -> LaunchGroup:
        """Likewise until every replica of a group is ready; ``on_progress`` gets the status of each. Raises
        ``LaunchFailed`` with the first one that ends (the others go on)."""
        waiting = ReadyWait(group_id, timeout_s, on_progress)
        while True:
            try:
                group = await self.group(group_id)
                if waiting.saw_group(group):
                    return group
            except DaemonUnreachable as exc:
                waiting.missed(exc)
            await asyncio.sleep(waiting.pause())

    @contextlib.asynccontextmanager
    async def launched(
        self,
        model: str,
        *,
        ready_timeout_s: float | None = None,
        on_progress: OnProgress | None = None,
        replicas: Replicas | None = None,
        **fields: Unpack[LaunchFields],
    ) -> AsyncGenerator[Launch]:
        """Launch, wait until it is ready (with ``replicas``, all of them), and stop it at the end, whatever happens in
        between::

        async with client.launched("Qwen/Qwen3-0.6B") as launch:
            await launch.async_openai().chat.completions.create(model=launch.served_model_name, messages=[...])
        """
        started = await self.launch(model, replicas=replicas, **fields)
        wait = self.wait_group if isinstance(started, LaunchGroup) else self.wait_ready
        try:
            ready = await wait(id_of(started), timeout_s=ready_timeout_s, on_progress=on_progress)
            yield Launch(ready, self.target, self._verify)
        finally:
            await self.stop(id_of(started))

    async def events(self, launch_id: str, *, after: int = 0, follow: bool = False) -> AsyncGenerator[LaunchEvent]:
        """The history of a launch behind the event number ``after``; with ``follow``, live until it has ended."""
        if follow:
            async with contextlib.aclosing(self._wire.follow(calls.follow_events(launch_id, after))) as stream:
                async for event in stream:
                    yield LaunchEvent.model_validate_json(event.data)
            return
        more = True
        while more:
            page = await self._wire.do(calls.events(launch_id, after, limit=1000))
            for row in page.data:
                yield row
            more, after = page.has_more, page.data[-1].seq if page.data else after

    async def stop(
        self, launch_id: str, *, wait: bool = True, force: bool = False, timeout_s: float = 300.0
    ) -> StopResult:
        """End a launch; idempotent. With ``wait`` returns when its process tree is seen dead and its GPUs are free
        again, for at most ``timeout_s``; ``force`` does not let running requests finish."""
        return await self._wire.do(calls.stop(launch_id, wait=wait, force=force, timeout_s=timeout_s))

    async def delete(self, launch_id: str) -> Deleted:
        """Forget an ended launch and its logs. Raises ``Conflict`` while it has not ended."""
        return await self._wire.do(calls.delete(launch_id))

    # -- logs ---------------------------------------------------------------------------------------------------

    async def logs(
        self,
        launch_id: str,
        *,
        offset: int | None = None,
        limit: int | None = None,
        tail: int | None = None,
        attempt: int | None = None,
    ) -> LogPage:
        """A piece of the engine's log, from the byte ``offset`` (default 0) or its last ``tail`` lines."""
        return await self._wire.do(calls.logs(launch_id, offset=offset, limit=limit, tail=tail, attempt=attempt))

    async def follow_logs(
        self, launch_id: str, *, offset: int | None = None, tail: int | None = None, attempt: int | None = None
    ) -> AsyncGenerator[LogPage]:
        """The log of one attempt as it grows, until the attempt has ended. Taken up again without a gap when the
        connection breaks."""
        call = calls.follow_logs(launch_id, offset=offset, tail=tail, attempt=attempt)
        async with contextlib.aclosing(self._wire.follow(call)) as stream:
            async for event in stream:
                yield LogPage.model_validate_json(event.data)

    # -- requests -----------------------------------------------------------------------------------------------

    async def requests(self, **wanted: Unpack[RequestFilter]) -> Listing[RequestEntry]:
        """Inference requests under way, oldest first: being read, waiting for a slot, running."""
        return await self._wire.do(calls.requests(wanted))

    async def cancel_request(self, request_id: str) -> CancelResult:
        """End a request under way: one's own, or with the scope ``admin`` anybody's. Raises ``NotFound``."""
        return await self._wire.do(calls.cancel_request(request_id))

    async def activity(self, **wanted: Unpack[ActivityFilter]) -> Listing[ActivityEntry]:
        """Finished inference requests, newest first. Raises ``NotFound`` when the daemon keeps no history."""
        return await self._wire.do(calls.activity(wanted))

    async def usage(self, since: datetime | None = None) -> UsageListing:
        """Requests and tokens by key, class and model, as far back as the daemon's history goes. Raises
        ``NotFound`` when it keeps none."""
        return await self._wire.do(calls.usage(since))

    # -- the box ------------------------------------------------------------------------------------------------

    async def gpus(self) -> GpuListing:
        """Every device the daemon may use, with its owners and others' use."""
        return await self._wire.do(calls.gpus())

    async def stats(self) -> Stats:
        """Figures of host, GPUs and queues."""
        return await self._wire.do(calls.stats())

    async def version(self) -> Version:
        return await self._wire.do(calls.version())

    async def healthz(self) -> Health:
        """Raises ``Unavailable`` or ``Draining`` while the daemon cannot serve."""
        return await self._wire.do(calls.healthz())

    # -- below --------------------------------------------------------------------------------------------------

    async def request(self, method: str, path: str, body: Any = None, *, timeout_s: float | None = None) -> Any:
        """Any route, raw: JSON in, JSON out. Never repeated."""
        return await self._wire.do(calls.raw(method, path, body, timeout_s))

    def stream(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
    ) -> AsyncGenerator[ServerEvent]:
        """Server-sent events of any route, raw. Ends with the stream, complete or not."""
        return self._wire.events(method, path, transport.stream_options(headers or {}, params or {}, body))
