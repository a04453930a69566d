"""Files over HTTP, as OpenAI's SDK sends, lists, reads and deletes them.

Invariant: a file of another key is answered exactly as one that does not exist; ``admin`` sees everybody's. An upload
goes to disk as it comes and is there, whole, when it is answered; whatever ends it earlier leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Depends, Query
from starlette.requests import Request
from starlette.responses import Response

from vllm_bootstrap.api.answers import answer
from vllm_bootstrap.api.control import refuse_body
from vllm_bootstrap.api.downloads import MEDIA_TYPE, answer_file
from vllm_bootstrap.api.file_form import FIELDS, FileForm
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Api, Caller, FileShelf, IncomingFile, Owner
from vllm_bootstrap.auth import scopes
from vllm_bootstrap.auth.guard import missing_scope
from vllm_bootstrap.auth.scopes import BATCH, UPLOAD
from vllm_bootstrap.auth.types import Principal, Rule
from vllm_bootstrap.batches.files import INPUT, USER_DATA
from vllm_bootstrap.batches.types import FileRow
from vllm_bootstrap.errors import BadRequest, Unauthorized
from vllm_bootstrap.gateway.limits import FILE_FORM_BYTES
from vllm_bootstrap.gateway.multipart import SLICE_BYTES
from vllm_bootstrap.ids import is_file_id
from vllm_bootstrap.wire_batches import FileDeleted, FileObject, Page

TAGS = ("files",)
EITHER = frozenset({UPLOAD, BATCH})
RULE = Rule(scopes=EITHER)
MULTIPART = "multipart/form-data"
PURPOSES = {INPUT: EITHER, USER_DATA: frozenset({UPLOAD})}
"""What may be uploaded, and the scopes of which any one suffices for that."""

Purpose = Annotated[str | None, Query(max_length=64, description="Only files of this purpose")]
After = Annotated[str | None, Query(max_length=64, description="The last_id of the page before")]
PageLimit = Annotated[int, Query(ge=1, le=10_000, description="At most so many")]
Order = Annotated[Literal["asc", "desc"], Query(description="By time of creation: oldest or newest first")]
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        **{name: {"type": "string"} for name in FIELDS},
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": sorted(PURPOSES)},
                    },
                }
            }
        },
    }
}
_CONTENT: dict[int | str, Any] = {
    200: {"description": "The file", "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
}


def register(routes: Registrar) -> None:
    one, content = "/v1/files/{file_id}", "/v1/files/{file_id}/content"
    sends = Rule(scopes=EITHER, media=(MULTIPART,))
    routes.add("POST", "/v1/files", upload_file, sends, answer=FileObject, tags=TAGS, openapi_extra=_FORM)
    routes.add("GET", "/v1/files", list_files, RULE, answer=Page[FileObject], tags=TAGS)
    routes.add("GET", one, read_file, RULE, answer=FileObject, tags=TAGS)
    routes.add("GET", content, read_content, RULE, tags=TAGS, responses=_CONTENT)
    routes.add("DELETE", one, delete_file, RULE, answer=FileDeleted, tags=TAGS, dependencies=[Depends(refuse_body)])


async def upload_file(request: Request, api: Api, caller: Caller) -> Response:
    """Upload a file: a form with ``file``, ``purpose`` and, if it is to expire at another time than usual,
    ``expires_after[anchor]`` and ``expires_after[seconds]``. It is on disk when this answers."""
    api.refuse_in_outage()
    form = FileForm(request.headers.get("content-type", "").encode("latin-1"), partial(_judge_purpose, caller))
    incoming = _Incoming(api.files, caller.name, form, expected_bytes=_expected_bytes(request))
    try:
        async for chunk in request.stream():
            for start in range(0, len(chunk), SLICE_BYTES):
                form.parse(chunk[start : start + SLICE_BYTES])
                await incoming.take()
        purpose, expires_after_s = form.finish()
        if not api.guard.is_current(caller):
            raise Unauthorized
        return answer(_object(await incoming.commit(purpose, expires_after_s)))
    finally:
        await incoming.abort()


def _judge_purpose(caller: Principal, purpose: str) -> None:
    needed = PURPOSES.get(purpose)
    if needed is None:
        allowed = " or ".join(f"'{name}'" for name in PURPOSES)
        raise BadRequest(f"The purpose {purpose[:64]!r} is for nothing here: send {allowed}.", param="purpose")
    if not scopes.allows(caller.scopes, needed):
        raise missing_scope(caller, needed)


def _expected_bytes(request: Request) -> int:
    """What the file surely has, by the length of the body; 0 where that is not told."""
    length = request.headers.get("content-length", "0")
    return max(0, int(length) - FILE_FORM_BYTES) if length.isdecimal() else 0


class _Incoming:
    """The file of a form on its way to the shelf, from its first byte on."""

    def __init__(self, shelf: FileShelf, owner: str, form: FileForm, *, expected_bytes: int) -> None:
        self._shelf, self._owner, self._form, self._expected_bytes = shelf, owner, form, expected_bytes
        self._file: IncomingFile | None = None

    async def take(self) -> None:
        """Hand on what the form holds of the file, and let others go on."""
        form = self._form
        if self._file is None and form.filename is not None:
            self._file = self._shelf.receive(
                self._owner, form.purpose or INPUT, form.filename, None, expected_bytes=self._expected_bytes
            )
        if self._file is not None and (piece := form.take()):
            await self._file.write(piece)
        await asyncio.sleep(0)

    async def commit(self, purpose: str, expires_after_s: float | None) -> FileRow:
        assert self._file is not None  # noqa: S101  (the form is finished: it had a file)
        self._file.purpose, self._file.expires_after_s = purpose, expires_after_s
        return await self._file.commit()

    async def abort(self) -> None:
        if self._file is not None:
            await self._file.abort()


async def list_files(
    api: Api,
    owner: Owner,
    *,
    purpose: Purpose = None,
    after: After = None,
    limit: PageLimit = 10_000,
    order: Order = "desc",
) -> Response:
    """Own files; with ``admin``, everybody's."""
    if after is not None and not is_file_id(after):
        raise BadRequest("'after' is the id of a file, the last one of the page before.", param="after")
    rows, has_more = await api.files.list(owner, purpose=purpose, after=after, limit=limit, ascending=order == "asc")
    # Ten thousand of them take long enough to be felt by those who wait for tokens.
    return await asyncio.to_thread(_page, rows, has_more=has_more)


def _page(rows: Sequence[FileRow], *, has_more: bool) -> Response:
    first_id, last_id = (rows[0].id, rows[-1].id) if rows else (None, None)
    data = [_object(row) for row in rows]
    return answer(Page[FileObject](data=data, first_id=first_id, last_id=last_id, has_more=has_more))


async def read_file(api: Api, owner: Owner, file_id: str) -> Response:
    """What is known of a file."""
    return answer(_object(await api.files.get(file_id, owner)))


async def read_content(request: Request, api: Api, caller: Caller, owner: Owner, file_id: str) -> Response:
    """The file itself, or the one range of it that a ``Range`` header asks for (``If-Range`` is heeded)."""
    row, path = await api.files.open(file_id, owner)
    return await answer_file(request, row, path, api.listener(caller))


async def delete_file(api: Api, owner: Owner, file_id: str) -> Response:
    """Delete a file. Batches that were made of it go on, and who reads it at this moment reads on."""
    await api.files.delete(file_id, owner)
    return answer(FileDeleted(id=file_id))


def _object(row: FileRow) -> FileObject:
    return FileObject(
        id=row.id,
        bytes=row.bytes,
        created_at=int(row.created_at),
        expires_at=None if row.expires_at is None else int(row.expires_at),
        filename=row.filename,
        purpose=row.purpose,
        status="processed",
    )
