"""The masker against a naive model: what comes out does not depend on how the stream was cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from vllm_bootstrap.launches.shim.logwriter import Masker

LETTERS = st.lists(st.sampled_from(b"abc"), max_size=40).map(bytes)
SECRETS = st.lists(st.lists(st.sampled_from(b"abc"), min_size=4, max_size=7).map(bytes), max_size=3)


def naive(secrets: list[bytes], text: bytes) -> bytes:
    hidden = {
        position
        for secret in secrets
        for start in range(len(text))
        if text.startswith(secret, start)
        for position in range(start, start + len(secret))
    }
    return bytes(b"*"[0] if position in hidden else byte for position, byte in enumerate(text))


@given(SECRETS, LETTERS, st.lists(st.integers(0, 40), max_size=6))
def test_cuts_make_no_difference(secrets: list[bytes], text: bytes, cuts: list[int]) -> None:
    masker, borders = Masker(secrets), sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[start:end] for start, end in pairwise(borders)]
    assert b"".join([*(masker.feed(piece) for piece in pieces), masker.end()]) == naive(secrets, text)
