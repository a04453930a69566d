from vllm_bootstrap.launches.liveness import Liveness, Sample, Verdict, boot_timed_out

LIMITS = {"unresponsive_after_s": 10.0, "unhealthy_after_s": 60.0}


def sample(at: float, *, healthy=True, metrics=True, running=None, tokens=None) -> Sample:
    return Sample(at, healthy, metrics, running, tokens)


def test_idle_and_healthy_is_moving():
    state = Liveness(0.0).observe(sample(50, running=0, tokens=7))
    assert state.verdict(55, **LIMITS) is Verdict.ALIVE
    assert state.observe(sample(500, running=0, tokens=7)).verdict(505, **LIMITS) is Verdict.ALIVE


def test_busy_with_growing_counters_is_moving():
    state = Liveness(0.0).observe(sample(1, running=3, tokens=10)).observe(sample(40, running=3, tokens=11))
    assert state.verdict(45, **LIMITS) is Verdict.ALIVE


def test_busy_with_still_counters_becomes_unresponsive_and_then_failed_although_health_answers():
    state = Liveness(0.0).observe(sample(1, running=3, tokens=10))
    for at in range(2, 80, 2):
        state = state.observe(sample(at, running=3, tokens=10))
    assert state.verdict(11.5, **LIMITS) is Verdict.UNRESPONSIVE
    assert state.verdict(62, **LIMITS) is Verdict.FAILED


def test_it_recovers_when_tokens_move_again():
    state = Liveness(0.0).observe(sample(1, running=3, tokens=10)).observe(sample(30, running=3, tokens=10))
    assert state.verdict(30, **LIMITS) is Verdict.UNRESPONSIVE
    assert state.observe(sample(31, running=3, tokens=12)).verdict(32, **LIMITS) is Verdict.ALIVE


def test_timed_out_probe_counts_as_standing_still():
    state = Liveness(0.0).observe(sample(1, running=0, tokens=10)).observe(sample(20, healthy=False))
    assert state.verdict(20, **LIMITS) is Verdict.UNRESPONSIVE
    assert state.tokens == 10


def test_moving_counters_outweigh_a_failed_health_probe():
    state = (
        Liveness(0.0).observe(sample(1, running=1, tokens=10)).observe(sample(20, healthy=False, running=1, tokens=11))
    )
    assert state.verdict(21, **LIMITS) is Verdict.ALIVE


def test_health_alone_decides_for_an_engine_without_metrics():
    state = Liveness(0.0).observe(sample(30, metrics=False))
    assert state.verdict(31, **LIMITS) is Verdict.ALIVE
    assert state.observe(sample(45, healthy=False, metrics=False)).verdict(45, **LIMITS) is Verdict.UNRESPONSIVE


def test_time_in_which_nobody_looked_is_not_held_against_the_engine():
    state = Liveness(0.0, longest_gap_s=5).observe(sample(1, running=3, tokens=10))
    woken = state.observe(sample(501, healthy=False))  # frozen for 500 seconds in the middle of a probe
    assert woken.verdict(501, **LIMITS) is Verdict.ALIVE
    for at in range(505, 564, 4):
        woken = woken.observe(sample(at, healthy=False))
    assert woken.verdict(564, **LIMITS) is Verdict.FAILED  # looked at without a gap: all of it counts


def test_a_start_times_out_only_when_late_and_without_progress():
    limits = {"start_timeout_s": 100.0, "start_stall_timeout_s": 50.0}
    assert not boot_timed_out(elapsed_s=99, since_progress_s=99, **limits)
    assert not boot_timed_out(elapsed_s=500, since_progress_s=49, **limits)
    assert boot_timed_out(elapsed_s=101, since_progress_s=51, **limits)
    assert boot_timed_out(elapsed_s=3, since_progress_s=3, start_timeout_s=2, start_stall_timeout_s=600)
