"""Reading logs while they are written: offsets, characters, tails, followers, the cap on ended ones."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.support.aio import run
from vllm_bootstrap.errors import OffsetOutOfRange
from vllm_bootstrap.launches.logs import LogReader, ended_logs_cap
from vllm_bootstrap.launches.shim.logwriter import SegmentWriter, segment_name

TEXT = "Loading 10 %\rLoading 90 %\rLoaded ✓\nü€😀\n\nlast line"


def old(folder) -> None:
    """As if nothing had been written for a minute."""
    for path in folder.iterdir():
        changed = path.stat().st_mtime - 60
        os.utime(path, (changed, changed))


@pytest.fixture
def writer(tmp_path):
    writer = SegmentWriter(str(tmp_path / "log"), 64, 192)
    yield writer
    writer.close()


@pytest.fixture
def log(tmp_path):
    return LogReader(tmp_path / "log")


def read_all(log: LogReader, limit: int) -> tuple[str, list[int]]:
    text, offset, offsets = "", log.oldest, []
    while True:
        chunk = log.read(offset, limit)
        if chunk.next_offset == chunk.offset:
            assert chunk.content == ""
            return text, offsets
        text, offset = text + chunk.content, chunk.next_offset
        offsets.append(offset)


def test_an_empty_log(log):
    assert (log.size, log.oldest) == (0, 0)
    chunk = log.read(0, 100)
    assert (chunk.offset, chunk.next_offset, chunk.content, chunk.size) == (0, 0, "", 0)
    assert log.tail(5).content == ""
    assert log.last_lines(5) == []
    with pytest.raises(OffsetOutOfRange):
        log.read(1, 100)


@pytest.mark.parametrize("limit", [1, 4, 5, 7, 16, 1000])
def test_any_limit_gives_whole_characters(writer, log, limit):
    writer.write(TEXT.encode())
    text, offsets = read_all(log, limit)
    assert text == TEXT
    assert offsets[-1] == log.size == len(TEXT.encode())


def test_an_offset_inside_a_character_is_moved_to_its_beginning(writer, log):
    writer.write("a€b".encode())
    for offset in (1, 2, 3):
        chunk = log.read(offset, 100)
        assert (chunk.offset, chunk.content, chunk.next_offset) == (1, "€b", 5)
    assert log.read(4, 100).content == "b"


def test_bytes_that_are_no_text_keep_their_offsets(writer, log):
    writer.write(b"\x00ok\xff\xfe" + b"\x80" * 5 + b"\nend")
    chunk = log.read(0, 100)
    assert chunk.next_offset == 14
    assert chunk.content == "\0ok" + "�" * 7 + "\nend"
    assert log.read(7, 100).content == "�" * 3 + "\nend"


def test_the_end_of_a_character_that_is_just_being_written_is_waited_for(tmp_path, writer, log):
    writer.write("ab€".encode()[:-1])
    assert (log.read(0, 100).content, log.read(0, 100).next_offset) == ("ab", 2)
    old(tmp_path / "log")
    chunk = log.read(0, 100)  # it will stay like that
    assert (chunk.content, chunk.next_offset) == ("ab�", 4)


def test_what_was_rotated_away_is_said(writer, log):
    for number in range(40):
        writer.write(b"line number %03d\n" % number)
    assert log.oldest > 0
    assert log.size == 40 * 16
    chunk = log.read(5, 1000)
    assert chunk.offset == chunk.truncated_before == log.oldest
    assert chunk.content.startswith("line number 0")
    assert chunk.content.endswith("039\n")
    assert log.read(log.oldest, 10).truncated_before is None
    assert log.read(log.size, 10).content == ""
    with pytest.raises(OffsetOutOfRange):
        log.read(log.size + 1, 10)


def test_segments_that_vanish_while_reading(tmp_path, writer, log):
    """Rotation is faster than the reader: it sees a segment and cannot open it any more."""
    for number in range(8):
        writer.write(b"line number %03d\n" % number)

    class Racing(LogReader):
        looks = 0

        def _segments(self):
            found = super()._segments()
            self.looks += 1
            if self.looks == 1:
                (tmp_path / "log" / segment_name(0)).unlink()
            return found

    chunk = Racing(tmp_path / "log").read(0, 1000)
    assert (chunk.offset, chunk.truncated_before) == (64, 64)
    assert chunk.content.startswith("line number 004\n")

    class Hopeless(LogReader):
        def _segments(self):
            return [(0, 64)]

    hopeless = Hopeless(tmp_path / "log")
    assert (hopeless.read(0, 10).next_offset, hopeless.read(0, 10).truncated_before) == (64, 64)
    assert hopeless.tail(3).content == ""


@pytest.mark.parametrize(
    ("lines", "expected"),
    [(0, ""), (1, "last line"), (2, "\nlast line"), (3, "ü€😀\n\nlast line"), (4, TEXT), (99, TEXT)],
)
def test_tail(writer, log, lines, expected):
    writer.write(TEXT.encode())
    chunk = log.tail(lines)
    assert chunk.content == expected
    assert chunk.next_offset == chunk.size == len(TEXT.encode())
    assert chunk.truncated_before is None


def test_tail_of_a_log_that_ends_with_a_newline(writer, log):
    writer.write(b"a\nb\nc\n")
    assert log.tail(1).content == "c\n"
    assert log.tail(2).content == "b\nc\n"


def test_tail_of_very_long_lines_is_bounded(tmp_path):
    writer = SegmentWriter(str(tmp_path), 1 << 20, 4 << 20)
    writer.write(b"first\n" + b"x" * (2 << 20) + b"\nlast\n")
    writer.close()
    log = LogReader(tmp_path)
    assert len(log.tail(5).content) == 1 << 20
    assert log.last_lines(5)[-1] == "last"
    assert len(log.last_lines(5)[0]) == 4096


def test_last_lines_say_something(writer, log):
    writer.write(TEXT.encode() + b"\n \r \n")
    assert log.last_lines(10) == ["Loaded ✓", "ü€😀", "last line"]
    assert log.last_lines(2) == ["last line"]
    assert log.last_lines(0) == []


async def collect(stream, until=10**9) -> list:
    found = []
    async for item in stream:
        found.append(item)
        if len(found) >= until:
            break
    return found


def test_follow_gives_everything_once_and_ends_with_the_engine(writer, log):
    async def main():
        ended = False
        writer.write(b"one\n")
        following = asyncio.create_task(collect(log.follow(0, lambda: ended)))
        for text in (b"two\n", b"three\n"):
            await asyncio.sleep(0)
            writer.write(text)
        ended = True
        chunks = await following
        assert "".join(chunk.content for chunk in chunks) == "one\ntwo\nthree\n"
        assert [chunk.offset for chunk in chunks[1:]] == [chunk.next_offset for chunk in chunks[:-1]]

    run(main())


def test_follow_wakes_up_for_new_bytes_and_resumes_anywhere(writer, log):
    async def main():
        stream = log.follow(0, lambda: False)
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        writer.write(b"hello\n")
        async with asyncio.timeout(2):
            chunk = await waiting
        await stream.aclose()
        writer.write(b"world\n")
        (chunk,) = await collect(log.follow(chunk.next_offset, lambda: True))
        assert (chunk.offset, chunk.content) == (6, "world\n")

    run(main())


def test_follow_over_rotation_says_what_is_missing(writer, log):
    async def main():
        stream = log.follow(0, lambda: True)
        writer.write(b"line number 000\n")
        assert (await anext(stream)).next_offset == 16
        for number in range(1, 40):
            writer.write(b"line number %03d\n" % number)
        chunk = await anext(stream)
        assert chunk.truncated_before == chunk.offset == log.oldest
        assert await collect(stream) == []

    run(main())


def test_follow_of_an_ended_log_gives_out_a_cut_character_too(tmp_path, writer, log):
    writer.write(b"ab\xe2\x82")
    old(tmp_path / "log")
    chunks = run(collect(log.follow(0, lambda: True)))
    assert [chunk.content for chunk in chunks] == ["ab�"]


def test_follow_beyond_the_end(log):
    with pytest.raises(OffsetOutOfRange):
        run(collect(log.follow(1, lambda: True)))


def test_follow_lines(writer, log):
    async def main():
        writer.write(TEXT.encode() + b"\n" + b"y" * 50)
        done = False
        stream = log.follow_lines(lambda: done)
        found = await collect(stream, until=5)
        assert found == ["Loading 10 %", "Loading 90 %", "Loaded ✓", "ü€😀", "last line"]
        await stream.aclose()
        done = True
        assert await collect(log.follow_lines(lambda: done)) == []

    run(main())


def test_follow_lines_gives_a_line_without_end_in_pieces(tmp_path):
    writer = SegmentWriter(str(tmp_path), 1 << 20, 2 << 20)
    writer.write(b"z" * 10_000)
    writer.close()

    async def main():
        stream = LogReader(tmp_path).follow_lines(lambda: False)
        assert len(await anext(stream)) == 10_000
        await stream.aclose()

    run(main())


def test_ended_logs_are_capped_oldest_first_and_everything_else_is_spared(tmp_path):
    base = tmp_path / "logs"
    assert ended_logs_cap([base / "never there"], 0) == []
    for number, name in enumerate(["b", "a", "c", "running", "not ours"]):
        folder = base / name / "1"
        folder.mkdir(parents=True)
        path = folder / segment_name(0)
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 + number, 1000 + number))
    (base / "stray file").write_bytes(b"x" * 1000)
    ended = [base / "a", base / "b", base / "c"]
    assert ended_logs_cap(ended, 300) == []
    assert ended_logs_cap(ended, 250) == [base / "b"]
    assert ended_logs_cap(ended, 0) == [base / "a", base / "c"]
    assert sorted(path.name for path in base.iterdir()) == ["not ours", "running", "stray file"]
