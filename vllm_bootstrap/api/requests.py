"""Requests of the data plane as they are now and as they were: listing, cancelling, history, sums.

Invariant: whose request it is decides who may end it, and a key without ``admin`` cannot tell a foreign request from
one that does not exist. Content of requests is nowhere here, because nothing below keeps any.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import dropwhile, islice
from typing import Annotated, Literal

from fastapi import Depends, Query
from starlette.responses import Response

from vllm_bootstrap.activity import ActivityFilter
from vllm_bootstrap.api import views
from vllm_bootstrap.api.answers import answer
from vllm_bootstrap.api.control import Limit, refuse_body
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Api, Caller
from vllm_bootstrap.auth import scopes
from vllm_bootstrap.auth.scopes import ADMIN, INFERENCE, MONITOR
from vllm_bootstrap.auth.types import Principal, Rule
from vllm_bootstrap.errors import BadRequest, NotFound
from vllm_bootstrap.gateway.inflight import RequestInfo
from vllm_bootstrap.wire import Listing
from vllm_bootstrap.wire_requests import ActivityEntry, CancelResult, RequestClass, RequestEntry, UsageListing

State = Literal["reading", "queued", "running"]
Class = Annotated[RequestClass | None, Query(alias="class", description="Only of this class")]
Model = Annotated[str | None, Query(max_length=512, description="Only for this model")]
Owner = Annotated[str | None, Query(max_length=256, description="Only of the key of this name")]
Status = Annotated[
    str | None, Query(pattern=r"^([1-5][0-9]{2}|[1-5]xx)$", description="Only with this status, or a hundred as 4xx")
]
Since = Annotated[datetime | None, Query(description="Only requests that began at or after this time")]
After = Annotated[str | None, Query(max_length=256, description="The last_id of the page before")]
AfterRow = Annotated[int | None, Query(ge=0, le=2**62, description="The last_id of the page before")]


def register(routes: Registrar) -> None:
    monitor = Rule(scopes=frozenset({MONITOR}))
    routes.add("GET", "/requests", list_requests, monitor, answer=Listing[RequestEntry])
    anybody = Rule(scopes=INFERENCE)
    bare = [Depends(refuse_body)]
    routes.add("POST", "/requests/{request_id}/cancel", cancel_request, anybody, answer=CancelResult, dependencies=bare)
    routes.add("GET", "/activity", list_activity, monitor, answer=Listing[ActivityEntry])
    routes.add("GET", "/usage", read_usage, monitor, answer=UsageListing)


async def list_requests(
    api: Api,
    *,
    state: Annotated[State | None, Query(description="Only in this state")] = None,
    cls: Class = None,
    model: Model = None,
    owner: Owner = None,
    after: After = None,
    limit: Limit = 100,
) -> Response:
    """Requests under way, oldest first: being read, waiting for a slot, running."""
    found = _behind(api.requests.list(), after)
    wanted = [
        info
        for info in found
        if (state is None or info.state == state)
        and (cls is None or info.cls == cls)
        and (model is None or info.model == model)
        and (owner is None or info.owner == owner)
    ]
    page = [views.request(info) for info in islice(wanted, limit)]
    last_id = page[-1].id if page else None
    return answer(Listing[RequestEntry](data=page, has_more=len(wanted) > limit, last_id=last_id))


def _behind(found: Sequence[RequestInfo], after: str | None) -> Sequence[RequestInfo]:
    if after is None:
        return found
    rest = list(dropwhile(lambda info: info.id != after, found))
    if not rest:
        raise BadRequest(
            "The request that the page before ended with is over meanwhile: begin with the first page again.",
            param="after",
        )
    return rest[1:]


async def cancel_request(api: Api, caller: Caller, request_id: str) -> Response:
    """End a request under way, one's own or, with ``admin``, anybody's. Its client gets an error, its slot is free."""
    info = api.requests.get(request_id)
    if info is None or not _may_end(caller, info):
        raise NotFound(f"No request {request_id!r} is under way.", param="request_id")
    api.requests.cancel(request_id)
    return answer(CancelResult(id=info.id, state=info.state))


def _may_end(caller: Principal, info: RequestInfo) -> bool:
    return info.owner == caller.name or scopes.allows(caller.scopes, frozenset({ADMIN}))


async def list_activity(
    api: Api,
    *,
    model: Model = None,
    cls: Class = None,
    owner: Owner = None,
    status: Status = None,
    since: Since = None,
    after: AfterRow = None,
    limit: Limit = 100,
) -> Response:
    """Finished requests that let a key in, newest first, as far back as the history goes."""
    wanted = ActivityFilter(model, cls, owner, _statuses(status), _moment(since))
    rows, has_more = await api.activity.page(wanted, after=after, limit=limit)
    page = [views.finished(row) for row in rows]
    return answer(Listing[ActivityEntry](data=page, has_more=has_more, last_id=page[-1].id if page else None))


def _statuses(status: str | None) -> tuple[int, int] | None:
    if status is None:
        return None
    if status.endswith("xx"):
        hundred = int(status[0]) * 100
        return hundred, hundred + 99
    return int(status), int(status)


def _moment(since: datetime | None) -> float | None:
    """Unix seconds; a time without a zone is UTC."""
    if since is None:
        return None
    return (since if since.tzinfo is not None else since.replace(tzinfo=UTC)).timestamp()


async def read_usage(api: Api, *, since: Since = None) -> Response:
    """Requests and tokens by key, class and model, over what the history holds."""
    rows, oldest = await api.activity.usage(_moment(since))
    return answer(UsageListing(data=[views.usage(row) for row in rows], complete_since=views.when(oldest)))
