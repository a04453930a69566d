"""Requests under way and finished, through the whole application: lists, filters, who may end what, sums."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.control_plane import (
    NOW,
    Browser,
    FakeTraffic,
    advert,
    key,
    launch_id,
    make,
    one_key_each,
    under_way,
    view,
)
from tests.support.traffic import REPORT, close, history, record
from vllm_bootstrap.api.services import Services


@pytest.fixture
def services() -> Services:
    made = make([*one_key_each(), key("other", "realtime"), key("both", "realtime", "monitor")])
    under_way(made, "req_1", owner="realtime")
    under_way(made, "req_2", owner="other", state="queued", launch_id=None, queue_ms=1500, tokens=0)
    under_way(made, "req_3", owner="batch", cls="batch", state="queued", launch_id=None, model="other", queue_ms=9000)
    return made


def names(browser: Browser, query: str = "") -> list[str]:
    return [row["id"] for row in browser.get(f"/requests{query}").json()["data"]]


def test_what_is_under_way_is_listed_oldest_first(services: Services) -> None:
    shown = Browser(services, "monitor").get("/requests").json()
    assert (shown["object"], shown["has_more"], shown["last_id"]) == ("list", False, "req_3")
    assert shown["data"][0] == {
        "id": "req_1", "class": "realtime", "owner": "realtime", "model": "model", "launch_id": launch_id(1),
        "state": "running", "method": "POST", "path": "/v1/chat/completions", "age_s": 2.5, "queue_ms": 7,
        "sequences": 1, "tokens": 12, "stream": True,
    }  # fmt: skip


def test_filters_and_pages(services: Services) -> None:
    browser = Browser(services, "monitor")
    assert names(browser, "?state=queued") == ["req_2", "req_3"]
    assert names(browser, "?class=batch") == ["req_3"]
    assert names(browser, "?model=model&state=running") == ["req_1"]
    assert names(browser, "?owner=other") == ["req_2"]
    first = browser.get("/requests?limit=2").json()
    assert (len(first["data"]), first["has_more"], first["last_id"]) == (2, True, "req_2")
    assert names(browser, "?limit=2&after=req_2") == ["req_3"]
    assert names(browser, "?after=req_3") == []


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [
        ("?state=done", "bad_request", "state"),
        ("?class=vip", "bad_request", "class"),
        ("?limit=0", "bad_request", "limit"),
        ("?after=gone", "bad_request", "after"),
        ("?colour=red", "unknown_field", "colour"),
    ],
)
def test_wrong_filters_are_refused_by_name(services: Services, query: str, code: str, param: str) -> None:
    answer = Browser(services, "monitor").get(f"/requests{query}")
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, code, param)


def test_one_ends_ones_own_request(services: Services) -> None:
    answer = Browser(services, "realtime").post("/requests/req_1/cancel")
    assert answer.status == 200
    assert answer.json() == {"api_version": "v1", "id": "req_1", "state": "running", "cancelled": True}
    assert services.requests.get("req_1") is None
    assert Browser(services, "realtime").post("/requests/req_1/cancel").status == 404


def test_a_foreign_request_cannot_be_told_from_none(services: Services) -> None:
    browser = Browser(services, "realtime")
    foreign, none = browser.post("/requests/req_2/cancel"), browser.post("/requests/nope/cancel")
    assert (foreign.status, foreign.body.replace(b"req_2", b"nope")) == (none.status, none.body) == (404, none.body)
    assert Browser(services, "both").post("/requests/req_2/cancel").status == 404  # watching is not ending
    assert services.requests.get("req_2") is not None


def test_admin_ends_anybodys(services: Services) -> None:
    answer = Browser(services, "admin").post("/requests/req_3/cancel")
    assert (answer.status, answer.json()["state"]) == (200, "queued")


def test_watching_is_not_enough_to_end_and_ending_takes_no_options(services: Services) -> None:
    assert Browser(services, "monitor").post("/requests/req_1/cancel").status == 403
    assert Browser(services, "realtime").post("/requests/req_1/cancel", {"force": True}).error["param"] == "body"
    assert services.requests.get("req_1") is not None


def test_queues_show_the_oldest_wait_and_the_batch_budget(services: Services) -> None:
    launch = view(capacity=32)
    services.supervisor.add(launch)  # type: ignore[attr-defined]
    assert isinstance(services.gate, FakeTraffic)
    services.gate.reports[launch.launch_id] = REPORT
    services.gate.found = [advert(launch)]
    browser = Browser(services, "monitor")
    for load in (
        browser.get(f"/status/{launch.launch_id}").json()["load"], browser.get("/launches").json()["data"][0]["load"],
    ):  # fmt: skip
        assert load["oldest_wait_s"] == 1.5
        assert load["batch"] == {
            "slots": 32, "reserve": 4, "allowance": 12, "batch_sequences": 5, "realtime_sequences": 2,
            "reason": "Realtime is active.", "ttft_baseline_s": 0.03, "ttft_recent_s": 0.04, "step_s": 0.01,
            "promotions": 1,
        }  # fmt: skip
    assert browser.get("/stats").json()["queues"]["model"]["oldest_wait_s"] == 1.5
    metrics = browser.get("/metrics").body.decode()
    for line in (
        'queue_oldest_seconds{class="realtime"} 1.5',
        'queue_oldest_seconds{class="batch"} 9.0',
        'batch_allowance_sequences{model="model"} 12.0',
        'batch_running_sequences{model="model"} 5.0',
        'realtime_reserve_sequences{model="model"} 4.0',
        "activity_dropped_total 0.0",
    ):
        assert f"vllm_bootstrap_{line}" in metrics


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Services]:
    """A daemon whose history holds five requests."""
    made = make([*one_key_each()])
    records = [
        record(n, started_at=NOW + n, owner="bob" if n > 3 else "alice", cls="batch" if n > 3 else "realtime",
               status=200 if n < 5 else 503, code=None if n < 5 else "overloaded")
        for n in range(1, 6)
    ]  # fmt: skip
    made.activity = kept = history(tmp_path, records)
    yield made
    close(kept)


def test_history_is_newest_first_with_pages_and_filters(kept: Services) -> None:
    browser = Browser(kept, "monitor")
    shown = browser.get("/activity?limit=2").json()
    assert ([row["id"] for row in shown["data"]], shown["has_more"], shown["last_id"]) == (["5", "4"], True, "4")
    assert shown["data"][0] == {
        "id": "5", "request_id": "req_5", "started_at": "2027-01-15T08:00:05Z", "class": "batch", "owner": "bob",
        "model": "model", "launch_id": "l1", "method": "POST", "path": "/v1/chat/completions", "status": 503,
        "code": "overloaded", "stream": True, "queue_ms": 20, "ttft_ms": 120.0, "duration_ms": 1250.0,
        "prompt_tokens": 7, "completion_tokens": 11, "bytes_in": 100, "bytes_out": 2000,
    }  # fmt: skip
    for query, expected in (
        ("after=4", "321"), ("owner=alice", "321"), ("class=batch", "54"), ("status=503", "5"), ("status=5xx", "5"),
        ("status=2xx", "4321"), ("model=nope", ""), ("since=2027-01-15T08:00:04Z", "54"),
        ("since=2027-01-15T08:00:04", "54"), (f"since={int(NOW) + 5}", "5"),
    ):  # fmt: skip
        assert "".join(row["id"] for row in browser.get(f"/activity?{query}").json()["data"]) == expected, query


@pytest.mark.parametrize("query", ["status=9", "status=6xx", "since=yesterday", "after=x", "after=-1", "limit=1001"])
def test_wrong_questions_to_the_history(kept: Services, query: str) -> None:
    answer = Browser(kept, "monitor").get(f"/activity?{query}")
    assert (answer.status, answer.error["param"]) == (400, query.partition("=")[0])


def test_sums(kept: Services) -> None:
    shown = Browser(kept, "monitor").get("/usage").json()
    assert shown["complete_since"] == "2027-01-15T08:00:01Z"
    assert shown["data"][1] == {
        "owner": "bob", "class": "batch", "model": "model", "requests": 2, "failed": 1, "prompt_tokens": 14,
        "completion_tokens": 22, "first_at": "2027-01-15T08:00:04Z", "last_at": "2027-01-15T08:00:05Z",
    }  # fmt: skip
    later = Browser(kept, "monitor").get(f"/usage?since={int(NOW) + 5}").json()
    assert [(row["owner"], row["requests"]) for row in later["data"]] == [("bob", 1)]


def test_without_a_history_it_says_why() -> None:
    browser = Browser(make())
    for path in ("/activity", "/usage"):
        answer = browser.get(path)
        assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert "VLLM_BOOTSTRAP_ACTIVITY_ROWS is 0" in answer.error["message"]
