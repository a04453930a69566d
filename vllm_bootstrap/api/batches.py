"""Batches over HTTP, as OpenAI's SDK asks for them, and what it does not know: pause, retry, progress, partial output.

Invariant: a batch of another key is answered exactly as one that does not exist; ``admin`` sees everybody's. Nothing
is decided here that could change while a batch runs: what a request says is checked, all else is the desk's.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import Depends, Header, Query
from starlette.requests import Request
from starlette.responses import Response

from vllm_bootstrap.api import batch_views, sse
from vllm_bootstrap.api.answers import answer
from vllm_bootstrap.api.control import AfterSeq, Limit, refuse_body
from vllm_bootstrap.api.lines import MEDIA_TYPE, answer_lines
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Api, Caller, Owner, Services
from vllm_bootstrap.auth.scopes import BATCH
from vllm_bootstrap.auth.types import Rule
from vllm_bootstrap.batches import posting, webhooks
from vllm_bootstrap.batches.types import ENDPOINTS, BatchView, NewBatch, Webhook
from vllm_bootstrap.batches.windows import window_s
from vllm_bootstrap.errors import BadRequest, NotFound
from vllm_bootstrap.wire import Listing
from vllm_bootstrap.wire_batches import (
    BatchDeleted,
    BatchEventEntry,
    BatchObject,
    BatchRequest,
    Page,
    PriorityChange,
    WebhookWish,
)

TAGS = ("batches",)
RULE = Rule(scopes=frozenset({BATCH}))
LAUNCH_ID = "launch_id"  # the key in a batch's metadata
IdempotencyKey = Annotated[
    str | None,
    Header(max_length=255, pattern=r"^[\x21-\x7e]+$", description="The same key again gives what it gave before"),
]
PageLimit = Annotated[int, Query(ge=1, le=100, description="At most so many")]
AfterId = Annotated[str | None, Query(pattern=r"^batch_[0-9a-z]{20}$", description="The last_id of the page before")]
_LINES: dict[int | str, Any] = {
    200: {"description": "Lines of JSON", "content": {MEDIA_TYPE: {"schema": {"type": "string"}}}}
}


def register(routes: Registrar) -> None:
    one = "/v1/batches/{batch_id}"
    bare = [Depends(refuse_body)]
    routes.add("POST", "/v1/batches", create_batch, RULE, answer=BatchObject, tags=TAGS)
    routes.add("GET", "/v1/batches", list_batches, RULE, answer=Page[BatchObject], tags=TAGS)
    routes.add("GET", one, read_batch, RULE, answer=BatchObject, tags=TAGS)
    routes.add("DELETE", one, delete_batch, RULE, answer=BatchDeleted, tags=TAGS, dependencies=bare)
    for function in (cancel_batch, pause_batch, resume_batch, retry_batch):
        path = f"{one}/{function.__name__.removesuffix('_batch')}"
        routes.add("POST", path, function, RULE, answer=BatchObject, tags=TAGS, dependencies=bare)
    routes.add("POST", f"{one}/priority", change_priority, RULE, answer=BatchObject, tags=TAGS)
    routes.add("GET", f"{one}/events", read_batch_events, RULE, answer=Listing[BatchEventEntry], tags=TAGS)
    for path, lines in (("output", read_output), ("errors", read_errors)):
        routes.add("GET", f"{one}/{path}", lines, RULE, tags=TAGS, response_class=Response, responses=_LINES)


async def create_batch(
    api: Api, caller: Caller, body: BatchRequest, idempotency_key: IdempotencyKey = None
) -> Response:
    """Run the requests of an uploaded file. The answer comes as soon as the batch is on disk; its input is looked at
    afterwards, while its status is ``validating``."""
    api.refuse_in_outage()
    if body.endpoint not in ENDPOINTS:
        raise BadRequest(f"A batch runs over one of {', '.join(ENDPOINTS)}.", param="endpoint")
    window = window_s(body.completion_window)
    webhook = _webhook(api, body.webhook) if body.webhook is not None else None
    new = NewBatch(
        owner=caller.name,
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        window_s=window,
        metadata=body.metadata,
        priority=body.priority,
        launch_id=(body.metadata or {}).get(LAUNCH_ID),
        webhook=webhook,
        output_expires_after_s=None if body.output_expires_after is None else body.output_expires_after.seconds,
        idempotency_key=idempotency_key,
    )
    try:
        return _shown(await api.batches.create(new))
    except NotFound as exc:
        if exc.param != "file_id":  # the name that the field has where files are asked for
            raise
        raise NotFound(exc.message, param="input_file_id") from None


def _webhook(api: Services, wish: WebhookWish) -> Webhook:
    try:
        posting.parse(wish.url, allow_private=api.settings.webhook_allow_private)
    except posting.NotAllowed as exc:
        raise BadRequest(f"The webhook's address is refused: {exc}.", param="webhook.url") from None
    ours = api.settings.webhook_secret
    secret = wish.secret or (ours.get_secret_value() if ours is not None else None)
    if not secret:
        raise BadRequest(
            "A webhook needs a secret to be signed with: send webhook.secret, or have the operator set "
            "VLLM_BOOTSTRAP_WEBHOOK_SECRET.",
            param="webhook.secret",
        )
    try:
        webhooks.signing_key(secret)
    except ValueError as exc:
        raise BadRequest(f"The webhook cannot be signed: {exc}.", param="webhook.secret") from None
    return Webhook(wish.url, secret)


def _shown(view: BatchView) -> Response:
    return answer(batch_views.batch(view))


async def list_batches(api: Api, owner: Owner, *, after: AfterId = None, limit: PageLimit = 20) -> Response:
    """One's own batches, newest first."""
    rows, has_more = await api.batches.list(owner, after=after, limit=limit)
    page = [batch_views.batch(row) for row in rows]
    first_id, last_id = (page[0].id, page[-1].id) if page else (None, None)
    return answer(Page[BatchObject](data=page, first_id=first_id, last_id=last_id, has_more=has_more))


async def read_batch(api: Api, owner: Owner, batch_id: str) -> Response:
    """One batch, with the counts of this moment."""
    return _shown(await api.batches.get(batch_id, owner))


async def delete_batch(api: Api, owner: Owner, batch_id: str) -> Response:
    """Forget an ended batch. Its files stay."""
    await api.batches.delete(batch_id, owner)
    return answer(BatchDeleted(id=batch_id))


async def cancel_batch(api: Api, owner: Owner, batch_id: str) -> Response:
    """End a batch: what runs is given up, and the lines that are finished stay in its files. Idempotent."""
    return _shown(await api.batches.cancel(batch_id, owner))


async def pause_batch(api: Api, owner: Owner, batch_id: str) -> Response:
    """Begin nothing new; what runs ends. Its completion window goes on. Idempotent."""
    return _shown(await api.batches.pause(batch_id, owner))


async def resume_batch(api: Api, owner: Owner, batch_id: str) -> Response:
    """Go on after a pause. Idempotent."""
    return _shown(await api.batches.resume(batch_id, owner))


async def retry_batch(api: Api, owner: Owner, batch_id: str) -> Response:
    """Run the failed lines of an ended batch again; the others keep their answers."""
    api.refuse_in_outage()
    return _shown(await api.batches.retry(batch_id, owner))


async def change_priority(api: Api, owner: Owner, batch_id: str, body: PriorityChange) -> Response:
    """Let a batch go before others (higher) or after them (lower)."""
    return _shown(await api.batches.set_priority(batch_id, owner, body.priority))


async def read_batch_events(
    request: Request,
    api: Api,
    caller: Caller,
    owner: Owner,
    batch_id: str,
    *,
    after: AfterSeq = 0,
    limit: Limit = 100,
    last_event_id: Annotated[int | None, Header(ge=0, le=2**53)] = None,
) -> Response:
    """The append-only history of a batch; with ``Accept: text/event-stream`` the batch itself, now and after each
    change, until it has ended."""
    if sse.wanted(request):
        await api.batches.get(batch_id, owner)
        return sse.EventStream(_changes(api, batch_id, owner, last_event_id or 0), api.listener(caller))
    rows = await api.batches.events(batch_id, owner, after=after, limit=limit + 1)
    page = [batch_views.event(row) for row in rows[:limit]]
    last_id = str(page[-1].seq) if page else None
    return answer(Listing[BatchEventEntry](data=page, has_more=len(rows) > limit, last_id=last_id))


async def _changes(api: Services, batch_id: str, owner: str | None, count: int) -> AsyncGenerator[bytes, None]:
    # Each event is the whole batch: who comes back with the last id has missed nothing, and only counts on.
    async with contextlib.aclosing(api.batches.watch(batch_id, owner)) as views:
        async for view in views:
            count += 1
            yield sse.event(batch_views.batch(view).model_dump_json(), event_id=str(count))
    yield sse.event("{}", name="end")


async def read_output(request: Request, api: Api, caller: Caller, owner: Owner, batch_id: str) -> Response:
    """The answers there are so far, as lines of the output file. Readable while the batch runs."""
    return await answer_lines(request, api.batches.partial(batch_id, owner, failed=False), api.listener(caller))


async def read_errors(request: Request, api: Api, caller: Caller, owner: Owner, batch_id: str) -> Response:
    """The lines that have failed so far, as lines of the error file. Readable while the batch runs."""
    return await answer_lines(request, api.batches.partial(batch_id, owner, failed=True), api.listener(caller))
