"""What is said of processes that nothing knew any more."""

from __future__ import annotations

from vllm_bootstrap.launches.process import Leftover


def test_a_leftover_is_told_in_words() -> None:
    assert Leftover("l1", 2, (7, 8), gone=True).in_words() == (
        "Ended what was left of launch l1, attempt 2, which nothing knew any more: PID 7, 8"
    )
    assert "cannot be ended yet: PID 7" in Leftover("l1", 2, (7,), gone=False).in_words()
