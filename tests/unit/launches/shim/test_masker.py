"""Secrets in a stream: hidden at equal length however the stream is cut."""

import pytest

from vllm_bootstrap.launches.shim.logwriter import Masker, segment_name


def masked(secrets: list[bytes], *pieces: bytes) -> bytes:
    masker = Masker(secrets)
    return b"".join([masker.feed(piece) for piece in pieces] + [masker.end()])


def test_equal_length():
    assert masked([b"hf_secret"], b"token=hf_secret, again hf_secret\n") == b"token=*********, again *********\n"


def test_every_cut_of_the_stream():
    text, secret = b"before hf_secret after", b"hf_secret"
    for cut in range(len(text) + 1):
        assert masked([secret], text[:cut], text[cut:]) == b"before ********* after"
    assert masked([secret], *[text[i : i + 1] for i in range(len(text))]) == b"before ********* after"


@pytest.mark.parametrize(
    ("secrets", "text", "expected"),
    [
        ([b"abcd", b"bcde"], b"xabcdex", b"x*****x"),  # overlapping
        ([b"abcd", b"abcdefgh"], b"abcdefgh abcd", b"******** ****"),  # one begins like the other
        ([b"aaaa"], b"aaaaaa", b"******"),
        ([b"abab"], b"ababab", b"******"),
        ([b"abc"], b"abc", b"abc"),  # too short to be a secret
        ([b""], b"text", b"text"),
        ([], b"text", b"text"),
        ([b"hf_secret"], b"hf_secre", b"hf_secre"),  # never completed
    ],
)
def test_cases(secrets, text, expected):
    for cut in range(len(text) + 1):
        assert masked(secrets, text[:cut], text[cut:]) == expected


def test_only_what_may_be_a_beginning_is_held_back():
    masker = Masker([b"hf_secret"])
    assert masker.feed(b"loading 10 %\n") == b"loading 10 %\n"
    assert masker.feed(b"token hf_sec") == b"token "
    assert masker.feed(b"tion\n") == b"hf_section\n"


def test_segment_names_sort_like_offsets():
    names = [segment_name(offset) for offset in (0, 9, 10, 10**12)]
    assert names == sorted(names)
    assert {len(name) for name in names} == {24}
