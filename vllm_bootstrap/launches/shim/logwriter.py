"""Keeps an engine's output in log segments without ever making the engine wait. Standard library only.

Invariants:

* A segment is named by the offset of its first byte (20 digits); ``name + size`` is the next one's name. Offsets count
  bytes that are in files, so they never go back, neither over rotation nor over loss.
* ``LogPump.put`` waits at most ``PATIENCE_S`` for the disk, and only when the buffer is full: an engine that writes
  less than 5 MB/s never notices a slow disk, and none notices one that hangs. What the disk cannot take (full, failing,
  too slow) is dropped and counted, and a line that says how much stands where it is missing.
* Secrets are replaced at equal length before anything is buffered, so that a loss can never cut one in half. Bytes that
  may be the beginning of one are held back until they are told apart.
* Memory: the pending buffer plus the one being written, each at most ``BUFFER_BYTES`` and one chunk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BUFFER_BYTES = 512 * 1024
PATIENCE_S = 0.1
RETRY_S = 0.25
SHORTEST_SECRET = 4
SUFFIX = ".log"
TOO_SLOW = "the disk is too slow"


def segment_name(offset: int) -> str:
    return f"{offset:020d}{SUFFIX}"


def list_segments(directory: str) -> list[tuple[int, int]]:
    """(start, size) of each segment, in order. Segments that vanish meanwhile are left out. Raises ``OSError``."""
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            digits = entry.name.removesuffix(SUFFIX)
            if len(digits) == 20 and digits.isdigit() and entry.name.endswith(SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    found.append((int(digits), entry.stat(follow_symlinks=False).st_size))
    return sorted(found)


class Masker:
    """Replaces secrets in a stream by asterisks of the same length, also where a secret arrives in pieces.

    Secrets shorter than four bytes are ignored: masking them would shred the log and hide nothing.
    """

    def __init__(self, secrets: Iterable[bytes]) -> None:
        self._secrets = sorted({s for s in secrets if len(s) >= SHORTEST_SECRET}, key=len, reverse=True)
        self._longest = len(self._secrets[0]) if self._secrets else 0
        # The held back end of the stream, as it came and as it will be written.
        self._raw, self._masked = b"", b""

    def feed(self, data: bytes) -> bytes:
        """The part of the stream that is decided now."""
        if not self._secrets:
            return data
        raw, out = self._raw + data, bytearray(self._masked + data)
        for secret in self._secrets:
            at = raw.find(secret)
            while at >= 0:
                out[at : at + len(secret)] = b"*" * len(secret)
                at = raw.find(secret, at + 1)
        decided = len(raw) - self._undecided(raw)
        self._raw, self._masked = raw[decided:], bytes(out[decided:])
        return bytes(out[:decided])

    def end(self) -> bytes:
        """What was held back; the stream is over."""
        rest, self._raw, self._masked = self._masked, b"", b""
        return rest

    def _undecided(self, raw: bytes) -> int:
        for length in range(min(self._longest - 1, len(raw)), 0, -1):
            tail = raw[-length:]
            if any(len(secret) > length and secret.startswith(tail) for secret in self._secrets):
                return length
        return 0


class SegmentWriter:
    """Appends to the newest segment, starts new ones, deletes the oldest. Not for several threads at once."""

    def __init__(self, directory: str, segment_bytes: int, max_bytes: int) -> None:
        self._directory = directory
        self._segment_bytes = max(1, segment_bytes)
        self._max_bytes = max(max_bytes, 2 * self._segment_bytes)
        self._older: deque[tuple[int, int]] | None = None
        self._fd: int | None = None
        self._start = self._size = 0
        self._ends_line = True

    @property
    def end(self) -> int:
        """Offset after the last byte that is in a file."""
        return self._start + self._size

    @property
    def at_line_start(self) -> bool:
        return self._ends_line

    def write(self, data: bytes | bytearray) -> None:
        """Append all of ``data``. On ``OSError`` the part before ``end`` is in the file, the rest is not."""
        view = memoryview(data)
        while view:
            fd = self._open()
            room = self._segment_bytes - self._size
            piece = view if len(view) <= room else view[: self._cut(data, len(data) - len(view), room)]
            if not piece:
                self._close_segment()
                continue
            self._make_room(len(piece))
            written = os.write(fd, piece)
            self._size += written
            self._ends_line = piece[written - 1] == 0x0A
            view = view[written:]

    def close(self) -> None:
        """Let go of the file. The next ``write`` opens it again, as after a failure of the disk."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def _cut(self, data: bytes | bytearray, position: int, room: int) -> int:
        # Segments end at line ends where possible, so that what rotation leaves begins with a whole line.
        newline = data.rfind(b"\n", position, position + room)
        if newline >= 0:
            return newline + 1 - position
        return 0 if self._ends_line and self._size else room

    def _open(self) -> int:
        if self._fd is None:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            if self._older is None:
                found = list_segments(self._directory)
                self._older = deque(segment for segment in found if segment[1])
                self._start = sum(found[-1]) if found else 0
            self._fd = self._open_at(self._start)
            size = os.fstat(self._fd).st_size
            if size < self._size:  # somebody removed the file while it was closed: offsets still never go back
                os.close(self._fd)
                self._start, size = self.end, 0
                self._fd = self._open_at(self._start)
            self._size = size
        return self._fd

    def _open_at(self, start: int) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(f"{self._directory}/{segment_name(start)}", flags, 0o600)

    def _close_segment(self) -> None:
        self.close()
        if self._older is not None:
            self._older.append((self._start, self._size))
        self._start, self._size = self.end, 0

    def _make_room(self, wanted: int) -> None:
        older = self._older or deque()
        kept = sum(size for _, size in older) + self._size
        while older and kept + wanted > self._max_bytes:
            start, size = older.popleft()
            kept -= size
            with contextlib.suppress(OSError):
                os.unlink(f"{self._directory}/{segment_name(start)}")


class LogPump:
    """Takes output from the shim's loop and writes it from a thread of its own."""

    def __init__(
        self,
        writer: SegmentWriter,
        masker: Masker,
        *,
        buffer_bytes: int = BUFFER_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._writer, self._masker = writer, masker
        self._limit, self._clock = buffer_bytes, clock
        self._changed = threading.Condition()
        self._pending = bytearray()
        self._overflow = 0  # bytes dropped after what is pending
        self._closing = False
        self._owed, self._why = 0, ""  # lost, and not yet said so in the log
        self._retry_at = 0.0
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    @property
    def end(self) -> int:
        return self._writer.end

    def put(self, data: bytes) -> None:
        """Hand over output. Blocks for ``PATIENCE_S`` at most."""
        self._buffer(self._masker.feed(data))

    def close(self, timeout_s: float) -> bool:
        """Write what is left and close the files. False when the disk did not take it in time."""
        self._buffer(self._masker.end())
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _buffer(self, data: bytes) -> None:
        if not data:
            return
        with self._changed:
            # Once something is missing, all that follows is dropped until the writer has come to the gap: order holds.
            if self._overflow or not self._changed.wait_for(lambda: self._fits(data), PATIENCE_S):
                self._overflow += len(data)
            else:
                self._pending += data
            self._changed.notify()

    def _fits(self, data: bytes) -> bool:
        return not self._pending or len(self._pending) + len(data) <= self._limit

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._pending or self._overflow or self._closing):
                    self._changed.wait()
                data, self._pending = self._pending, bytearray()
                overflow, self._overflow = self._overflow, 0
                closing = self._closing
                self._changed.notify()
            if data or self._owed:
                self._write(data, last=closing)
            if overflow:
                self._lose(overflow, TOO_SLOW)
                self._say_what_is_missing()
            if closing and not (data or overflow):
                self._finish()
                return

    def _write(self, data: bytes | bytearray, *, last: bool) -> None:
        if self._owed and self._clock() < self._retry_at and not last:
            self._lose(len(data), self._why)  # a failing disk is asked a few times a second, not for every line
            return
        if not self._say_what_is_missing():
            self._lose(len(data), self._why)
            return
        before = self._writer.end
        try:
            self._writer.write(data)
        except OSError as exc:
            self._failed(exc, len(data) - (self._writer.end - before))

    def _say_what_is_missing(self) -> bool:
        """Write the marker if one is due. False when that failed."""
        if not self._owed:
            return True
        start = "" if self._writer.at_line_start else "\n"
        marker = f"{start}[vllm-bootstrap] {self._owed} bytes of output dropped: {self._why}\n"
        try:
            self._writer.write(marker.encode())
        except OSError as exc:
            self._failed(exc, 0)
            return False
        self._owed = 0
        return True

    def _failed(self, exc: OSError, lost: int) -> None:
        self._lose(lost, os.strerror(exc.errno or errno.EIO))
        self._retry_at = self._clock() + RETRY_S
        self._finish()

    def _lose(self, count: int, why: str) -> None:
        self._owed += count
        self.dropped += count
        self._why = why

    def _finish(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()
