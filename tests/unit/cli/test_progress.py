"""What is said about a start."""

import pytest

from tests.support.statuses import NOW, status
from vllm_bootstrap.cli import progress
from vllm_bootstrap.wire import Progress


def at(phase=None, **fields):
    return status("bootstrapping", progress={"phase": phase, "elapsed_s": 3.0, **fields})


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (at("weights"), "loading weights"),
        (at(), "starting"),
        (status("bootstrapping"), "starting"),
        (status("bootstrapping", attempt=2, next_attempt_at=NOW), "waiting for attempt 2"),
        (status("stopping", stopping_because="died"), "stopping (died)"),
        (status("ready"), "ready"),
    ],
)
def test_phases_in_words(launch, said):
    assert progress.phase_of(launch) == said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"phase": "weights", "fraction": 0.5, "detail": "2 of 4"}, "50 %"),
        ({"phase": "load", "downloaded_bytes": 1536}, "1.5 KiB in the cache"),
        ({"phase": "load", "downloaded_bytes": 1536, "download_total_bytes": 4096}, "1.5 KiB of 4.0 KiB in the cache"),
        ({"phase": "compile", "downloaded_bytes": 1536}, ""),
        ({"phase": "boot", "detail": "a line of the log"}, ""),
    ],
)
def test_details(fields, said):
    assert progress.details_of(Progress(elapsed_s=1, **fields)) == said


def test_no_progress_no_details():
    assert progress.details_of(None) == ""
    assert progress.overall(None) is None


def test_the_bar_follows_earlier_starts_else_the_phase():
    assert progress.overall(Progress(elapsed_s=30, eta_s=10, fraction=0.1)) == 0.75
    assert progress.overall(Progress(elapsed_s=30, eta_s=0)) == progress.READY_SOON
    assert progress.overall(Progress(elapsed_s=0, eta_s=0, fraction=0.1)) == 0.1
    assert progress.overall(Progress(elapsed_s=30)) is None


def test_a_pipe_gets_each_phase_once():
    phases = progress.PhaseLog()
    seen = [
        at("weights", fraction=0.1), at("weights", fraction=0.5), at("compile"),
        status("bootstrapping", attempt=2), status("ready", attempt=2),
    ]  # fmt: skip
    assert [phases.seen(found) for found in seen] == [
        "loading weights (10 %)", None, "compiling", "attempt 2: starting", None,
    ]  # fmt: skip
