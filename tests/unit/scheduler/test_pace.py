from __future__ import annotations

from vllm_bootstrap.scheduler.pace import DEFAULT_RETRY_S, Pace


def test_a_queue_takes_as_long_as_requests_have_taken_lately() -> None:
    pace = Pace()
    for second in range(1, 11):
        pace.finished(second / 2)
    assert pace.clears_in(4, 5.5) == 4 * (5.5 - 0.5) / 10


def test_nothing_known_is_a_fixed_guess() -> None:
    pace = Pace()
    assert pace.clears_in(100, 0.0) == DEFAULT_RETRY_S
    pace.finished(1.0)
    assert pace.clears_in(100, 2.0) == DEFAULT_RETRY_S
    pace.finished(1.0)
    assert pace.clears_in(100, 1.0) == DEFAULT_RETRY_S
    assert pace.clears_in(100, 62.0) == DEFAULT_RETRY_S
