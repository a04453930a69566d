"""A disk under SQLite that can be full, can fail, can lie about syncs, and remembers what a power cut would leave.

It is a layer (a VFS) between SQLite and the file system, put in through SQLite's own C interface, so the product's
code runs unchanged. What it can prove: when SQLite asks for a sync, of which file, and what had been synced by then.
What it cannot prove: that the kernel and the hardware keep a promise given by fsync.
"""

from __future__ import annotations

import _sqlite3
import contextlib
import ctypes
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FULL, IO_ERROR_FSYNC, IO_ERROR_WRITE, IO_ERROR_READ = 13, 10 | 4 << 8, 10 | 3 << 8, 10 | 1 << 8
IO_ERROR_SHARED_MEMORY_SIZE = 10 | 19 << 8

_P, _INT, _I64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_OPEN = ctypes.CFUNCTYPE(_INT, _P, _P, _P, _INT, _P)
_DELETE = ctypes.CFUNCTYPE(_INT, _P, _P, _INT)
_READ = ctypes.CFUNCTYPE(_INT, _P, _P, _INT, _I64)
_WRITE = ctypes.CFUNCTYPE(_INT, _P, _P, _INT, _I64)
_SYNC = ctypes.CFUNCTYPE(_INT, _P, _INT)
_METHODS = 19  # pointers in sqlite3_io_methods, its version number included
_AT_READ, _AT_WRITE, _AT_SYNC = 2, 3, 5


class _Vfs(ctypes.Structure):
    _fields_ = (
        [("version", _INT), ("size", _INT), ("path_max", _INT), ("next", _P), ("name", ctypes.c_char_p), ("data", _P)]
        + [("open", _P), ("delete", _P)]
        + [(f"other{n}", _P) for n in range(19)]
    )  # fmt: skip


class FaultyDisk:
    """Set the fields while the database runs. Codes are SQLite's; the next calls fail with them until set to None.
    ``failing_file`` limits failures to the file of that name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write_error: int | None = None
        self.sync_error: int | None = None
        self.read_error: int | None = None
        self.failing_file: str | None = None
        self.lies = False
        self.no_shared_memory = False
        self.syncs: Counter[str] = Counter()
        self._synced: dict[str, bytes] = {}
        self._deleted: set[str] = set()
        self._known_to_folder: set[int] = set()
        self._paths: dict[int, Path] = {}
        self._kept: list[Any] = []
        self._methods: dict[int, Any] = {}

    def cut_power(self, into: Path) -> Path:
        """The folder as it is found after a power cut now: each file as it was when it was synced last."""
        into.mkdir()
        for name, content in self._synced.items():
            (into / name).write_bytes(content)
        return into

    # Below here: called by SQLite

    def _opened(self, file: int, path: Path, flags: int) -> None:
        self._paths[file] = path
        self._known_to_folder.discard(file)
        table = ctypes.cast(file, ctypes.POINTER(_P))
        if table[0]:
            table[0] = self._wrapped(table[0])

    def _removed(self, path: Path, *, synced: bool) -> None:
        self._deleted.add(path.name)
        if synced:
            self._folder_synced()

    def _folder_synced(self) -> None:
        for name in self._deleted:
            self._synced.pop(name, None)
        self._deleted.clear()

    def _wrapped(self, methods: int) -> int:
        if methods not in self._methods:
            real = ctypes.cast(methods, ctypes.POINTER(_P * _METHODS)).contents
            copy = (_P * _METHODS)(*real)
            if self.no_shared_memory:
                copy[0] = 1  # the first version of the interface has no calls for it
            hooks = (
                _READ(self._reader(_READ(real[_AT_READ]))),
                _WRITE(self._writer(_WRITE(real[_AT_WRITE]))),
                _SYNC(self._syncer(_SYNC(real[_AT_SYNC]))),
            )
            for at, hook in zip((_AT_READ, _AT_WRITE, _AT_SYNC), hooks, strict=True):
                copy[at] = ctypes.cast(hook, _P)
            self._kept.append(hooks)
            self._methods[methods] = copy
        return ctypes.addressof(self._methods[methods])

    def _reader(self, real: Any) -> Any:
        return lambda file, data, size, at: self._hit(file, self.read_error) or real(file, data, size, at)

    def _writer(self, real: Any) -> Any:
        return lambda file, data, size, at: self._hit(file, self.write_error) or real(file, data, size, at)

    def _hit(self, file: int, error: int | None) -> int:
        spared = self.failing_file is not None and self._paths[file].name != self.failing_file
        return 0 if error is None or spared else error

    def _syncer(self, real: Any) -> Any:
        def sync(file: int, flags: int) -> int:
            path = self._paths[file]
            self.syncs[path.name] += 1
            if self.lies or self._hit(file, self.sync_error):
                return self._hit(file, self.sync_error)
            result = real(file, flags)
            if result == 0 and path.parent == self.folder:
                self._synced[path.name] = path.read_bytes()
                self._deleted.discard(path.name)
                # With the first sync of a new journal, SQLite syncs its folder too, and removals with it.
                if file not in self._known_to_folder and path.name != "state.db":
                    self._known_to_folder.add(file)
                    self._folder_synced()
            return int(result)

        return sync


@contextlib.contextmanager
def faulty_disk(folder: Path, disk: FaultyDisk | None = None) -> Iterator[FaultyDisk]:
    """Put the layer under every connection that is opened within the block. Close them before its end. ``disk``: one
    of another kind."""
    # Where the module is part of the program itself it has no file, and the program's own symbols are looked at.
    library = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
    if not hasattr(library, "sqlite3_vfs_register"):
        pytest.skip("this Python hides the C interface of its SQLite")
    library.sqlite3_libversion.restype = ctypes.c_char_p
    assert library.sqlite3_libversion().decode() == sqlite3.sqlite_version, "found another SQLite than Python uses"
    library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
    library.sqlite3_vfs_find.argtypes = [ctypes.c_char_p]
    real = library.sqlite3_vfs_find(None).contents
    layer = _Vfs.from_buffer_copy(real)
    layer.name = b"faulty"
    disk = disk or FaultyDisk(folder)
    real_open = _OPEN(real.open)

    def opened(_vfs: int, name: int | None, file: int, flags: int, out_flags: int | None) -> int:
        result = int(real_open(ctypes.addressof(real), name, file, flags, out_flags))
        if result == 0 and name:
            disk._opened(file, Path(ctypes.string_at(name).decode()), flags)
        return result

    real_delete = _DELETE(real.delete)

    def deleted(_vfs: int, name: int, sync_folder: int) -> int:
        result = int(real_delete(ctypes.addressof(real), name, sync_folder))
        if result == 0:
            disk._removed(Path(ctypes.string_at(name).decode()), synced=bool(sync_folder))
        return result

    hooks = (_OPEN(opened), _DELETE(deleted))
    layer.open, layer.delete = (ctypes.cast(hook, _P) for hook in hooks)
    assert library.sqlite3_vfs_register(ctypes.byref(layer), 1) == 0
    try:
        yield disk
    finally:
        library.sqlite3_vfs_unregister(ctypes.byref(layer))
