"""Archives of adapters, opened with care: the blocking half of ``adapters``. Runs in threads.

Invariants: only regular files come out, under names without folders, into an empty folder of ours. Nothing an archive
says of itself is believed: bytes are counted as they come, and no single read may ask for more than a piece, so that a
small archive takes neither the disk nor the memory.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from vllm_bootstrap.models.lora import (
    CONFIG,
    MAX_FILES,
    MAX_JSON_BYTES,
    NotAnAdapter,
    check_config,
    check_header,
    check_name,
    common_folder,
    header_length,
    place,
)

PIECE_BYTES = 1024**2
MAX_READ_BYTES = 8 * 1024**2
"""More than this at once only a hostile archive asks for: in its table of contents, or in a name."""

MAX_ENTRIES = 2000
RATIO_MAX = 200
_TOO_MUCH = (
    "The archive unpacks to more than is allowed (VLLM_BOOTSTRAP_ADAPTER_MAX_BYTES, and 200 times its own size)."
)
# What a file system has against a name: too long, or characters it does not take.
_BAD_NAME = frozenset({errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL})
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    gzip.BadGzipFile,
    ValueError,
    NotImplementedError,
)


class Extracted(NamedTuple):
    bytes: int
    rank: int


class _Entry(NamedTuple):
    """One regular file of an archive."""

    parts: tuple[str, ...]
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, folder: Path, max_bytes: int, room: Callable[[int], None]) -> Extracted:
    """Take the adapter out of an archive into an empty ``folder`` and judge it. ``room`` is told before so many bytes
    are written, and raises where there is none. All is on disk when this returns.

    Raises ``NotAnAdapter``, ``OSError`` of the disk and what ``room`` raises.
    """
    limit = min(max_bytes, max(MAX_READ_BYTES, archive.stat().st_size * RATIO_MAX))
    seen: list[tuple[str, ...]] = []
    total = 0
    try:
        with archive.open("rb") as file:
            for entry in _entries(file, limit):
                seen.append(entry.parts)
                if len(seen) > MAX_FILES:
                    raise NotAnAdapter(f"The archive has more than {MAX_FILES} files.")
                check_name(entry.parts[-1])
                with entry.open() as source:
                    total += _copy(source, folder / entry.parts[-1], limit - total, room)
    except NotAnAdapter:
        raise
    except _BROKEN as exc:
        raise NotAnAdapter(f"The archive is damaged: {exc}.") from exc
    common_folder(seen)
    rank = judge(folder)
    _sync(folder)
    return Extracted(total, rank)


def judge(folder: Path) -> int:
    """Whether a folder's files are an adapter; returns its rank. Raises ``NotAnAdapter``."""
    names = sorted(path.name for path in folder.iterdir())
    if CONFIG not in names:
        raise NotAnAdapter(f"The archive has no {CONFIG}: pack what save_pretrained wrote.")
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        raise NotAnAdapter("The archive has no weights in safetensors (adapter_model.safetensors).")
    for name in names:
        if name.endswith(".json") and (folder / name).stat().st_size > MAX_JSON_BYTES:
            raise NotAnAdapter(f"{name} is larger than {MAX_JSON_BYTES} bytes.")
    for name in weights:
        path = folder / name
        with path.open("rb") as file:
            length = header_length(name, file.read(8), path.stat().st_size)
            check_header(name, file.read(length), path.stat().st_size - 8 - length)
    return check_config((folder / CONFIG).read_bytes())


def _entries(file: IO[bytes], limit: int) -> Iterator[_Entry]:
    start = file.read(512)
    file.seek(0)
    if start.startswith(b"PK\x03\x04"):
        yield from _zipped(file)
    elif start.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=file) as plain:
            careful = _Careful(plain, limit + MAX_READ_BYTES)
            yield from _tarred(careful)
            while careful.read(PIECE_BYTES):  # to where the checksum is
                pass
    elif start[257:262] == b"ustar":
        yield from _tarred(_Careful(file, limit + MAX_READ_BYTES))
    else:
        raise NotAnAdapter("This is no archive that is known here: send a .tar, .tar.gz or .zip file.")


def _tarred(file: _Careful) -> Iterator[_Entry]:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for count, member in enumerate(tar):
            if count > MAX_ENTRIES:
                raise NotAnAdapter(f"The archive has more than {MAX_ENTRIES} entries.")
            parts = place(member.name)
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise NotAnAdapter(f"{member.name[:200]!r} is a link or a device: pack plain files only.")
            if parts is not None:
                yield _Entry(parts, lambda member=member: _opened(tar, member))  # type: ignore[misc]


def _opened(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    found = tar.extractfile(member)
    if found is None:
        raise NotAnAdapter(f"{member.name[:200]!r} cannot be read.")
    return found


def _zipped(file: IO[bytes]) -> Iterator[_Entry]:
    with zipfile.ZipFile(_Careful(file, None)) as pack:
        entries = pack.infolist()
        if len(entries) > MAX_ENTRIES:
            raise NotAnAdapter(f"The archive has more than {MAX_ENTRIES} entries.")
        for info in entries:
            if not info.filename:
                raise NotAnAdapter("The archive has an entry without a name.")
            parts = place(info.filename)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir():
                continue
            if kind not in {0, stat.S_IFREG}:
                raise NotAnAdapter(f"{info.filename[:200]!r} is a link or a device: pack plain files only.")
            if info.flag_bits & 1:
                raise NotAnAdapter("The archive is encrypted: send it without a password.")
            if parts is not None:
                yield _Entry(parts, lambda info=info: pack.open(info))  # type: ignore[misc]


class _Careful(io.RawIOBase):
    """A file that no more than a piece is read from at once, and no more than ``limit`` bytes in all."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, limit: int | None) -> None:
        self._file, self._left = file, limit

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(MAX_READ_BYTES + 1 if size < 0 or size > MAX_READ_BYTES else size)
        if len(data) > MAX_READ_BYTES:
            raise NotAnAdapter("The archive's own tables are larger than any adapter needs.")
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise NotAnAdapter(_TOO_MUCH)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if self._left is not None and whence == os.SEEK_SET:
            self._left -= max(0, offset - self._file.tell())  # in a packed file, what is passed over is unpacked too
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def _copy(source: IO[bytes], target: Path, limit: int, room: Callable[[int], None]) -> int:
    done = 0
    with _created(target) as file:
        while piece := source.read(PIECE_BYTES):
            done += len(piece)
            if done > limit:
                raise NotAnAdapter(_TOO_MUCH)
            room(len(piece))
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return done


@contextmanager
def _created(target: Path) -> Iterator[IO[bytes]]:
    try:
        file = target.open("xb")
    except FileExistsError:
        raise NotAnAdapter(f"The archive has two files called {target.name}.") from None
    except OSError as exc:
        if exc.errno in _BAD_NAME:
            said = f"The archive has a file whose name this disk cannot hold ({exc.strerror}): {target.name[:100]!r}."
            raise NotAnAdapter(said) from None
        raise
    with file:
        yield file


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
