"""Launching, watching and ending launches."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import Depends, Header, Query
from starlette.requests import Request
from starlette.responses import Response

from vllm_bootstrap.api import group_views, sse, views
from vllm_bootstrap.api.answers import answer
from vllm_bootstrap.api.registrar import Registrar, may_see
from vllm_bootstrap.api.services import Api, Caller, Services
from vllm_bootstrap.auth.scopes import ADMIN, LOGS, MONITOR
from vllm_bootstrap.auth.types import Rule
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.launches.types import GroupView, LaunchView
from vllm_bootstrap.wire import (
    Deleted,
    LaunchEvent,
    LaunchGroup,
    LaunchRequest,
    LaunchStatus,
    Listing,
    StopResult,
)

FAILURE_LINES = "failure.lines"
IdempotencyKey = Annotated[
    str | None,
    Header(max_length=255, pattern=r"^[\x21-\x7e]+$", description="The same key again gives the same launch"),
]
Limit = Annotated[int, Query(ge=1, le=1000, description="At most so many")]
AfterId = Annotated[str | None, Query(max_length=64, description="Only launches older than this id")]
OfGroup = Annotated[str | None, Query(max_length=64, description="Only launches of this group")]
AfterSeq = Annotated[int, Query(ge=0, description="Only events after this number")]


def register(routes: Registrar) -> None:
    admin, monitor = Rule(scopes=frozenset({ADMIN})), Rule(scopes=frozenset({MONITOR}))
    lines = {FAILURE_LINES: {LOGS}}
    one_or_group = LaunchStatus | LaunchGroup
    routes.add("POST", "/launch", create_launch, admin, answer=one_or_group, status=201, details=lines)
    for path in ("/launches", "/launch"):
        name = f"list_{path.strip('/')}"
        routes.add("GET", path, list_launches, monitor, answer=Listing[LaunchStatus], details=lines, name=name)
    routes.add("GET", "/status/{launch_id}", read_status, monitor, answer=one_or_group, details=lines)
    routes.add("GET", "/status/{launch_id}/events", read_events, monitor, answer=Listing[LaunchEvent])
    bare = [Depends(refuse_body)]
    routes.add("POST", "/stop/{launch_id}", stop_launch, admin, answer=StopResult, dependencies=bare)
    routes.add("DELETE", "/launches/{launch_id}", delete_launch, admin, answer=Deleted, dependencies=bare)


def _status(request: Request, api: Services, view: LaunchView, queues: views.Waiting | None = None) -> LaunchStatus:
    with_lines = may_see(request, FAILURE_LINES)
    return views.status(view, api.gate.load(view.launch_id), with_lines=with_lines, queues=queues or api.queues())


def _group(request: Request, api: Services, found: GroupView) -> LaunchGroup:
    queues = api.queues()
    return group_views.group(found, [_status(request, api, view, queues) for view in found.members])


async def create_launch(
    request: Request, api: Api, caller: Caller, body: LaunchRequest, idempotency_key: IdempotencyKey = None
) -> Response:
    """Launch a model. The answer comes as soon as the launch and its GPUs are on record; poll its status, or read its
    events, until it is ready. With ``replicas`` other than 1 the answer is a group of launches."""
    order = views.order_of(body)
    if order.replicas != 1:
        group = await api.supervisor.launch_group(order, caller.name, idempotency_key)
        return answer(_group(request, api, group), 201, {"location": f"/status/{group.group_id}"})
    view = await api.supervisor.launch(order, caller.name, idempotency_key)
    return answer(_status(request, api, view), 201, {"location": f"/status/{view.launch_id}"})


async def list_launches(
    request: Request,
    api: Api,
    *,
    include_ended: Annotated[bool, Query(alias="all", description="With ended launches")] = False,
    group: OfGroup = None,
    after: AfterId = None,
    limit: Limit = 100,
) -> Response:
    """Active launches, newest first. Replicas are listed one by one."""
    found = api.supervisor.list(include_ended=include_ended, group=group)
    rows = [view for view in found if after is None or view.launch_id < after]
    queues = api.queues()
    page = [_status(request, api, view, queues) for view in rows[:limit]]
    last_id = page[-1].launch_id if page else None
    return answer(Listing[LaunchStatus](data=page, has_more=len(rows) > limit, last_id=last_id))


async def read_status(request: Request, api: Api, launch_id: str) -> Response:
    """State, progress, failure and load of one launch, or of a group and each of its launches. Cheap: answered from
    memory."""
    if (group := api.supervisor.group(launch_id)) is not None:
        return answer(_group(request, api, group))
    return answer(_status(request, api, api.supervisor.get(launch_id)))


async def read_events(
    request: Request,
    api: Api,
    caller: Caller,
    launch_id: str,
    *,
    after: AfterSeq = 0,
    limit: Limit = 100,
    last_event_id: Annotated[int | None, Header(ge=0)] = None,
) -> Response:
    """The append-only history of a launch, or of all launches of a group; with ``Accept: text/event-stream``, live
    until it has ended."""
    if api.supervisor.group(launch_id) is None:
        api.supervisor.get(launch_id)
    if sse.wanted(request):
        source = _event_stream(api, launch_id, after if last_event_id is None else last_event_id)
        return sse.EventStream(source, api.listener(caller))
    rows = await api.supervisor.events(launch_id, after, limit + 1)
    page = [views.event(row) for row in rows[:limit]]
    last_id = str(page[-1].seq) if page else None
    return answer(Listing[LaunchEvent](data=page, has_more=len(rows) > limit, last_id=last_id))


async def _event_stream(api: Services, launch_id: str, after: int) -> AsyncGenerator[bytes, None]:
    async for row in api.supervisor.watch(launch_id, after):
        yield sse.event(views.event(row).model_dump_json(), event_id=str(row.seq))
    yield sse.event("{}", name="end")


async def refuse_body(request: Request) -> None:
    """Options in the body of a route that reads none would be ignored in silence."""
    if (await request.body()).strip() not in {b"", b"{}"}:
        raise BadRequest("This route takes no body. Options go into the query, as in ?force=true.", param="body")


async def stop_launch(
    api: Api,
    launch_id: str,
    *,
    wait: Annotated[bool, Query(description="Answer when the process tree is seen dead")] = True,
    force: Annotated[bool, Query(description="Kill at once, without letting requests finish")] = False,
) -> Response:
    """End a launch, or all of a group. Idempotent."""
    outcome = await api.supervisor.stop(launch_id, wait=wait, force=force)
    return answer(group_views.stopped(outcome), 200 if wait else 202)


async def delete_launch(api: Api, launch_id: str) -> Response:
    """Forget an ended launch and its logs, or a group all of whose launches have ended."""
    await api.supervisor.delete(launch_id)
    return answer(Deleted(launch_id=launch_id))
