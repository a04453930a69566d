"""Completion windows: what is a duration, and how long it may be."""

from __future__ import annotations

import pytest

from vllm_bootstrap.batches.windows import window_s
from vllm_bootstrap.errors import BadRequest


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("24h", 86400), ("90m", 5400), ("7d", 604800), ("30s", 30), ("1s", 1), ("30d", 2592000), ("2592000s", 2592000)],
)
def test_durations(text: str, seconds: float) -> None:
    assert window_s(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "24", "h", "0h", "-1h", "+1h", "1.5h", "1h30m", "024h", " 24h", "24h ", "24h\n", "24H", "1w", "24 h", "1e3s",
     "\N{ARABIC-INDIC DIGIT TWO}h", "99999999s"],
)  # fmt: skip
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(BadRequest, match="'24h', '90m' or '7d'") as caught:
        window_s(text)
    assert caught.value.param == "completion_window"


@pytest.mark.parametrize("text", ["31d", "721h", "2592001s", "9999999d"])
def test_what_is_too_long(text: str) -> None:
    with pytest.raises(BadRequest, match="longer than 30 days"):
        window_s(text)
