"""Engine logs by byte offset, as pages or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import Header, Query
from starlette.requests import Request
from starlette.responses import Response

from vllm_bootstrap.api import sse
from vllm_bootstrap.api.answers import answer
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Api, Caller, Services
from vllm_bootstrap.auth.scopes import LOGS
from vllm_bootstrap.auth.types import Rule
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.launches.logs import LogChunk, LogReader
from vllm_bootstrap.wire import LogPage

DEFAULT_LIMIT, MAX_LIMIT, MAX_TAIL = 256 * 1024, 4 * 1024 * 1024, 100_000


def register(routes: Registrar) -> None:
    routes.add("GET", "/logs/{launch_id}", read_logs, Rule(scopes=frozenset({LOGS})), answer=LogPage)


async def read_logs(
    request: Request,
    api: Api,
    caller: Caller,
    launch_id: str,
    *,
    offset: Annotated[int | None, Query(ge=0, description="First byte wanted, default 0")] = None,
    limit: Annotated[int, Query(ge=16, le=MAX_LIMIT, description="At most so many bytes")] = DEFAULT_LIMIT,
    tail: Annotated[int | None, Query(ge=0, le=MAX_TAIL, description="The last so many lines instead")] = None,
    attempt: Annotated[int | None, Query(ge=1, description="Of which attempt, default the current one")] = None,
    follow: Annotated[bool, Query(description="Stream, as with Accept: text/event-stream")] = False,
    last_event_id: Annotated[int | None, Header(ge=0)] = None,
) -> Response:
    """The log of one attempt. Offsets are bytes and survive rotation; an offset equal to the size gives an empty page,
    one beyond it 416, one that was rotated away the oldest kept byte (``truncated_before`` says so).

    Streamed, each event is a page and its ``id`` the offset after it, so ``Last-Event-ID`` resumes without gap; the
    stream ends with the event ``end`` when the attempt has ended."""
    if offset is not None and tail is not None:
        raise BadRequest("Give either 'offset' or 'tail'.", param="tail")
    number = api.supervisor.get(launch_id).attempt if attempt is None else attempt
    log = _Log(api, launch_id, number)
    if sse.wanted(request, follow=follow):
        start = await log.start(last_event_id if last_event_id is not None else offset, tail)
        return sse.EventStream(log.stream(start), api.listener(caller))
    return answer(await log.page(offset or 0, limit) if tail is None else await log.last(tail))


class _Log:
    """One attempt's log. Reading happens in threads: a slow disk must not stop the loop that carries tokens."""

    def __init__(self, api: Services, launch_id: str, attempt: int) -> None:
        self._api, self._launch_id, self._attempt = api, launch_id, attempt
        self._reader: LogReader = api.supervisor.log_reader(launch_id, attempt)

    def _ended(self) -> bool:
        return self._api.supervisor.log_ended(self._launch_id, self._attempt)

    async def page(self, offset: int, limit: int) -> LogPage:
        ended = self._ended()
        return self._as_page(await asyncio.to_thread(self._reader.read, offset, limit), ended=ended)

    async def last(self, lines: int) -> LogPage:
        ended = self._ended()
        return self._as_page(await asyncio.to_thread(self._reader.tail, lines), ended=ended)

    async def start(self, offset: int | None, tail: int | None) -> int:
        """Where a stream begins. Raises ``OffsetOutOfRange`` while that can still be told by a status."""
        if tail is not None and offset is None:
            return (await asyncio.to_thread(self._reader.tail, tail)).offset
        await asyncio.to_thread(self._reader.read, offset or 0, 0)
        return offset or 0

    async def stream(self, offset: int) -> AsyncGenerator[bytes, None]:
        async for chunk in self._reader.follow(offset, self._ended):
            page = self._as_page(chunk, ended=False)
            yield sse.event(page.model_dump_json(), event_id=str(chunk.next_offset))
        yield sse.event("{}", name="end")

    def _as_page(self, chunk: LogChunk, *, ended: bool) -> LogPage:
        return LogPage(
            launch_id=self._launch_id,
            attempt=self._attempt,
            offset=chunk.offset,
            next_offset=chunk.next_offset,
            content=chunk.content,
            size=chunk.size,
            eof=ended and chunk.next_offset >= chunk.size,
            truncated_before=chunk.truncated_before,
        )
