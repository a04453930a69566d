"""What launches have to do, in words."""

import pytest

from vllm_bootstrap.cli import loads
from vllm_bootstrap.wire import BatchBudget, Load

NOTHING = {"realtime": 0, "batch": 0}


def budget(**fields):
    numbers = {"slots": 32, "reserve": 4, "allowance": 28, "batch_sequences": 7, "realtime_sequences": 0}
    return BatchBudget(**{**numbers, "reason": "Realtime is idle.", "promotions": 0, **fields})


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (Load(in_flight=NOTHING, queued=NOTHING), "0 running, 0 queued"),
        (
            Load(in_flight={"realtime": 2, "batch": 5}, queued={"realtime": 0, "batch": 9}, capacity=8),
            "7 (2 realtime, 5 batch) running on 8 slots, 9 (9 batch) queued",
        ),
        (
            Load(in_flight=NOTHING, queued={"realtime": 1, "batch": 0}, oldest_wait_s=90.0),
            "0 running, 1 (1 realtime) queued, the oldest for 1 m 30 s",
        ),
    ],
)
def test_requests_by_class(load, said):
    assert loads.requests_of(load) == said


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (None, ""),
        (budget(), "7 of 28 allowed (32 slots, 4 kept for realtime): Realtime is idle."),
        (budget(slots=1, reserve=0, allowance=1, batch_sequences=0), "0 of 1 allowed (1 slots): Realtime is idle."),
    ],
)
def test_what_batch_may_use_and_why(batch, said):
    assert loads.batch_of(Load(in_flight=NOTHING, queued=NOTHING, batch=batch)) == said


def test_the_share_of_batch_of_a_group_is_that_of_all_its_launches_that_tell():
    told = [Load(in_flight=NOTHING, queued=NOTHING, batch=batch) for batch in (budget(), None, budget(allowance=2))]
    assert loads.batch_share(*told) == "14 of 30"
    assert loads.batch_share(told[1]) == "-"
