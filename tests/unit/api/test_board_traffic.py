"""What the page shows of requests and of what batch may use."""

from datetime import UTC, datetime

import pytest

from vllm_bootstrap.api import board_traffic
from vllm_bootstrap.api.board_traffic import Share, slots_card, traffic_part
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.wire import BatchBudget, Load
from vllm_bootstrap.wire_requests import ActivityEntry, RequestEntry

ADMIN = Principal("root", frozenset({"admin"}))
WATCHER = Principal("alice", frozenset({"monitor"}))
BOTH = Principal("alice", frozenset({"monitor", "realtime"}))


def budget(**fields):
    base = {"slots": 20, "reserve": 2, "allowance": 8, "batch_sequences": 5, "realtime_sequences": 3, "reason": "So."}
    return BatchBudget(**{**base, **fields})


def entry(number=1, **fields):
    base = {
        "id": f"req_{number}", "request_class": "realtime", "owner": "alice", "model": "m", "state": "running",
        "method": "POST", "path": "/v1/chat/completions", "age_s": 3.0, "queue_ms": 0, "sequences": 1, "tokens": 0,
        "stream": True,
    }  # fmt: skip
    return RequestEntry(**{**base, **fields})


def ended(**fields):
    base = {
        "id": "7", "request_id": "req_7", "started_at": datetime(2027, 1, 15, 8, 0, 5, tzinfo=UTC), "owner": "alice",
        "request_class": "batch", "model": "m", "method": "POST", "path": "/v1/completions", "status": 200,
        "stream": True, "queue_ms": 400, "ttft_ms": 500.0, "duration_ms": 2500.0, "prompt_tokens": 10,
        "completion_tokens": 100, "bytes_in": 1, "bytes_out": 1,
    }  # fmt: skip
    return ActivityEntry(**{**base, **fields})


def test_slots_are_shared_out_from_the_left():
    made = slots_card(Load(capacity=20, in_flight={"realtime": 3, "batch": 2}, queued={"batch": 9}, batch=budget()))
    assert made is not None
    assert made.shares == (Share("realtime", 0, 15), Share("batch", 15, 25), Share("allowed", 40, 15))
    assert dict(made.figures) == {
        "realtime": "3 running", "batch": "2 running of 8 allowed, 9 queued", "kept for realtime": "2",
    }  # fmt: skip
    assert made.label == "Slots: 3 realtime, 5 batch, of 20"
    assert made.reason == "So."


def test_shares_never_leave_their_bar():
    made = slots_card(Load(batch=budget(slots=4, allowance=9, batch_sequences=3, realtime_sequences=3)))
    assert made is not None
    assert made.shares == (Share("realtime", 0, 75), Share("batch", 75, 25))


def test_a_first_token_is_compared_with_alone_and_waiting_is_said():
    load = Load(oldest_wait_s=12, batch=budget(ttft_baseline_s=0.03, ttft_recent_s=0.045))
    made = slots_card(load)
    assert made is not None
    assert dict(made.figures)["first token"] == "45 ms, 150 % of alone"
    assert dict(made.figures)["oldest waits"] == "12 s"


@pytest.mark.parametrize("load", [Load(), Load(batch=budget(slots=0))])
def test_where_nothing_is_known_nothing_is_drawn(load):
    assert slots_card(load) is None


def test_what_waits_comes_first_and_the_rest_is_counted(monkeypatch):
    monkeypatch.setattr(board_traffic, "REQUESTS_SHOWN", 2)
    requests = [entry(1), entry(2, state="queued", queue_ms=4000), entry(3, state="reading"), entry(4)]
    made = traffic_part(requests, [], ADMIN)
    assert [row.id for row in made.requests] == ["req_2", "req_1"]
    assert (made.headline, made.more) == ("2 running · 1 queued · 1 reading", "and 2 more")


def test_a_row_says_what_is_worth_saying():
    (row,) = traffic_part([entry(queue_ms=1500, tokens=40, sequences=4)], [], WATCHER).requests
    assert row.figures == "3.0 s · waited 1.5 s · 40 tokens so far · 4 sequences"
    (row,) = traffic_part([entry(queue_ms=3, model=None)], [], WATCHER).requests
    assert (row.figures, row.model) == ("3.0 s", "/v1/chat/completions")


@pytest.mark.parametrize(
    ("caller", "own", "foreign"), [(ADMIN, True, True), (BOTH, True, False), (WATCHER, False, False)]
)
def test_cancelling_is_offered_to_those_who_may(caller, own, foreign):
    made = traffic_part([entry(1), entry(2, owner="bob")], [], caller)
    assert [row.can_cancel for row in made.requests] == [own, foreign]


@pytest.mark.parametrize(
    ("fields", "tone", "status", "figures", "speed"),
    [
        ({}, "good", "200", "2.5 s · first token 500 ms · 10 + 100 tokens", "50 tokens/s"),
        (
            {"status": 429, "code": "queue_full", "ttft_ms": None, "duration_ms": 0.4, "queue_ms": 0,
             "prompt_tokens": None, "completion_tokens": None},
            "refused", "429", "queue full · 0.4 ms", "",
        ),
        (
            {"status": 502, "code": "upstream_error", "ttft_ms": None, "completion_tokens": None},
            "bad", "502", "upstream error · 2.5 s · waited 400 ms · 10 + 0 tokens", "",
        ),
        (
            {"code": "upstream_error"},
            "bad", "200", "upstream error · 2.5 s · first token 500 ms · 10 + 100 tokens", "50 tokens/s",
        ),
        (
            {"code": "cancelled", "prompt_tokens": None},
            "refused", "200", "cancelled · 2.5 s · first token 500 ms · 100 tokens", "50 tokens/s",
        ),
    ],
)  # fmt: skip
def test_finished_requests(fields, tone, status, figures, speed):
    (row,) = traffic_part([], [ended(**fields)], WATCHER).recent
    assert (row.tone, row.status, row.figures, row.speed, row.at) == (tone, status, figures, speed, "08:00:05")
