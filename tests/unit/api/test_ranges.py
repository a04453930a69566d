"""Which bytes a Range header asks for."""

from __future__ import annotations

import pytest

from vllm_bootstrap.api.ranges import Unsatisfiable, still_holds, wanted

SIZE = 100


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-", (0, 100)),
        ("bytes=0-0", (0, 1)),
        ("bytes=10-19", (10, 20)),
        ("Bytes = 10-19", (10, 20)),
        ("bytes=90-1000", (90, 100)),
        ("bytes=99-", (99, 100)),
        ("bytes=-1", (99, 100)),
        ("bytes=-100", (0, 100)),
        ("bytes=-1000", (0, 100)),
    ],
)
def test_one_range(header: str, expected: tuple[int, int]) -> None:
    assert wanted(header, SIZE) == expected


@pytest.mark.parametrize(
    "header",
    [None, "", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=5-4", "bytes=0-1,5-6", "lines=0-1", "bytes=0-1 x",
     "bytes=1--2", "bytes=" + "9" * 40 + "-", "bytes=٣-٤"],
)  # fmt: skip
def test_what_is_no_single_proper_range_is_ignored(header: str | None) -> None:
    assert wanted(header, SIZE) is None


@pytest.mark.parametrize(
    ("header", "size"),
    [("bytes=100-", 100), ("bytes=100-200", 100), ("bytes=-0", 100), ("bytes=0-", 0), ("bytes=-5", 0)],
)
def test_ranges_that_the_file_has_nothing_of(header: str, size: int) -> None:
    with pytest.raises(Unsatisfiable):
        wanted(header, size)


def test_if_range() -> None:
    etag, modified = '"file-1-5"', "Sat, 21 Nov 2026 19:33:44 GMT"
    assert still_holds(None, etag, modified)
    assert still_holds(etag, etag, modified)
    assert still_holds(modified, etag, modified)
    assert not still_holds("W/" + etag, etag, modified)
    assert not still_holds("Sat, 21 Nov 2026 19:33:45 GMT", etag, modified)
