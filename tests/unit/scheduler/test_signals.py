from vllm_bootstrap.engines.metrics_text import Counters
from vllm_bootstrap.scheduler.ports import EngineSignals
from vllm_bootstrap.scheduler.signals import signals_of


def test_counters_become_signals():
    counters = Counters(1.0, 2.0, 3.0, 4.0, 0.5, 6.0, 0.7, 8.0, 0.9, 10.0)
    assert signals_of(counters) == EngineSignals(1, 2, 0.5, 6, 4, 3, 0.7, 8, 0.9, 10)


def test_what_is_not_said_stays_unknown():
    assert signals_of(Counters()) == EngineSignals()
