from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_bootstrap import ids

TIMES = st.integers(0, 2**50 - 1)
RANDOM = st.binary(min_size=ids.RANDOM_BYTES, max_size=16)


def test_an_id_is_prefix_time_and_chance_in_crockford_base_32() -> None:
    assert ids.new_id("l", 0, bytes(7)) == "l" + "0" * 20
    assert ids.new_id("l", 33, b"\xff" * 7) == "l" + "0" * 8 + "11" + "z" * 10


@given(TIMES, RANDOM)
def test_made_ids_are_recognised_and_url_safe(now_ms: int, random: bytes) -> None:
    made = ids.new_id("l", now_ms, random)
    assert len(made) == 21
    assert made.isalnum()
    assert made == made.lower()
    assert ids.is_launch_id(made)


@given(TIMES, TIMES, RANDOM, RANDOM)
def test_ids_sort_by_time(early: int, late: int, one: bytes, other: bytes) -> None:
    if early < late:
        assert ids.new_id("l", early, one) < ids.new_id("l", late, other)


@given(TIMES, RANDOM, RANDOM)
def test_fifty_bits_of_chance_are_used(now_ms: int, one: bytes, other: bytes) -> None:
    same = int.from_bytes(one[:7], "big") >> 6 == int.from_bytes(other[:7], "big") >> 6
    assert (ids.new_id("l", now_ms, one) == ids.new_id("l", now_ms, other)) == same


def test_too_little_chance_is_refused() -> None:
    with pytest.raises(ValueError, match="7 random bytes"):
        ids.new_id("l", 1, b"123456")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "l",
        "x" + "0" * 20,
        "l" + "0" * 19,
        "l" + "0" * 21,
        "l" + "i" * 20,
        "L" + "0" * 20,
        "l" + "0" * 20 + "\n",
        "../l",
    ],
)
def test_other_texts_are_no_launch_ids(text: str) -> None:
    assert not ids.is_launch_id(text)


def test_ids_of_launches_and_of_groups_are_told_apart() -> None:
    launch, group = ids.new_id("l", 1, bytes(7)), ids.new_id("g", 1, bytes(7))
    assert ids.is_group_id(group)
    assert not ids.is_launch_id(group)
    assert not ids.is_group_id(launch)
    assert not ids.is_group_id(group + "\n")


def test_ids_of_files_are_safe_names() -> None:
    made = ids.new_id(ids.FILE_PREFIX, 1, bytes(7))
    assert ids.is_file_id(made)
    for other in ("", made + "\n", made[5:], f"../{made}", made.upper(), made + ".part", made.replace("0", "u")):
        assert not ids.is_file_id(other), other
