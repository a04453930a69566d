"""Segments on real disks: rotation, caps, full and slow disks. Offsets always equal what lies in the files."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from itertools import pairwise

import pytest

from vllm_bootstrap.launches.logs import LogReader
from vllm_bootstrap.launches.shim.logwriter import (
    PATIENCE_S,
    RETRY_S,
    TOO_SLOW,
    LogPump,
    Masker,
    SegmentWriter,
    list_segments,
)


def contents(folder) -> bytes:
    """All bytes that are in files, after checking that names and sizes fit together."""
    segments = list_segments(str(folder))
    for (start, size), (following, _) in pairwise(segments):
        assert start + size == following
    return b"".join((folder / f"{start:020d}.log").read_bytes() for start, _ in segments)


def test_rotation_keeps_the_newest_and_offsets_go_on(tmp_path):
    writer = SegmentWriter(str(tmp_path), 1000, 4000)
    lines = b"".join(b"line %06d\n" % n for n in range(2000))
    for at in range(0, len(lines), 777):
        writer.write(lines[at : at + 777])
        assert sum(size for _, size in list_segments(str(tmp_path))) <= 4000
    writer.close()
    assert writer.end == len(lines)
    kept = contents(tmp_path)
    assert lines.endswith(kept)
    assert len(kept) > 2500
    assert kept.startswith(b"line ")  # whole lines, because segments end at line ends
    assert list_segments(str(tmp_path))[0][0] == len(lines) - len(kept)


def test_a_line_longer_than_all_segments_is_cut(tmp_path):
    writer = SegmentWriter(str(tmp_path), 1000, 4000)
    writer.write(b"short\n" + b"x" * 100_000 + b"\nend\n")
    writer.close()
    assert writer.end == 100_011
    assert contents(tmp_path).endswith(b"xxx\nend\n")
    assert all(size <= 1000 for _, size in list_segments(str(tmp_path)))


def test_a_log_that_exists_is_continued(tmp_path):
    for text in (b"first\n", b"second\n"):
        writer = SegmentWriter(str(tmp_path), 8, 100)
        writer.write(text)
        writer.close()
    assert contents(tmp_path) == b"first\nsecond\n"
    assert writer.end == 13


def test_a_removed_folder_comes_back_and_offsets_never_go_back(tmp_path):
    writer = SegmentWriter(str(tmp_path / "log"), 1000, 4000)
    writer.write(b"a" * 100)
    writer.close()
    (tmp_path / "log" / f"{0:020d}.log").unlink()
    (tmp_path / "log").rmdir()
    writer.write(b"b" * 10)
    assert writer.end == 110
    assert list_segments(str(tmp_path / "log"))[-1] == (100, 10)
    writer.close()


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class FailingDisk(SegmentWriter):
    """A disk that fails when told so, after ``room`` further bytes."""

    trouble: int | None = None
    room = 0

    def write(self, data):
        if self.trouble is None:
            super().write(data)
            return
        part = bytes(data[: self.room])
        self.room -= len(part)
        super().write(part)
        if len(part) < len(data):
            raise OSError(self.trouble, os.strerror(self.trouble))


def wait_for(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("trouble", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_what_a_failing_disk_does_not_take_is_counted_in_its_place(tmp_path, trouble):
    clock, writer = Clock(), FailingDisk(str(tmp_path), 1000, 4000)
    pump = LogPump(writer, Masker([]), clock=clock)
    pump.put(b"before\nhalf")
    wait_for(lambda: writer.end == 11)
    writer.trouble, writer.room = trouble, 4
    pump.put(b"way here, lost from there\n")
    wait_for(lambda: pump.dropped == 22)
    pump.put(b"too early to try again\n")
    wait_for(lambda: pump.dropped == 45)
    clock.now += RETRY_S
    pump.put(b"still failing\n")
    wait_for(lambda: pump.dropped == 59)
    writer.trouble = None
    clock.now += RETRY_S
    pump.put(b"after\n")
    assert pump.close(5)
    text = contents(tmp_path)
    marker = f"\n[vllm-bootstrap] 59 bytes of output dropped: {os.strerror(trouble)}\n".encode()
    assert text == b"before\nhalfway " + marker + b"after\n"
    assert pump.end == len(text)
    assert LogReader(tmp_path).size == len(text)


def test_a_loss_at_the_very_end_is_told_when_the_disk_is_back(tmp_path):
    clock, writer = Clock(), FailingDisk(str(tmp_path), 1000, 4000)
    pump = LogPump(writer, Masker([]), clock=clock)
    writer.trouble = errno.ENOSPC
    pump.put(b"lost\n")
    wait_for(lambda: pump.dropped == 5)
    writer.trouble = None
    assert pump.close(5)
    assert contents(tmp_path) == b"[vllm-bootstrap] 5 bytes of output dropped: No space left on device\n"


def test_a_disk_that_stays_full_ends_nothing(tmp_path):
    writer = FailingDisk(str(tmp_path), 1000, 4000)
    pump = LogPump(writer, Masker([]))
    writer.trouble = errno.ENOSPC
    pump.put(b"lost\n")
    assert pump.close(5)
    assert contents(tmp_path) == b""


class HangingDisk(SegmentWriter):
    """A disk whose writes do not return until it is let go."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.go, self.entered = threading.Event(), threading.Event()

    def write(self, data):
        self.entered.set()
        self.go.wait()
        super().write(data)


def test_a_hanging_disk_costs_the_engine_a_moment_once_and_loses_in_order(tmp_path):
    writer = HangingDisk(str(tmp_path), 100_000, 400_000)
    pump = LogPump(writer, Masker([]), buffer_bytes=1000)
    pump.put(b"first\n")
    writer.entered.wait(5)
    began = time.monotonic()
    for _ in range(500):
        pump.put(b"x" * 99 + b"\n")
    assert PATIENCE_S <= time.monotonic() - began < 5 * PATIENCE_S
    assert not pump.close(0.05)
    assert pump.dropped == 0  # known only when the writer comes to the gap
    writer.go.set()
    pump._thread.join(5)
    expected = b"first\n" + (b"x" * 99 + b"\n") * 10
    assert contents(tmp_path) == expected + f"[vllm-bootstrap] 49000 bytes of output dropped: {TOO_SLOW}\n".encode()


def test_a_slow_disk_that_keeps_up_loses_nothing(tmp_path):
    writer = HangingDisk(str(tmp_path), 100_000, 400_000)
    pump = LogPump(writer, Masker([]), buffer_bytes=1000)
    pump.put(b"first\n")
    writer.entered.wait(5)
    threading.Timer(PATIENCE_S / 4, writer.go.set).start()
    for _ in range(100):
        pump.put(b"x" * 99 + b"\n")
    assert pump.close(5)
    assert contents(tmp_path) == b"first\n" + (b"x" * 99 + b"\n") * 100


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 64 KiB; without the right to mount one, a limit on file size is not the same and the
    injected failures above stand alone."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False, capture_output=True
    )
    yield folder if made and made.returncode == 0 else None
    if made and made.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_real_disk_that_fills_up(small_disk):
    if small_disk is None:
        return
    clock = Clock()
    pump = LogPump(SegmentWriter(str(small_disk / "log"), 16_384, 1 << 20), Masker([]), clock=clock)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 32_768)
    pump.put(b"y" * 99 + b"\n")
    wait_for(lambda: pump.end == 100)
    pump.put((b"y" * 99 + b"\n") * 1000)
    wait_for(lambda: pump.dropped > 0)
    assert contents(small_disk / "log") == ((b"y" * 99 + b"\n") * 1000)[: pump.end]
    ballast.unlink()
    clock.now += RETRY_S
    pump.put(b"space again\n")
    assert pump.close(5)
    text = contents(small_disk / "log").decode()
    assert text.endswith(
        f"[vllm-bootstrap] {pump.dropped} bytes of output dropped: No space left on device\nspace again\n"
    )
    assert len(text) == pump.end
