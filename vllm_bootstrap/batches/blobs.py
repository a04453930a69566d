"""Files on disk by name, whole or not there: the blocking half of ``files``. Runs in threads, never on the loop.

Invariant: a blob has its final name only after all of it was synced, and its name is synced when ``finish`` returns.
What is unfinished ends in ``.part``. Knows nothing of rows, owners and purposes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
import threading
from collections.abc import Collection, Sequence
from pathlib import Path

from vllm_bootstrap.errors import ApiError, StorageFailed, StorageFull, Unavailable
from vllm_bootstrap.ids import is_file_id

log = logging.getLogger(__name__)

PART = ".part"
SYNC_BYTES = 32 * 1024**2
"""How much may be written before it is synced: a sync of two gigabytes at once would hold up the database's own."""

STRAY_AGE_S = 3600.0
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def id_of(name: str) -> str:
    """The id of the file that a name in the folder belongs to."""
    return name.partition(".")[0]


class Folder:
    """A folder of blobs, durable itself. ``failed``: the disk failed once, nothing is written any more."""

    def __init__(self, path: Path, *, reserve_bytes: int) -> None:
        self.path = path
        self.failed: StorageFailed | None = None
        self._reserve = reserve_bytes
        self._names = threading.Lock()  # a stray is never looked at and removed while a new blob takes its name
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)  # a blob would be lost with its folder
        finally:
            os.close(parent)

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def check(self) -> None:
        """Raise when the disk failed earlier."""
        if self.failed is not None:
            raise StorageFailed(str(self.failed))

    def check_room(self, size: int) -> None:
        """Raise ``StorageFull`` when ``size`` more bytes would leave less free than is kept in reserve. Asks only for
        counters that the kernel has in memory."""
        found = os.statvfs(self.path)
        if found.f_bavail * found.f_frsize - size < self._reserve:
            raise StorageFull(
                f"The disk of the state directory has no room for this file: {self._reserve} bytes of it are kept free "
                "(VLLM_BOOTSTRAP_DISK_RESERVE_BYTES). Delete files that are not needed any more, and try again.",
                should_retry=False,
            )

    def rename(self, source: Path, target: Path) -> None:
        """Give a blob its name. Durable when this returns."""
        with self._names:
            source.rename(target)
        self.sync(self._fd)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a name in this folder as well. Durable when this returns. Raises ``FileNotFoundError`` where it
        is not there (any more)."""
        self.check()
        try:
            os.link(source, target)
        except FileNotFoundError:
            raise
        except OSError as exc:
            raise self.translated(exc) from exc
        self.sync(self._fd)

    def sync(self, fd: int) -> None:
        """fsync. A failure that is not lack of room is final: the kernel forgets what it could not write."""
        try:
            os.fsync(fd)
        except OSError as exc:
            raise self.translated(exc, final=True) from exc

    def translated(self, exc: OSError, *, final: bool = False) -> ApiError:
        """Our error for what the system says about the disk."""
        if exc.errno in _FULL:
            return StorageFull(
                "The disk of the state directory is full: the file was not taken. Make room and try again.",
                should_retry=False,  # a stock client would send all of it again within a second
            )
        if final or exc.errno == errno.EIO:
            self.failed = StorageFailed(
                f"The folder {self.path.name!r} cannot be relied on any more ({exc}): check the disk, then restart."
            )
            log.critical("%s: %s", self.path, self.failed)
            return self.failed
        return Unavailable(f"The folder {self.path.name!r} cannot be written right now: {exc.strerror}.", retry_after=5)

    def remove(self, names: Collection[str]) -> None:
        """Remove blobs; those that are gone already are fine, others are left to the next sweep."""
        for name in names:
            try:
                (self.path / name).unlink(missing_ok=True)
            except OSError as exc:
                log.warning("%s stays for now: %s", self.path / name, exc)

    def names(self) -> list[str]:
        """Everything of ours in the folder, finished or not."""
        with os.scandir(self.path) as entries:
            found = [entry.name for entry in entries]
        return [name for name in found if is_file_id(id_of(name))]

    def remove_strays(self, names: Collection[str], now: float) -> int:
        """Remove those of ``names`` that were not touched for an hour. Returns how many."""
        removed = 0
        for name in names:
            path = self.path / name
            with self._names, contextlib.suppress(FileNotFoundError):
                info = path.stat()
                if stat.S_ISREG(info.st_mode) and info.st_mtime < now - STRAY_AGE_S:
                    path.unlink()
                    removed += 1
        return removed


class Blob:
    """One blob on its way in. Calls may come from any thread, one at a time happens. ``bounded``: it must leave the
    reserve free."""

    def __init__(self, folder: Folder, name: str, *, bounded: bool) -> None:
        self._folder, self._bounded = folder, bounded
        self._final = folder.path / name
        # A name of its own each time: what a sweep found of an earlier attempt is never this one.
        self._part = folder.path / f"{name}.{secrets.token_hex(4)}{PART}"
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._unsynced = 0
        self._closed = False

    def write(self, pieces: Sequence[bytes]) -> None:
        """Append. Raises ``StorageFull``, ``StorageFailed``, ``Unavailable``; then only ``discard`` makes sense."""
        data = b"".join(pieces)
        with self._lock:
            fd = self._opened()
            if self._bounded:
                self._folder.check_room(len(data))
            rest = memoryview(data)
            try:
                while rest:
                    rest = rest[os.write(fd, rest) :]
            except OSError as exc:
                raise self._folder.translated(exc) from exc
            self._unsynced += len(data)
            if self._unsynced >= SYNC_BYTES:
                self._folder.sync(fd)
                self._unsynced = 0

    def finish(self) -> None:
        """Everything was written: on disk under its name when this returns. Raises as ``write``."""
        with self._lock:
            fd = self._opened()
            self._folder.sync(fd)
            self._close()
            try:
                self._folder.rename(self._part, self._final)
            except OSError as exc:
                raise self._folder.translated(exc) from exc

    def discard(self, *, named: bool) -> None:
        """Leave nothing behind; ``named``: not even what has its final name. Idempotent."""
        with self._lock:
            self._close()
            self._folder.remove([self._part.name, *([self._final.name] if named else [])])

    def _opened(self) -> int:
        self._folder.check()
        if self._closed:
            raise RuntimeError(f"{self._part} is closed")
        if self._fd is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            try:
                self._fd = os.open(self._part, flags, 0o600)
            except OSError as exc:
                raise self._folder.translated(exc) from exc
        return self._fd

    def _close(self) -> None:
        self._closed = True
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
