"""The decisions of waiting."""

import pytest

from tests.support.statuses import ID, status
from vllm_bootstrap.sdk.failures import DaemonUnreachable, LaunchFailed, WaitTimeout
from vllm_bootstrap.sdk.waiting import RESTART_PATIENCE_S, SLOWEST_POLL_S, Patience, ReadyWait
from vllm_bootstrap.wire import LaunchGroup

AWAY = DaemonUnreachable("http://x", "gone")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def wait(clock, timeout_s=None, on_progress=None):
    return ReadyWait("l1", timeout_s, on_progress, clock)


def test_ready_is_the_end_and_all_that_was_seen_is_told(clock):
    seen = []
    waiting = wait(clock, on_progress=lambda found: seen.append(found.state))
    assert not waiting.saw(status("bootstrapping"))
    assert not waiting.saw(status("stopping", stopping_because="died"))  # a restart may follow
    assert waiting.saw(status("ready"))
    assert seen == ["bootstrapping", "stopping", "ready"]


def group(*replicas):
    one = replicas[0].model_dump()
    return LaunchGroup.model_validate({**one, "ready": 0, "replicas": [replica.model_dump() for replica in replicas]})


def test_a_group_is_ready_when_all_of_it_is_and_fails_with_any(clock):
    seen = []
    waiting = wait(clock, 10, lambda found: seen.append((found.launch_id, found.state)))
    starting = status("bootstrapping", launch_id="l2", progress={"phase": "weights", "elapsed_s": 3})
    assert not waiting.saw_group(group(status("ready"), starting))
    assert seen == [(ID, "ready"), ("l2", "bootstrapping")]
    clock.now += 11
    with pytest.raises(WaitTimeout, match="weights"):
        waiting.pause()
    assert waiting.saw_group(group(status("ready"), status("ready", launch_id="l2")))
    with pytest.raises(LaunchFailed) as caught:
        waiting.saw_group(group(starting, status("failed", launch_id="l3")))
    assert caught.value.status.launch_id == "l3"


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_an_end_before_ready_is_a_failure(clock, state):
    with pytest.raises(LaunchFailed) as caught:
        wait(clock).saw(status(state))
    assert caught.value.status.state == state


def test_failures_tell_class_message_and_hint():
    failure = {"class": "bad_flag", "message": "Unknown flag.", "hint": "Remove it.", "permanent": True}
    assert "failed (bad_flag): Unknown flag. Remove it." in str(LaunchFailed(status("failed", failure=failure)))
    assert "was stopped before it was ready" in str(LaunchFailed(status("stopped")))


def test_polls_slow_down_to_a_limit_and_end_with_the_time(clock):
    waiting = wait(clock, timeout_s=10)
    pauses = [waiting.pause() for _ in range(20)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == SLOWEST_POLL_S
    clock.now += 9.9
    assert waiting.pause() == pytest.approx(0.1)
    clock.now += 0.2
    waiting.saw(status("bootstrapping", progress={"phase": "weights", "elapsed_s": 3}))
    with pytest.raises(WaitTimeout, match=r"not ready after 10 s \(phase: weights\)") as caught:
        waiting.pause()
    assert isinstance(caught.value, TimeoutError)


def test_without_a_limit_it_waits_on(clock):
    waiting = wait(clock)
    clock.now += 1e6
    assert waiting.pause() > 0


def test_a_daemon_that_was_never_met_is_an_error_at_once(clock):
    with pytest.raises(DaemonUnreachable):
        wait(clock).missed(AWAY)


def test_a_daemon_that_is_restarted_is_waited_for_but_not_for_ever(clock):
    waiting = wait(clock)
    waiting.saw(status("bootstrapping"))
    waiting.missed(AWAY)
    clock.now += RESTART_PATIENCE_S - 1
    waiting.missed(AWAY)
    waiting.saw(status("bootstrapping"))
    clock.now += RESTART_PATIENCE_S
    waiting.missed(AWAY)
    clock.now += RESTART_PATIENCE_S
    with pytest.raises(DaemonUnreachable):
        waiting.missed(AWAY)


def test_patience_says_when_to_try_again(clock):
    patience = Patience(clock=clock)
    patience.answered()
    assert patience.missed(AWAY) == SLOWEST_POLL_S
