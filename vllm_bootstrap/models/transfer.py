"""One file over HTTP: goes on where it was, and is checked. Blocking; part of the download helper.

Invariant: when ``run`` returns, the file is whole, its checksum is the one it is named by (SHA-256, or git's for small
files) and it is on disk. When it raises, what has arrived stays, and the next ``run`` asks only for the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from vllm_bootstrap.models.hub import HubTrouble, Origin
from vllm_bootstrap.models.space import free_bytes

PIECE_BYTES = 1024 * 1024
SYNC_BYTES = 64 * 1024**2
"""So much may be written before it is synced and room on the disk is looked at again."""

CUTS_WITHOUT_PROGRESS = 5
PAUSE_S, PAUSE_MAX_S = 0.25, 8.0
LOCK_POLL_S = 0.5
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class Stopped(Exception):
    """Somebody else has failed; this file is not needed any more now."""


class _NotThere(Exception):
    """The part of a file that is missing does not exist: what is here is of another file."""


class Transfer:
    """Fetch ``origin`` into ``part``. ``arrived`` is told how many bytes of it are here."""

    def __init__(
        self,
        client: httpx.Client,
        origin: Origin,
        part: Path,
        stop: threading.Event,
        arrived: Callable[[int], None],
        reserve_bytes: int,
    ) -> None:
        self._client, self._origin, self._part = client, origin, part
        self._stop, self._arrived, self._reserve = stop, arrived, reserve_bytes
        self._unsynced = 0
        self._digest: Any = None

    def run(self) -> None:
        """Raises ``HubTrouble``, ``OSError`` of the disk, ``Stopped``."""
        fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            for last in (False, True):
                checksum = self._until_whole(fd)
                if checksum is None or checksum == self._origin.blob:
                    os.fsync(fd)
                    return
                os.ftruncate(fd, 0)  # what was on disk, or came, was not what it should be
                if last:
                    raise HubTrouble("damaged", f"({self._origin.url})")
        finally:
            os.close(fd)

    def _until_whole(self, fd: int) -> str | None:
        """Go on until all is here, over cuts. Returns the checksum, None where its kind is not known."""
        size, cuts = self._origin.size, 0
        self._begin(fd, anew=os.fstat(fd).st_size > size)
        while (position := os.lseek(fd, 0, os.SEEK_CUR)) < size:
            try:
                self._stream(fd, position)
            except (httpx.TransportError, _NotThere) as exc:
                if isinstance(exc, _NotThere):
                    self._begin(fd, anew=True)
                cuts = 1 if os.lseek(fd, 0, os.SEEK_CUR) > position else cuts + 1
                if cuts > CUTS_WITHOUT_PROGRESS:
                    raise HubTrouble("connection", str(exc) or type(exc).__name__) from exc
                if self._stop.wait(min(PAUSE_MAX_S, PAUSE_S * 2 ** (cuts - 1))):
                    raise Stopped from exc
        return None if self._digest is None else self._digest.hexdigest()

    def _begin(self, fd: int, *, anew: bool) -> None:
        """Make a checksum over what is here already, with the file's position behind it. ``anew``: that is nothing."""
        if anew:
            os.ftruncate(fd, 0)
        self._digest = _digest(self._origin)
        os.lseek(fd, 0, os.SEEK_SET)
        while piece := os.read(fd, PIECE_BYTES):
            self._take(piece)
        self._arrived(os.lseek(fd, 0, os.SEEK_CUR))

    def _take(self, piece: bytes) -> None:
        if self._stop.is_set():
            raise Stopped
        if self._digest is not None:
            self._digest.update(piece)

    def _stream(self, fd: int, position: int) -> None:
        """Take what one answer brings. The answer may end early."""
        headers = {**self._origin.headers, "accept-encoding": "identity"}
        if position:
            headers["range"] = f"bytes={position}-"
        with self._client.stream("GET", self._origin.url, headers=headers) as answer:
            if self._starts_at(answer, position) != position:
                self._begin(fd, anew=True)
                position = 0
            for piece in answer.iter_raw():  # as it arrives: what is gathered for larger pieces is lost with a cut
                self._take(piece)
                position += len(piece)
                if position > self._origin.size:
                    raise HubTrouble("damaged", f"(longer than announced: {self._origin.url})")
                _write(fd, piece)
                self._arrived(position)
                self._sync_now_and_then(fd, len(piece))

    def _starts_at(self, answer: httpx.Response, position: int) -> int:
        """Where in the file the answer begins. Raises ``HubTrouble`` for what is no answer."""
        status = answer.status_code
        if status == 416:  # what is here does not belong to this file
            raise _NotThere("The hub has no more of this file than is here.")
        if status in {401, 403}:
            raise HubTrouble("token", f"(HTTP {status})")
        if status not in {200, 206}:
            raise HubTrouble("hub", f"(HTTP {status})")
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise HubTrouble("hub", "It compresses files, so that they cannot be gone on with.")
        if status == 200:
            return 0
        found = _RANGE.fullmatch(answer.headers.get("content-range", ""))
        if found is None or int(found[1]) != position:
            raise HubTrouble("hub", "It sends another part of a file than it was asked for.")
        if found[2] not in {"*", str(self._origin.size)}:
            raise HubTrouble("damaged", f"(another size than announced: {self._origin.url})")
        return position

    def _sync_now_and_then(self, fd: int, written: int) -> None:
        self._unsynced += written
        if self._unsynced >= SYNC_BYTES:
            self._unsynced = 0
            os.fdatasync(fd)
            if (free := free_bytes(self._part.parent)) < self._reserve:
                raise HubTrouble("full", f"({free} bytes are free, {self._reserve} are kept free)")

    def _may_go_on(self) -> None:
        if self._stop.is_set():
            raise Stopped


def _digest(origin: Origin) -> Any:
    if re.fullmatch(r"[0-9a-f]{64}", origin.blob):
        return hashlib.sha256()
    if re.fullmatch(r"[0-9a-f]{40}", origin.blob):
        return hashlib.sha1(b"blob %d\0" % origin.size, usedforsecurity=False)
    return None


def _write(fd: int, piece: bytes) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(fd, rest) :]


@contextlib.contextmanager
def locked(path: Path, stop: threading.Event) -> Iterator[None]:
    """Hold the lock of one blob, which ends with the process. Waits for whoever holds it. Raises ``Stopped``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while not _try_lock(fd):
                if stop.wait(LOCK_POLL_S):
                    raise Stopped
            if _is_still(path, fd):
                yield
                return
        finally:
            os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(path: Path, fd: int) -> bool:
    """Whether the locked file is the one of that name: who held it before may have removed it."""
    try:
        return path.stat().st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False
