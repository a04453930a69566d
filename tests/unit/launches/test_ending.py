from vllm_bootstrap.engines.base import Failure, FailureClass
from vllm_bootstrap.launches.ending import Outcome, explain_end
from vllm_bootstrap.launches.lifecycle import Why
from vllm_bootstrap.launches.types import ExitRecord


class StubEngine:
    def explain(self, facts, log_tail):
        return Failure(FailureClass.ENGINE_DIED, f"exit {facts.exit_code}", "hint", permanent=False, lines=log_tail)


def record(**changes) -> ExitRecord:
    base = {"exit_code": 0, "signal": None, "forced": False, "stop_requested": False, "ended_at": 1.0}
    return ExitRecord(**{**base, **changes})


def explain(why: Why, outcome: Outcome):
    return explain_end(why, outcome, StubEngine(), ("a", "b"))


def test_the_operators_wish_is_no_failure():
    assert explain(Why.OPERATOR, Outcome(None, forced=True)) is None


def test_boot_timeout_and_unhealthy_name_themselves():
    assert explain(Why.BOOT_TIMEOUT, Outcome(record(), forced=True)).failure_class is FailureClass.START_TIMEOUT
    assert explain(Why.UNHEALTHY, Outcome(record(), forced=True)).failure_class is FailureClass.UNHEALTHY


def test_one_that_did_not_wake_says_why_where_that_is_known():
    known = Outcome(record(), forced=False, trouble=(FailureClass.WAKE_FAILED, "it answered nonsense"))
    for outcome, message in ((known, "it answered nonsense"), (Outcome(record(), forced=False), "did not wake")):
        failure = explain(Why.WAKE_FAILED, outcome)
        assert failure.failure_class is FailureClass.WAKE_FAILED
        assert message in failure.message


def test_trouble_of_ours_comes_before_exit_codes():
    outcome = Outcome(None, forced=False, trouble=(FailureClass.GPU_LOCKED, "locked"))
    failure = explain(Why.DIED, outcome)
    assert (failure.failure_class, failure.message) == (FailureClass.GPU_LOCKED, "locked")


def test_a_missing_record_means_the_shim_is_lost():
    assert explain(Why.DIED, Outcome(None, forced=False)).failure_class is FailureClass.SHIM_LOST


def test_an_engine_that_could_not_be_executed():
    failure = explain(Why.DIED, Outcome(record(exit_code=None, error="no such file"), forced=False))
    assert failure.failure_class is FailureClass.SPAWN_FAILED
    assert failure.message == "no such file"


def test_the_engine_is_told_whether_it_slept():
    class Telling:
        def explain(self, facts, _log_tail):
            return facts.asleep

    for asleep in (True, False):
        outcome = Outcome(record(signal=9), forced=False, was_ready=True, asleep=asleep)
        assert explain_end(Why.DIED, outcome, Telling(), ()) is asleep


def test_exit_zero_without_our_stop_is_explained_by_the_engine():
    failure = explain(Why.DIED, Outcome(record(), forced=False, was_ready=True))
    assert failure.failure_class is FailureClass.ENGINE_DIED
    assert failure.lines == ("a", "b")
