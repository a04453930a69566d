from vllm_bootstrap.engines.base import Progress
from vllm_bootstrap.launches.progress import StartProgress


def test_phases_fractions_and_durations():
    start = StartProgress(100.0, estimate_s=30.0)
    start.on_phase("starting", 100.0)
    start.on_line(Progress("load", 0.25, "1/4"), 102.0)
    start.on_line(Progress("load", 0.75, "3/4"), 105.0)
    view = start.view(110.0)
    assert (view.phase, view.fraction, view.detail) == ("load", 0.75, "3/4")
    assert (view.elapsed_s, view.eta_s) == (10.0, 20.0)
    assert start.finish(112.0) == {"starting": 2.0, "load": 10.0}


def test_only_news_counts_as_progress():
    start = StartProgress(0.0)
    start.on_line(Progress("load", 0.5), 1.0)
    start.on_line(Progress("load", 0.5), 9.0)
    start.on_line(Progress("load", None), 10.0)
    start.on_line(Progress("load", 0.4), 11.0)
    assert start.moved_at == 1.0
    assert start.view(12.0).fraction == 0.5
    start.on_line(Progress("load", 0.6), 13.0)
    assert start.moved_at == 13.0


def test_growing_cache_is_progress_but_a_first_look_is_not():
    start = StartProgress(0.0)
    start.on_downloaded(500, 5.0)
    assert start.moved_at == 0.0
    start.on_downloaded(500, 6.0)
    assert start.moved_at == 0.0
    start.on_downloaded(700, 7.0)
    assert start.moved_at == 7.0
    assert start.view(8.0).downloaded_bytes == 700


def test_nothing_known_says_nothing_but_elapsed_time():
    view = StartProgress(0.0).view(4.0)
    assert (view.phase, view.fraction, view.eta_s, view.elapsed_s) == (None, None, None, 4.0)
    assert StartProgress(0.0).finish(1.0) == {}


def test_eta_never_goes_below_zero():
    assert StartProgress(0.0, estimate_s=5.0).view(50.0).eta_s == 0.0
