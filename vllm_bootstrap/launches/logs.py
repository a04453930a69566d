"""Reads engine logs by byte offset, over the segments a shim writes (``shim.logwriter``), while it writes them.

Invariant: offsets are bytes from the start of the attempt; they stay true over rotation, and text is never cut inside a
UTF-8 character (bytes that are no UTF-8 become replacement characters and keep their offsets). Only reads, but for
``ended_logs_cap``; knows nothing of launches' states. Methods that are not ``async`` block on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_bootstrap.errors import OffsetOutOfRange
from vllm_bootstrap.launches.shim.logwriter import list_segments, segment_name

# How often a follower looks. Looking costs a few system calls and finds growth on every file system; inotify would need
# its own descriptor and watch per follower, is limited per user, and stays silent on network and overlay mounts.
POLL_S = 0.2
FOLLOW_BYTES = 64 * 1024
TAIL_BYTES = 1024 * 1024
BLOCK_BYTES = 64 * 1024
LONGEST_LINE = 4096
# The rest of a character that an engine is just writing comes at once; what is older will stay incomplete.
INCOMPLETE_S = 1.0
ROTATION_RETRIES = 5


@dataclass(frozen=True, slots=True)
class LogChunk:
    """A piece of a log. ``offset`` is its first byte, ``next_offset`` where to go on, ``size`` the whole log's end.

    ``truncated_before``: the asked offset was rotated away; this is the oldest byte that is kept, where ``offset`` is.
    """

    offset: int
    next_offset: int
    content: str
    size: int
    truncated_before: int | None = None


class LogReader:
    """One attempt's log. Holds no file open between calls; a folder that does not exist yet is an empty log."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def size(self) -> int:
        """Offset after the last byte."""
        return _end(self._segments())

    @property
    def oldest(self) -> int:
        """Offset of the first byte that rotation has kept."""
        return _oldest(self._segments())

    def read(self, offset: int, limit: int) -> LogChunk:
        """At most ``limit`` bytes (four at least) from ``offset``; empty at the end.

        An offset inside a character is moved back to its beginning. Raises ``OffsetOutOfRange`` beyond the end.
        """
        for _ in range(ROTATION_RETRIES):
            with contextlib.suppress(FileNotFoundError):  # rotated away between listing and opening
                return self._read(self._segments(), offset, max(limit, 4))
        segments = self._segments()
        return LogChunk(_end(segments), _end(segments), "", _end(segments), _end(segments))

    def tail(self, lines: int) -> LogChunk:
        """The last ``lines`` lines, at most a mebibyte of them."""
        for _ in range(ROTATION_RETRIES):
            with contextlib.suppress(FileNotFoundError):
                segments = self._segments()
                start = self._start_of_last(segments, lines)
                chunk = self._read(segments, start, TAIL_BYTES)
                return LogChunk(chunk.offset, chunk.next_offset, chunk.content, chunk.size)
        return self.read(self.size, 0)

    def last_lines(self, count: int) -> list[str]:
        """The last ``count`` lines that say something, oldest first: of a redrawn progress bar its last state, of a
        very long line its beginning."""
        found = []
        for line in self.tail(count).content.split("\n"):
            states = [state for state in line.split("\r") if state.strip()]
            if states:
                found.append(states[-1][:LONGEST_LINE])
        return found[-count:] if count else []

    async def follow(self, offset: int, ended: Callable[[], bool]) -> AsyncGenerator[LogChunk, None]:
        """Chunks as they are written, from ``offset`` until ``ended()`` is true and everything was given out.

        Reads in a thread, so that a slow disk stops nobody else. Bytes that were rotated away before they could be read
        are missing: the chunk after them has ``truncated_before``. Raises ``OffsetOutOfRange``.
        """
        while True:
            last_look = ended()
            chunk = await asyncio.to_thread(self.read, offset, FOLLOW_BYTES)
            if chunk.next_offset > offset:
                offset = chunk.next_offset
                yield chunk
            elif last_look and chunk.next_offset >= chunk.size:
                return
            else:
                await asyncio.sleep(POLL_S)

    async def follow_lines(self, done: Callable[[], bool]) -> AsyncGenerator[str, None]:
        """Lines from the oldest kept one on, each state of a redrawn progress bar as a line, until ``done()`` is true.
        For reading what an engine says about itself, not for people: a line without end comes in pieces."""
        rest = ""
        async for chunk in self.follow(await asyncio.to_thread(lambda: self.oldest), done):
            *lines, rest = (rest + chunk.content).replace("\r", "\n").split("\n")
            if len(rest) > LONGEST_LINE:
                lines, rest = [*lines, rest], ""
            for line in lines:
                if done():
                    return
                if line:
                    yield line

    # -- bytes --------------------------------------------------------------------------------------------------

    def _segments(self) -> list[tuple[int, int]]:
        try:
            return list_segments(str(self._directory))
        except FileNotFoundError:
            return []

    def _read(self, segments: list[tuple[int, int]], offset: int, limit: int) -> LogChunk:
        oldest, size = _oldest(segments), _end(segments)
        if offset > size:
            raise OffsetOutOfRange(f"The log ends at byte {size}; offset {offset} is beyond that.", param="offset")
        truncated = oldest if offset < oldest else None
        start = max(offset, oldest)
        before = min(3, start - oldest)  # bytes that tell whether ``start`` lies inside a character
        data = b"".join(self._bytes(segments, start - before, limit + before))
        begin = _character_start(data, before)
        start, data = start - before + begin, data[begin : begin + limit]
        whole = _whole_characters(data)
        if start + len(data) < size or self._is_fresh(segments):
            data = data[:whole]
        return LogChunk(start, start + len(data), data.decode("utf-8", "replace"), size, truncated)

    def _bytes(self, segments: list[tuple[int, int]], start: int, limit: int) -> Iterator[bytes]:
        for first, length in segments:
            wanted = min(limit, first + length - start)
            if wanted <= 0 or start < first:
                continue
            fd = os.open(self._directory / segment_name(first), os.O_RDONLY | os.O_CLOEXEC)
            try:
                piece = os.pread(fd, wanted, start - first)
            finally:
                os.close(fd)
            yield piece
            start, limit = start + len(piece), limit - len(piece)

    def _is_fresh(self, segments: list[tuple[int, int]]) -> bool:
        if not segments:
            return False
        changed = (self._directory / segment_name(segments[-1][0])).stat().st_mtime
        return abs(time.time() - changed) < INCOMPLETE_S

    def _start_of_last(self, segments: list[tuple[int, int]], lines: int) -> int:
        """Where the last ``lines`` lines begin, or the last ``TAIL_BYTES``."""
        size = position = _end(segments)
        floor = max(_oldest(segments), size - TAIL_BYTES)
        if lines <= 0:
            return size
        # The newline that ends the last line does not begin another one.
        wanted = lines + 1 if b"".join(self._bytes(segments, size - 1, 1)) == b"\n" else lines
        while position > floor:
            block_start = max(floor, position - BLOCK_BYTES)
            block = b"".join(self._bytes(segments, block_start, position - block_start))
            found = block.count(b"\n")
            if found >= wanted:
                at = len(block)
                for _ in range(wanted):
                    at = block.rfind(b"\n", 0, at)
                return block_start + at + 1
            wanted -= found
            position = block_start
        return floor


def _oldest(segments: list[tuple[int, int]]) -> int:
    return segments[0][0] if segments else 0


def _end(segments: list[tuple[int, int]]) -> int:
    return sum(segments[-1]) if segments else 0


def _is_continuation(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def _length_of(lead: int) -> int:
    """Bytes of the character that begins with ``lead``; 1 for what begins none."""
    return 2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4 if 0xF0 <= lead < 0xF5 else 1


def _character_start(data: bytes, position: int) -> int:
    """``position``, or where the character begins that it lies in."""
    if position >= len(data) or not _is_continuation(data[position]):
        return position
    for at in range(position - 1, max(-1, position - 4), -1):
        if not _is_continuation(data[at]):
            return at if at + _length_of(data[at]) > position else position
    return position


def _whole_characters(data: bytes) -> int:
    """Length of ``data`` without a character at its end that is not complete."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if not _is_continuation(byte):
            return len(data) - back if _length_of(byte) > back else len(data)
    return len(data)


def ended_logs_cap(folders: Iterable[Path], max_bytes: int) -> list[Path]:
    """Delete those of ``folders`` that were written to longest ago until the rest fits; what was deleted.

    ``folders``: the logs of launches that have ended. Whatever lies beside them may be anybody's: it is neither looked
    for nor touched.
    """
    weighed = [(*_weigh(path), path) for path in folders if path.is_dir()]
    total = sum(size for _, size, _ in weighed)
    removed = []
    for _, size, path in sorted(weighed):
        if total <= max_bytes:
            break
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
        total -= size
    return removed


def _weigh(folder: Path) -> tuple[float, int]:
    """(time of the last write, bytes) of all files below."""
    changed, size = 0.0, 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode):
                continue
            changed, size = max(changed, found.st_mtime), size + found.st_size
    return changed, size
