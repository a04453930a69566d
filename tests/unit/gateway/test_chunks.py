"""Plain chunks, told by their length."""

from __future__ import annotations

import pytest

from vllm_bootstrap.gateway.chunks import KNOWN, SIZE_LINES, framed


@pytest.mark.parametrize("size", [1, 15, 16, 255, 256, 2047, 2048, 4095, 4096, 70_000])
def test_a_piece_is_framed(size: int) -> None:
    piece = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert framed(piece) == b"%x\r\n" % size + piece + b"\r\n"


def test_a_line_for_every_length_that_a_whole_chunk_can_have() -> None:
    lengths = {}
    for size in range(1, KNOWN):
        whole = framed(b"\n" * size)
        if len(whole) < KNOWN:
            assert whole.startswith(SIZE_LINES[len(whole)])
            assert whole == SIZE_LINES[len(whole)] + b"\n" * size + b"\r\n"
            lengths[len(whole)] = size
    assert len(SIZE_LINES) == KNOWN
    none = set(range(KNOWN)) - set(lengths)
    assert none == {0, 1, 2, 3, 4, 5, 21, 262}  # the last chunk would be 5 with its CRLF
    for length in none:
        assert len(SIZE_LINES[length]) > length  # nothing of that length begins so
