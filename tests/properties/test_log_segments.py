"""Segments against a plain byte string: whatever is written in whatever pieces, offsets mean what they say."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_bootstrap.launches.logs import LogReader
from vllm_bootstrap.launches.shim.logwriter import SegmentWriter, list_segments

PIECES = st.lists(st.text(st.sampled_from("ab\n€😀"), max_size=30).map(str.encode), max_size=12)


@settings(max_examples=60, deadline=None)
@given(PIECES, st.integers(4, 40), st.integers(2, 5), st.integers(4, 50))
def test_what_is_read_is_what_was_written(pieces: list[bytes], segment: int, kept: int, limit: int) -> None:
    whole = b"".join(pieces)
    with tempfile.TemporaryDirectory() as folder:
        writer, log = SegmentWriter(folder, segment, segment * kept), LogReader(Path(folder))
        for piece in pieces:
            writer.write(piece)
            assert sum(size for _, size in list_segments(folder)) <= segment * kept
        writer.close()
        assert log.size == len(whole)
        offset, read = log.oldest, b""
        while (chunk := log.read(offset, limit)).next_offset > offset:
            assert chunk.truncated_before is None
            data = whole[chunk.offset : chunk.next_offset]
            assert chunk.content == data.decode("utf-8", "replace")
            read, offset = read + data, chunk.next_offset
        assert read == whole[log.oldest :]
