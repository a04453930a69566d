"""Counting finished requests: buckets, classes, tokens, and a bound on names."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_bootstrap import tallies
from vllm_bootstrap.errors import QueueFull
from vllm_bootstrap.gateway.limits import RequestRecord
from vllm_bootstrap.scheduler.tickets import Grant, Ticket
from vllm_bootstrap.serving import Endpoint, Instance
from vllm_bootstrap.tallies import Spread, Traffic

INSTANCE = Instance("a", "a", "raw", "base", ("m",), Endpoint(uds="/x"), 1, ())


def record(**fields: Any) -> RequestRecord:
    base = RequestRecord(
        "req_1", "POST", "/v1/chat/completions", 200, None, "alice", "model", "l1", "realtime", 500, 0.0, 2.0, 0.25, 1,
        2, prompt_tokens=7, completion_tokens=11, inter_token_s=0.01, stream=True,
    )  # fmt: skip
    return base._replace(**fields)


def of(traffic: Traffic, name: str = "realtime") -> tallies.ClassTally:
    return traffic.classes[name]


def test_a_value_counts_in_every_bucket_from_its_bound_on():
    spread = Spread((1, 2))
    for value in (0.5, 1, 1.5, 3):
        spread.add(value)
    assert spread.cumulated() == [("1.0", 2), ("2.0", 3), ("+Inf", 4)]
    assert spread.total == 6


def test_the_first_token_of_a_stream_counts_from_arrival_the_first_byte_from_the_grant():
    traffic = Traffic()
    traffic.finished(record())
    tally = of(traffic)
    assert (tally.first_byte.total, tally.first_token.total, tally.wait.total) == (0.25, 0.75, 0.5)
    assert (tally.wait.count, traffic.served) == (1, 1)
    assert tally.token_gap.total == 0.01
    assert tally.tokens == {"model": [7, 11]}


def test_an_answer_that_comes_whole_has_a_first_byte_and_no_first_token():
    traffic = Traffic()
    traffic.finished(record(stream=False, inter_token_s=None))
    assert of(traffic).first_byte.total == 0.25
    assert of(traffic).first_token.cumulated()[-1] == ("+Inf", 0)


def test_a_refused_request_is_a_status_and_nothing_more():
    traffic = Traffic()
    traffic.finished(record(status=429, launch_id=None, first_byte_s=None, prompt_tokens=None, completion_tokens=None))
    traffic.finished(record(status=401, cls=None, launch_id=None, owner=None, model=None))
    assert of(traffic).statuses == {429: 1}
    assert traffic.served == 0
    assert of(traffic).wait.cumulated()[-1] == ("+Inf", 0)
    assert of(traffic).tokens == {}
    assert of(traffic, "none").statuses == {401: 1}


def test_what_an_answer_does_not_tell_is_not_counted_as_nothing():
    traffic = Traffic()
    traffic.finished(record(first_byte_s=None, inter_token_s=None, prompt_tokens=None, completion_tokens=None))
    traffic.finished(record(inter_token_s=None))  # one token: no gap
    tally = of(traffic)
    spreads = (tally.wait, tally.first_byte, tally.first_token, tally.token_gap)
    assert [spread.cumulated()[-1][1] for spread in spreads] == [2, 1, 1, 0]
    assert tally.tokens == {"model": [7, 11]}


def test_tokens_of_a_model_add_up():
    traffic = Traffic()
    traffic.finished(record())
    traffic.finished(record(completion_tokens=None))
    assert of(traffic).tokens == {"model": [14, 11]}


def test_every_class_has_a_tally_from_the_start():
    assert [name for name, tally in Traffic() if not tally.statuses] == ["realtime", "batch", "none"]


def test_names_of_models_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tallies, "MODELS_MAX", 2)
    traffic = Traffic()
    for number in range(5):
        traffic.finished(record(model=f"m{number}"))
    assert of(traffic).tokens == {"m0": [7, 11], "m1": [7, 11], "other": [21, 33]}


def test_what_the_scheduler_did():
    traffic = Traffic()
    ticket, grant = Ticket("me", "batch"), Grant(1, INSTANCE, 0.0, promoted=True, model="m")
    traffic.promoted(ticket, grant)
    traffic.admitted(ticket, grant)
    traffic.admitted(ticket, grant)
    traffic.rejected(ticket, "m", QueueFull("No"))
    traffic.revoked(ticket, "m", "a")
    assert traffic.admissions == {("batch", "admitted"): 2, ("batch", "queue_full"): 1}
    assert (traffic.taken_back, traffic.promotions) == (1, 1)
