"""A stored file as an answer: all of it or one range, read in threads at the pace at which the client takes it.

Invariant: one piece is held in memory; what was begun is finished whole or cut off, never padded or shortened. The
file may be deleted meanwhile: it was opened before the answer began. Knows nothing of what files are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm_bootstrap.api import ranges
from vllm_bootstrap.api.envelope import HEAD_FLAG
from vllm_bootstrap.api.errors import error_response
from vllm_bootstrap.api.sse import disconnected
from vllm_bootstrap.batches.types import FileRow
from vllm_bootstrap.errors import NotFound, OffsetOutOfRange, StorageFailed

log = logging.getLogger(__name__)
PIECE_BYTES = 256 * 1024
MEDIA_TYPE = "application/octet-stream"


async def answer_file(request: Request, row: FileRow, path: Path, may_go_on: Callable[[], bool]) -> Response:
    """The answer with the content of ``row``, which lies at ``path``, or the part of it that ``request`` wants."""
    etag, modified = f'"{row.id}-{row.bytes}"', formatdate(row.created_at, usegmt=True)
    headers = {"accept-ranges": "bytes", "etag": etag, "last-modified": modified, "cache-control": "private"}
    part = None
    if HEAD_FLAG not in request.scope and ranges.still_holds(request.headers.get("if-range"), etag, modified):
        try:
            part = ranges.wanted(_only(request.headers.getlist("range")), row.bytes)
        except ranges.Unsatisfiable:
            refusal = error_response(OffsetOutOfRange(f"The file has {row.bytes} bytes.", param="range"))
            refusal.headers.update({**headers, "content-range": f"bytes */{row.bytes}"})
            return refusal
    start, end = part if part is not None else (0, row.bytes)
    headers["content-length"] = str(end - start)
    # Never shown as a page of ours, whatever somebody has uploaded.
    headers["content-disposition"] = f"attachment; filename*=UTF-8''{quote(row.filename, safe='')}"
    headers["x-content-type-options"] = "nosniff"
    if part is not None:
        headers["content-range"] = f"bytes {start}-{end - 1}/{row.bytes}"
    if HEAD_FLAG in request.scope:
        return Response(headers=headers, media_type=MEDIA_TYPE)
    fd = await asyncio.to_thread(_open, path, row)
    return _Download(fd, start, end, 200 if part is None else 206, headers, may_go_on)


def _only(values: list[str]) -> str | None:
    return values[0] if len(values) == 1 else None


def _open(path: Path, row: FileRow) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"There is no file {row.id!r}.", param="file_id") from None
    except OSError as exc:
        raise StorageFailed(f"The file {row.id!r} cannot be read: {exc.strerror}.") from exc
    if os.fstat(fd).st_size != row.bytes:
        os.close(fd)
        raise StorageFailed(f"The file {row.id!r} is damaged: it has not the size it had when it was stored.")
    return fd


class _Download(Response):
    """Takes over ``fd``. ``may_go_on`` is asked before each piece: a revoked key and a daemon that shuts down cut the
    answer off."""

    media_type = MEDIA_TYPE

    def __init__(
        self, fd: int, start: int, end: int, status: int, headers: dict[str, str], may_go_on: Callable[[], bool]
    ) -> None:
        super().__init__(status_code=status, headers=headers)
        self._fd, self._at, self._end = fd, start, end
        self._may_go_on = may_go_on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(disconnected(receive))
        reading: asyncio.Future[bytes] | None = None
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while self._at < self._end and not gone.done():
                if not self._may_go_on():
                    log.info("%s is cut off: its key or the daemon has come to an end", scope["path"])
                    return
                size = min(PIECE_BYTES, self._end - self._at)
                reading = asyncio.ensure_future(asyncio.to_thread(os.pread, self._fd, size, self._at))
                piece = await asyncio.shield(reading)
                if not piece:
                    raise RuntimeError(f"the file ends at {self._at} instead of {self._end}")
                self._at += len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": self._at < self._end})
            if self._end == 0:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            if reading is not None and not reading.done():  # left while the disk was slow: only then it may be closed
                reading.add_done_callback(lambda _: os.close(self._fd))
            else:
                os.close(self._fd)
