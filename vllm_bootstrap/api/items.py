"""Single requests that are carried out durably: handed in, asked for (with patience), listed, cancelled.

Invariants: an item of another key is answered exactly as one that does not exist; what a client may not ask an engine
for directly it may not ask for here either. Nobody is waited for who has gone, and nobody's wait holds the daemon up.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Depends, Query
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from vllm_bootstrap.api import batch_views
from vllm_bootstrap.api.answers import answer
from vllm_bootstrap.api.batches import RULE, TAGS, IdempotencyKey, PageLimit
from vllm_bootstrap.api.control import refuse_body
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Api, Caller, Owner, Services
from vllm_bootstrap.api.sse import TICK_S, disconnected
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.batches.types import ItemView, NewItem
from vllm_bootstrap.errors import BadRequest, ModelNotFound, Unauthorized
from vllm_bootstrap.gateway import bodies
from vllm_bootstrap.wire_batches import ItemObject, ItemRequest, ItemState, Page

COLLECTION = "/v1/batch/completions"
MAX_WAIT_S = 60
State = Annotated[ItemState | None, Query(description="Only in this state")]
AfterId = Annotated[str | None, Query(pattern=r"^item_[0-9a-z]{20}$", description="The last_id of the page before")]
Wait = Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="Wait so many seconds for its end")]


def register(routes: Registrar) -> None:
    one = COLLECTION + "/{item_id}"
    bare = [Depends(refuse_body)]
    routes.add("POST", COLLECTION, submit_item, RULE, answer=ItemObject, status=202, tags=TAGS)
    routes.add("GET", COLLECTION, list_items, RULE, answer=Page[ItemObject], tags=TAGS)
    routes.add("GET", one, read_item, RULE, answer=ItemObject, tags=TAGS)
    routes.add("DELETE", one, cancel_item, RULE, answer=ItemObject, tags=TAGS, dependencies=bare)


async def submit_item(api: Api, caller: Caller, body: ItemRequest, idempotency_key: IdempotencyKey = None) -> Response:
    """Take a request to be carried out when there is room. It is on disk when the answer comes."""
    api.refuse_in_outage()
    path = _path_of(body)
    fields = _fields_of(body)
    if body.stream:
        raise BadRequest("An item's answer comes whole: leave 'stream' out.", param="stream")
    bodies.refuse_fields(fields)
    bodies.check_sequences(path, fields, caller.max_sequences)
    if body.model is not None and not caller.may_use(body.model):
        raise ModelNotFound(f"The model {body.model!r} does not exist or this key may not use it", param="model")
    new = NewItem(
        owner=caller.name,
        path=path,
        body=fields,
        model=body.model,
        launch_id=body.launch_id,
        priority=body.priority,
        expires_after_s=body.expires_after_s,
        idempotency_key=idempotency_key,
    )
    view = await api.items.submit(new)
    return _shown(view, 202, location=f"{COLLECTION}/{view.id}")


def _path_of(body: ItemRequest) -> str:
    """Which of the engine's routes the item is for, seen by what it brings. Raises ``BadRequest``."""
    if (body.model is None) == (body.launch_id is None):
        raise BadRequest("Name either the 'model' or the 'launch_id' that the item is for.", param="model")
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("Send either a 'prompt' or 'messages'.", param="prompt")
    return "/v1/completions" if body.messages is None else "/v1/chat/completions"


def _fields_of(body: ItemRequest) -> dict[str, Any]:
    """What the engine gets: all that is not ours."""
    own = {"model": body.model, "prompt": body.prompt, "messages": body.messages}
    return {**{name: value for name, value in own.items() if value is not None}, **(body.model_extra or {})}


def _shown(view: ItemView, status: int = 200, **headers: str) -> Response:
    return answer(batch_views.item(view), status, headers)


async def list_items(
    api: Api, owner: Owner, *, state: State = None, after: AfterId = None, limit: PageLimit = 20
) -> Response:
    """One's own items, newest first."""
    rows, has_more = await api.items.list(owner, state=state, after=after, limit=limit)
    page = [batch_views.item(row) for row in rows]
    first_id, last_id = (page[0].id, page[-1].id) if page else (None, None)
    return answer(Page[ItemObject](data=page, first_id=first_id, last_id=last_id, has_more=has_more))


async def read_item(
    request: Request, api: Api, caller: Caller, owner: Owner, item_id: str, *, wait: Wait = 0
) -> Response:
    """One item, with its answer when it has ended. With ``wait`` the answer comes when it has, or after so long."""
    view = await api.items.get(item_id, owner)  # first: that it is not there, or not one's own, is told without a wait
    if wait > 0 and view.ended_at is None:
        view = await _waited(request, api, caller, item_id, owner, wait)
    return _shown(view)


async def _waited(
    request: Request, api: Services, caller: Principal, item_id: str, owner: str | None, wait_s: float
) -> ItemView:
    """The item when it has ended or ``wait_s`` is over, or as soon as nobody may or will wait any longer."""
    may_go_on = api.listener(caller)
    ended = asyncio.ensure_future(api.items.get(item_id, owner, wait_s=wait_s))
    gone = asyncio.ensure_future(disconnected(request.receive))
    try:
        while not ended.done() and not gone.done() and may_go_on():
            await asyncio.wait((ended, gone), timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            return ended.result()
    finally:
        for task in (ended, gone):
            task.cancel()
        await asyncio.wait((ended, gone))
    if gone.done() and not gone.cancelled():
        raise ClientDisconnect
    if not api.guard.is_current(caller):
        raise Unauthorized
    return await api.items.get(item_id, owner)


async def cancel_item(api: Api, owner: Owner, item_id: str) -> Response:
    """Give an item up. Idempotent; one that has ended stays as it is."""
    return _shown(await api.items.cancel(item_id, owner))
