"""Where text may be cut: the byte arithmetic under the log reader."""

import pytest

from vllm_bootstrap.launches.logs import _character_start, _whole_characters

TEXT = "aé€😀b".encode()


def test_ends_are_moved_back_to_whole_characters():
    for cut in range(len(TEXT) + 1):
        kept = TEXT[: _whole_characters(TEXT[:cut])]
        kept.decode()
        assert 0 <= cut - len(kept) <= 3


def test_starts_are_moved_back_to_the_character_they_lie_in():
    starts = {_character_start(TEXT, position) for position in range(len(TEXT))}
    assert starts == {0, 1, 3, 6, 10}
    assert _character_start(TEXT, len(TEXT)) == len(TEXT)


@pytest.mark.parametrize("data", [b"", b"\x80\x80\x80\x80\x80", b"a\x80", b"\xff", b"\xc0", b"\xf5\x80"])
def test_bytes_that_are_no_text_are_left_where_they_are(data):
    assert _whole_characters(data) == len(data)
    for position in range(len(data)):
        assert _character_start(data, position) == position
