"""Words and figures for people."""

import pytest

from vllm_bootstrap import wording
from vllm_bootstrap.engines.phases import PHASES
from vllm_bootstrap.launches.lifecycle import Why
from vllm_bootstrap.launches.progress import STARTING, WAITING_FOR_GPU


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-1, "0.0 s"), (0.42, "0.4 s"), (9.96, "10.0 s"), (42.4, "42 s"), (59.7, "1 m 0 s"), (192, "3 m 12 s"),
        (7500, "2 h 5 m"), (86400 * 4 + 3700, "4 d 1 h"),
    ],
)  # fmt: skip
def test_durations_have_two_units_at_most(seconds, shown):
    assert wording.duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, "-"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (139 << 30, "139 GiB"), (5 << 40, "5.0 TiB"),
        (3 << 60, "3145728 TiB"),
    ],
)  # fmt: skip
def test_sizes_are_short(count, shown):
    assert wording.size(count) == shown


def test_time_left():
    assert wording.time_left(42) == "about 42 s left"
    assert wording.time_left(0) == "longer than last time"


def test_fractions():
    assert (wording.percent(None), wording.percent(0.256)) == ("-", "26 %")
    assert (wording.percent(0.0), wording.percent(0.001), wording.percent(0.0099)) == ("0 %", "0.1 %", "1 %")


@pytest.mark.parametrize("name", [*PHASES, STARTING, WAITING_FOR_GPU])
def test_every_phase_of_a_start_has_words(name):
    assert name in wording.PHASES
    assert wording.phase(name) == wording.PHASES[name]


@pytest.mark.parametrize("why", Why)
def test_every_reason_of_an_end_has_words(why):
    assert why.value in wording.REASONS


def test_what_has_no_words_is_shown_nevertheless():
    assert wording.phase("brand_new") == "brand new"
    assert wording.reason("brand_new") == "brand new"
    assert wording.phase(None) == "starting"
    assert wording.reason(None) == "asked to"


@pytest.mark.parametrize(
    ("milliseconds", "said"), [(0, "0 ms"), (0.41, "0.4 ms"), (41.6, "42 ms"), (3140, "3.1 s"), (125_000, "2 m 5 s")]
)
def test_short_times_are_told_in_milliseconds(milliseconds, said):
    assert wording.short(milliseconds) == said


def test_speed_is_that_of_the_answer_once_it_had_begun():
    assert wording.tokens_per_second(100, 3000, 1000) == 50
    assert wording.tokens_per_second(None, 3000, 1000) is None
    assert wording.tokens_per_second(5, 1000, 1000) is None
