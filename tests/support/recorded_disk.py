"""Everything that is done to a folder, written down in order, and what a power cut at any point of it would leave.

Two layers record: one under SQLite (``faulty_disk``), one around the calls of ``os`` that make, write, name and sync
files. The model of the disk is the strict one: of a file there is what was in it when it was synced last; a name is
there when its folder was synced after it was given. ``Left`` says which of that a cut leaves.

What it cannot see: files that are made or written in another way (``Path.write_bytes``), and other processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.faulty_disk import _AT_SYNC, _AT_WRITE, _INT, _METHODS, _P, _SYNC, _WRITE, FaultyDisk, faulty_disk

_TRUNCATE = ctypes.CFUNCTYPE(_INT, _P, ctypes.c_int64)
_AT_TRUNCATE = 4
_CREATES, _JOURNALS = 0x4, 0x800 | 0x4000 | 0x80000  # flags of SQLite's xOpen
SECTOR = 512
FOLDER = 0
"""Stands where a file has its number."""

Op = tuple[Any, ...]


class Left(Enum):
    """What is found of what was not synced: nothing (the promise of fsync and no more), everything (only the program
    was killed), or some of it (what a disk does that was busy writing)."""

    NOTHING = "nothing"
    EVERYTHING = "everything"
    SOMETHING = "something"


class RecordedDisk(FaultyDisk):
    """``log``: operations and notes in the order in which they happened. ``lying(path)``: a sync of that file or folder
    is answered as done and is not done."""

    def __init__(self, folder: Path, lying: Callable[[Path], bool] = lambda _: False) -> None:
        super().__init__(folder.resolve())
        self.log: list[Op] = []
        self._lying = lying
        self._lock = threading.RLock()
        self._inodes: dict[Path, int] = {}
        self._count = 0
        self._files: dict[int, tuple[Path, int]] = {}
        self._new_journals: set[int] = set()
        self._fds: dict[int, tuple[Path, int]] = {}

    def note(self, kind: str, *what: Any) -> None:
        """Something that was promised or begun by now."""
        with self._lock:
            self.log.append(("note", kind, *what))

    def _mine(self, path: Path) -> bool:
        return path.is_relative_to(self.folder)

    def _inode(self, path: Path) -> int:
        if path not in self._inodes:
            self._count += 1
            self._inodes[path] = self._count
            self.log.append(("create", path, self._count))
        return self._inodes[path]

    def _synced_folder(self, folder: Path) -> None:
        if not self._lying(folder):
            self.log.append(("sync folder", folder))

    # Under SQLite

    def _opened(self, file: int, path: Path, flags: int) -> None:
        with self._lock:
            self._files.pop(file, None)
            self._new_journals.discard(file)
            if not self._mine(path):
                return
            self._files[file] = path, self._inode(path)
            if flags & _CREATES and flags & _JOURNALS:
                self._new_journals.add(file)
        table = ctypes.cast(file, ctypes.POINTER(_P))
        if table[0]:
            table[0] = self._wrapped(table[0])

    def _removed(self, path: Path, *, synced: bool) -> None:
        if self._mine(path):
            with self._lock:
                self._unnamed(path)
                if synced:
                    self._synced_folder(path.parent)

    def _wrapped(self, methods: int) -> int:
        if methods not in self._methods:
            real = ctypes.cast(methods, ctypes.POINTER(_P * _METHODS)).contents
            copy = (_P * _METHODS)(*real)
            hooks = (
                _WRITE(self._recorded_write(_WRITE(real[_AT_WRITE]))),
                _TRUNCATE(self._recorded_truncate(_TRUNCATE(real[_AT_TRUNCATE]))),
                _SYNC(self._recorded_sync(_SYNC(real[_AT_SYNC]))),
            )
            for at, hook in zip((_AT_WRITE, _AT_TRUNCATE, _AT_SYNC), hooks, strict=True):
                copy[at] = ctypes.cast(hook, _P)
            self._kept.append(hooks)
            self._methods[methods] = copy
        return ctypes.addressof(self._methods[methods])

    def _recorded_write(self, real: Any) -> Any:
        def write(file: int, data: int, size: int, at: int) -> int:
            with self._lock:
                result = int(real(file, data, size, at))
                if result == 0:
                    self.log.append(("write", self._files[file][1], at, ctypes.string_at(data, size)))
                return result

        return write

    def _recorded_truncate(self, real: Any) -> Any:
        def truncate(file: int, size: int) -> int:
            with self._lock:
                result = int(real(file, size))
                if result == 0:
                    self.log.append(("truncate", self._files[file][1], size))
                return result

        return truncate

    def _recorded_sync(self, real: Any) -> Any:
        def sync(file: int, flags: int) -> int:
            with self._lock:
                path, inode = self._files[file]
                if not self._lying(path):
                    result = int(real(file, flags))
                    if result != 0:
                        return result
                    self.log.append(("sync", inode))
                if file in self._new_journals:  # SQLite syncs its folder with it
                    self._new_journals.discard(file)
                    self._synced_folder(path.parent)
                return 0

        return sync

    # Around os

    def _unnamed(self, path: Path) -> None:
        if self._inodes.pop(path, None) is not None:
            self.log.append(("unlink", path))

    def around_os(self) -> contextlib.AbstractContextManager[Any]:
        """Record what is done through ``os`` while the context lasts."""
        return mock.patch.multiple(os, **self._descriptors(), **self._names())

    def _descriptors(self) -> dict[str, Any]:
        real_open, real_write, real_fsync, real_close = os.open, os.write, os.fsync, os.close

        def opened(path: Any, flags: int, *args: Any, **more: Any) -> int:
            with self._lock:
                fd = real_open(path, flags, *args, **more)
                where = Path(os.fsdecode(path))
                if self._mine(where):
                    self._fds[fd] = where, FOLDER if where.is_dir() else self._inode(where)
                return fd

        def write(fd: int, data: Any) -> int:
            with self._lock:
                at = os.lseek(fd, 0, os.SEEK_CUR) if fd in self._fds else 0
                count = real_write(fd, data)
                if fd in self._fds:
                    self.log.append(("write", self._fds[fd][1], at, bytes(data[:count])))
                return count

        def fsync(fd: int) -> None:
            with self._lock:
                path, inode = self._fds.get(fd, (None, FOLDER))
                if path is None:
                    real_fsync(fd)
                elif not self._lying(path):
                    real_fsync(fd)
                    self.log.append(("sync folder", path) if inode == FOLDER else ("sync", inode))

        def close(fd: int) -> None:
            with self._lock:
                self._fds.pop(fd, None)
                real_close(fd)

        return {"open": opened, "write": write, "fsync": fsync, "close": close}

    def _names(self) -> dict[str, Any]:
        real_rename, real_unlink, real_link = os.rename, os.unlink, os.link

        def rename(source: Any, target: Any, **more: Any) -> None:
            with self._lock:
                real_rename(source, target, **more)
                if self._mine(Path(target)):
                    self._inodes[Path(target)] = self._inodes.pop(Path(source))
                    self.log.append(("rename", Path(source), Path(target)))

        def unlink(path: Any, **more: Any) -> None:
            with self._lock:
                real_unlink(path, **more)
                self._unnamed(Path(path))

        def link(source: Any, target: Any, **more: Any) -> None:
            with self._lock:
                real_link(source, target, **more)
                self._inodes[Path(target)] = self._inodes[Path(source)]
                self.log.append(("link", Path(source), Path(target)))

        return {"rename": rename, "unlink": unlink, "link": link}


@contextlib.contextmanager
def recorded_disk(folder: Path, lying: Callable[[Path], bool] = lambda _: False) -> Iterator[RecordedDisk]:
    """Record what is done in ``folder`` within the block. Close all databases before its end."""
    disk = RecordedDisk(folder, lying)
    with faulty_disk(folder, disk), disk.around_os():
        yield disk


class _Inode:
    """``unsynced``: writes and truncations since the last sync, in order."""

    def __init__(self) -> None:
        self.now, self.synced = bytearray(), b""
        self.unsynced: list[tuple[int, bytes | None]] = []

    def change(self, at: int, data: bytes | None) -> None:
        self.unsynced.append((at, data))
        _apply(self.now, at, data)

    def sync(self) -> None:
        self.synced = bytes(self.now)
        self.unsynced.clear()

    def left(self, left: Left, chance: random.Random) -> bytes:
        if left is Left.EVERYTHING:
            return bytes(self.now)
        found = bytearray(self.synced)
        if left is Left.SOMETHING:
            for at, data in self.unsynced:
                if chance.random() < 0.5:  # in any order and not whole, as far as the disk has come
                    cut = (
                        len(data or b"") if chance.random() < 0.7 else chance.randrange(0, len(data or b"") + 1, SECTOR)
                    )
                    _apply(found, at, data if data is None else data[:cut])
        return bytes(found)


def _apply(content: bytearray, at: int, data: bytes | None) -> None:
    """Write, or with ``data`` None cut off."""
    if data is None:
        del content[at:]
        content.extend(b"\0" * (at - len(content)))
    else:
        content.extend(b"\0" * (at - len(content)))
        content[at : at + len(data)] = data


class Replay:
    """The disk after so many entries of a log. ``notes``: what was noted until then."""

    def __init__(self, log: list[Op]) -> None:
        self._log, self._at = log, 0
        self._inodes: dict[int, _Inode] = {}
        self._names: dict[Path, int] = {}
        self._synced_names: dict[Path, int] = {}
        self._unsynced_names: list[tuple[Path, int | None]] = []
        self.notes: list[tuple[Any, ...]] = []

    def go_to(self, count: int) -> None:
        """Forwards only."""
        for op in self._log[self._at : count]:
            self._do(op)
        self._at = max(self._at, count)

    def _do(self, op: Op) -> None:
        match op:
            case ("note", *what):
                self.notes.append(tuple(what))
            case ("create", path, inode):
                self._inodes[inode] = _Inode()
                self._name(path, inode)
            case ("write", inode, at, data):
                self._inodes[inode].change(at, data)
            case ("truncate", inode, size):
                self._inodes[inode].change(size, None)
            case ("sync", inode):
                self._inodes[inode].sync()
            case ("rename", source, target):
                self._name(target, self._names[source])
                self._name(source, None)
            case ("link", source, target):
                self._name(target, self._names[source])
            case ("unlink", path):
                self._name(path, None)
            case ("sync folder", folder):
                self._sync_names(folder)
            case _:
                raise AssertionError(op)

    def _name(self, path: Path, inode: int | None) -> None:
        self._unsynced_names.append((path, inode))
        _give(self._names, path, inode)

    def _sync_names(self, folder: Path) -> None:
        waiting, self._unsynced_names = self._unsynced_names, []
        for path, inode in waiting:
            if path.parent == folder:
                _give(self._synced_names, path, inode)
            else:
                self._unsynced_names.append((path, inode))

    def leave(self, root: Path, into: Path, left: Left, seed: int = 0) -> None:
        """Make ``into`` what would be found of ``root``."""
        chance = random.Random(seed)
        names = dict(self._names if left is Left.EVERYTHING else self._synced_names)
        if left is Left.SOMETHING:  # journals of file systems keep the order of names
            for path, inode in self._unsynced_names[: chance.randint(0, len(self._unsynced_names))]:
                _give(names, path, inode)
        made: dict[int, Path] = {}
        for path, inode in names.items():
            target = into / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if inode in made:
                os.link(made[inode], target)
            else:
                target.write_bytes(self._inodes[inode].left(left, chance))
                made[inode] = target


def _give(names: dict[Path, int], path: Path, inode: int | None) -> None:
    if inode is None:
        names.pop(path, None)
    else:
        names[path] = inode
