"""LoRA adapters that users bring: upload, list, delete.

Invariant: an adapter of another key is answered exactly as one that does not exist, but for monitors, who see all, and
administrators. An archive goes to disk as it comes and is an adapter, whole and checked, when it is answered; whatever
ends it earlier leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Annotated, Any

from fastapi import Depends, Query
from starlette.requests import Request
from starlette.responses import Response

from vllm_bootstrap.api import model_views
from vllm_bootstrap.api.answers import answer
from vllm_bootstrap.api.catalogue import ONE, TAGS, find
from vllm_bootstrap.api.control import refuse_body
from vllm_bootstrap.api.file_form import AdapterForm
from vllm_bootstrap.api.files import MULTIPART
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Api, Caller, Owner
from vllm_bootstrap.auth import scopes
from vllm_bootstrap.auth.scopes import MONITOR, UPLOAD
from vllm_bootstrap.auth.types import Rule
from vllm_bootstrap.errors import BadRequest, Forbidden, Unauthorized
from vllm_bootstrap.gateway.multipart import SLICE_BYTES
from vllm_bootstrap.models import names
from vllm_bootstrap.wire import Listing
from vllm_bootstrap.wire_models import AdapterInfo, AdapterRemoved

AdapterName = Annotated[str | None, Query(max_length=128, alias="name", description="Instead of the form's field")]
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "additionalProperties": False,
                    "properties": {"name": {"type": "string"}, "file": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


def register(routes: Registrar) -> None:
    every, one, bare = f"{ONE}/adapters", f"{ONE}/adapters/{{adapter}}", [Depends(refuse_body)]
    own = Rule(scopes=frozenset({UPLOAD}))
    sends = Rule(scopes=frozenset({UPLOAD}), media=(MULTIPART,))
    reads = Rule(scopes=frozenset({UPLOAD, MONITOR}))
    routes.add("POST", every, upload_adapter, sends, answer=AdapterInfo, status=201, tags=TAGS, openapi_extra=_FORM)
    routes.add("GET", every, list_adapters, reads, answer=Listing[AdapterInfo], tags=TAGS)
    routes.add("DELETE", one, delete_adapter, own, answer=AdapterRemoved, tags=TAGS, dependencies=bare)


async def upload_adapter(
    request: Request, api: Api, caller: Caller, name: str, *, adapter: AdapterName = None
) -> Response:
    """Bring a LoRA adapter for a model: a form with its ``name`` and behind that ``file``, an archive (tar, tar.gz or
    zip) of ``adapter_config.json`` and safetensors. Requests can name it as their model when this has answered."""
    api.refuse_in_outage()
    base = find(api, caller, name).entry.name

    def judge_name(wanted: str) -> None:
        if not names.is_adapter_name(wanted):
            raise BadRequest("An adapter's name has letters, digits, '.', '_' and '-', at most 128.", param="name")
        if not caller.may_use(wanted):
            raise Forbidden(f"The key '{caller.name}' is limited to other models.", param="name")

    if adapter is not None:
        judge_name(adapter)
    form = AdapterForm(request.headers.get("content-type", "").encode("latin-1"), adapter, judge_name)
    async with contextlib.aclosing(_slices(request, form)) as slices:
        async for _ in slices:
            if form.filename is not None:
                break
        else:
            form.end()
        pieces = _archive(form, slices, lambda: api.guard.is_current(caller))
        return answer(model_views.adapter(await api.models.receive_adapter(base, form.name, caller.name, pieces)), 201)


async def _slices(request: Request, form: AdapterForm) -> AsyncGenerator[None, None]:
    """Parse the body, and let others go on in between."""
    async for chunk in request.stream():
        for start in range(0, len(chunk), SLICE_BYTES):
            form.parse(chunk[start : start + SLICE_BYTES])
            yield
            await asyncio.sleep(0)


async def _archive(
    form: AdapterForm, slices: AsyncGenerator[None, None], is_current: Callable[[], bool]
) -> AsyncGenerator[bytes, None]:
    """What the form holds of the archive, to its end. Raises what is wrong with the form, and ``Unauthorized`` when the
    key did not outlive it."""
    yield form.take()
    async for _ in slices:
        if piece := form.take():
            yield piece
    form.end()
    if not is_current():
        raise Unauthorized


async def list_adapters(api: Api, caller: Caller, owner: Owner, name: str) -> Response:
    """Adapters that were uploaded for a model: one's own, for monitors everybody's."""
    found = api.models.adapters(find(api, caller, name).entry.name)
    everybody = owner is None or scopes.allows(caller.scopes, frozenset({MONITOR}))
    page = [
        model_views.adapter(one)
        for one in found
        if (everybody or one.owner == caller.name) and caller.may_use(one.name)
    ]
    return answer(Listing[AdapterInfo](data=page, last_id=page[-1].name if page else None))


async def delete_adapter(api: Api, caller: Caller, owner: Owner, name: str, adapter: str) -> Response:
    """Delete an adapter that nothing serves at the moment."""
    base = find(api, caller, name).entry.name
    await api.models.delete_adapter(base, adapter, owner)
    return answer(AdapterRemoved(name=adapter, base=base))
