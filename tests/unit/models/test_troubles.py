"""Words for failed downloads, waits between attempts, and the rate that is shown."""

from __future__ import annotations

import pytest

from vllm_bootstrap.engines.base import FailureClass
from vllm_bootstrap.models.troubles import BACKOFF_MAX_S, WINDOW_S, Rate, backoff_s, trouble


@pytest.mark.parametrize(
    ("name", "failure_class", "permanent"),
    [
        ("gated", FailureClass.GATED_REPOSITORY, True),
        ("token", FailureClass.GATED_REPOSITORY, True),
        ("no_repository", FailureClass.MODEL_NOT_FOUND, True),
        ("full", None, True),
        ("connection", FailureClass.MODEL_NOT_FOUND, False),
        ("hub", FailureClass.MODEL_NOT_FOUND, False),
        ("died", None, False),
        ("a word of a later version", None, False),
    ],
)
def test_only_what_may_pass_is_tried_again(name: str, failure_class: FailureClass | None, permanent: bool) -> None:
    found = trouble(name)
    assert (found.failure_class, found.permanent) == (failure_class, permanent)
    assert found.message
    assert found.hint


def test_what_the_helper_adds_is_one_short_line() -> None:
    assert trouble("hub", "(HTTP\n 503)").message.endswith("error. (HTTP 503)")
    assert len(trouble("hub", "x" * 10_000).message) < 400


def test_waits_grow_to_a_minute_and_are_spread() -> None:
    assert [backoff_s(n, 1.0) for n in (1, 2, 3, 4)] == [1, 2, 4, 8]
    assert backoff_s(100, 1.0) == BACKOFF_MAX_S
    assert backoff_s(2, 0.0) == 1.5


def test_the_rate_is_that_of_the_last_seconds() -> None:
    rate = Rate()
    assert rate.per_second() is None
    assert rate.eta_s(100) is None
    rate.saw(0, 1000)
    assert rate.per_second() is None
    rate.saw(0, 1000)
    assert rate.per_second() is None
    rate.saw(10, 2000)
    assert rate.per_second() == 100
    assert rate.eta_s(500) == 5
    for second in range(11, 60):
        rate.saw(second, 2000)
    assert rate.per_second() == 0
    assert rate.eta_s(500) is None
    rate.saw(60 + WINDOW_S, 1500)  # a file is fetched anew
    assert rate.per_second() is None
