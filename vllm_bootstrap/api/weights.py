"""Models' files over HTTP: fetching them, what lies on the disk, reading them ahead into memory.

Invariant as of ``catalogue``: what a key may not use does not exist for it. A download goes on when nobody looks.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import Depends, Header
from starlette.requests import Request
from starlette.responses import Response

from vllm_bootstrap.api import model_views, sse
from vllm_bootstrap.api.answers import answer
from vllm_bootstrap.api.catalogue import ADMINS, ONE, TAGS, WATCHERS, find
from vllm_bootstrap.api.control import refuse_body
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Api, Caller, Services
from vllm_bootstrap.wire_models import DownloadInfo, FilesRemoved, ModelFiles, PrefetchInfo


def register(routes: Registrar) -> None:
    bare = [Depends(refuse_body)]
    for part, form, functions in (
        ("download", DownloadInfo, (start_download, read_download, cancel_download)),
        ("prefetch", PrefetchInfo, (start_prefetch, read_prefetch, cancel_prefetch)),
    ):
        path, (start, read, cancel) = f"{ONE}/{part}", functions
        routes.add("POST", path, start, ADMINS, answer=form, status=202, tags=TAGS, dependencies=bare)
        routes.add("GET", path, read, WATCHERS, answer=form, tags=TAGS)
        routes.add("DELETE", path, cancel, ADMINS, answer=form, tags=TAGS, dependencies=bare)
    routes.add("GET", f"{ONE}/files", read_files, WATCHERS, answer=ModelFiles, tags=TAGS)
    routes.add("DELETE", f"{ONE}/files", delete_files, ADMINS, answer=FilesRemoved, tags=TAGS, dependencies=bare)


async def start_download(api: Api, caller: Caller, name: str) -> Response:
    """Fetch a model's weights from the hub, on from what is there. One that is under way is answered as it stands."""
    api.refuse_in_outage()
    return answer(
        model_views.download_info(await api.models.download(find(api, caller, name).entry.name, caller.name)), 202
    )


async def read_download(
    request: Request,
    api: Api,
    caller: Caller,
    name: str,
    last_event_id: Annotated[int | None, Header(ge=0, le=2**53)] = None,
) -> Response:
    """How far a model's newest download is; with ``Accept: text/event-stream`` now and after each change, until it has
    ended."""
    found = find(api, caller, name).entry.name
    view = api.models.get_download(found)
    if sse.wanted(request):
        return sse.EventStream(_changes(api, found, last_event_id or 0), api.listener(caller))
    return answer(model_views.download_info(view))


async def _changes(api: Services, name: str, count: int) -> AsyncGenerator[bytes, None]:
    # Each event is the whole state: who comes back with the last id has missed nothing, and only counts on.
    async with contextlib.aclosing(api.models.watch_download(name)) as views:
        async for view in views:
            count += 1
            yield sse.event(model_views.download_info(view).model_dump_json(), event_id=str(count))
    yield sse.event("{}", name="end")


async def cancel_download(api: Api, caller: Caller, name: str) -> Response:
    """Give a download up. What has come stays, the next one goes on from there. Idempotent."""
    return answer(model_views.download_info(await api.models.cancel_download(find(api, caller, name).entry.name)))


async def start_prefetch(api: Api, caller: Caller, name: str) -> Response:
    """Read a model's files into the machine's memory, as far as that is free, so that loading it takes less."""
    api.refuse_in_outage()
    return answer(model_views.prefetch_info(await api.models.prefetch(find(api, caller, name).entry.name)), 202)


async def read_prefetch(api: Api, caller: Caller, name: str) -> Response:
    """How far reading ahead is."""
    return answer(model_views.prefetch_info(api.models.get_prefetch(find(api, caller, name).entry.name)))


async def cancel_prefetch(api: Api, caller: Caller, name: str) -> Response:
    """Stop reading ahead. What was read stays in memory as long as nothing else needs it. Idempotent."""
    return answer(model_views.prefetch_info(await api.models.cancel_prefetch(find(api, caller, name).entry.name)))


async def read_files(api: Api, caller: Caller, name: str) -> Response:
    """What of a model lies on the daemon's disk, and how much of that in its memory."""
    found = find(api, caller, name).entry.name
    return answer(model_views.files(found, await api.models.on_disk(found)))


async def delete_files(api: Api, caller: Caller, name: str) -> Response:
    """Delete a model's files in the cache of the hub. Its entry stays; it is fetched again when it is loaded."""
    found = find(api, caller, name).entry.name
    return answer(FilesRemoved(model=found, bytes=await api.models.delete_files(found)))
