"""Control-plane routes through the whole application: what they take, what they answer, whom they let in."""

import asyncio

import pytest

from tests.support.control_plane import (
    NOW,
    SECRET_LINE,
    Browser,
    advert,
    failed,
    key,
    launch_id,
    loading,
    make,
    one_key_each,
    sse_events,
    view,
)
from vllm_bootstrap.api import sse
from vllm_bootstrap.launches.types import EventView


@pytest.fixture
def services():
    return make()


@pytest.fixture
def browser(services):
    return Browser(services)


def row(seq, event="became_ready"):
    return EventView(seq, launch_id(1), 1, NOW + seq, event, "bootstrapping", "ready", {"seconds": 1.5})


# -- launching ------------------------------------------------------------------------------------------------------


def test_a_launch_is_created_for_its_caller_with_its_idempotency_key():
    services = make(one_key_each())
    body = {"model": "org/model", "gpu_count": 1, "labels": {"a": "b"}}
    answer = Browser(services, "admin").post("/launch", body, idempotency_key="abc")
    assert answer.status == 201
    assert answer.json()["owner"] == "admin"
    assert answer.json()["api_version"] == "v1"
    assert answer.headers["location"] == f"/status/{answer.json()['launch_id']}"
    ((order, owner, sent_key),) = services.supervisor.calls
    assert (order.model, order.gpu_count, owner, sent_key) == ("org/model", 1, "admin", "abc")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"model": "m", "colour": 1}, "unknown_field", "colour"),
        ({"model": "m", "replicas": 0}, "bad_request", "replicas"),
        ({"model": "m", "replicas": "all"}, "bad_request", "replicas"),
        ({}, "bad_request", "model"),
        ([], "bad_request", None),
        (b"{", "invalid_json", None),
        (b'{"model": "a", "model": "b"}', "invalid_json", None),
        (b'{"model": NaN}', "invalid_json", None),
        (b"[" * 50_000, "invalid_json", None),
        (b"\xff", "invalid_json", None),
        (b'{"model": "\\ud800"}', "invalid_json", None),
        (b'{"model": "m", "labels": {"a": "\\ud800"}}', "invalid_json", None),
        (b'{"model": "m", "extra_args": {"\\ud800": 1}}', "invalid_json", None),
    ],
)
def test_a_wrong_launch_body_is_refused_by_field(browser, services, body, code, param):
    answer = browser.post("/launch", body)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, code, param)
    assert services.supervisor.calls == []


def test_a_body_is_needed_as_json_and_not_too_long(browser):
    assert browser.post("/launch").error["code"] == "bad_request"
    form = browser.call("POST", "/launch", b"model=m", {"content-type": "application/x-www-form-urlencoded"})
    assert (form.status, form.error["code"]) == (415, "unsupported_media_type")
    long = browser.post("/launch", {"model": "m" * 1_100_000})
    assert (long.status, long.error["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("sent", ["", "x" * 256, "with space"])
def test_an_idempotency_key_is_short_and_plain(browser, sent):
    answer = browser.post("/launch", {"model": "m"}, idempotency_key=sent)
    assert (answer.status, answer.error["param"]) == (400, "idempotency-key")


# -- lists and status -----------------------------------------------------------------------------------------------


def test_launches_are_listed_newest_first_page_by_page(browser, services):
    for number in range(1, 6):
        services.supervisor.add(view(number))
    services.supervisor.add(failed(6))
    page = browser.get("/launches?limit=2").json()
    assert [one["launch_id"] for one in page["data"]] == [launch_id(5), launch_id(4)]
    assert (page["has_more"], page["last_id"], page["object"], page["api_version"]) == (
        True,
        launch_id(4),
        "list",
        "v1",
    )
    rest = browser.get(f"/launches?limit=3&after={page['last_id']}").json()
    assert [one["launch_id"] for one in rest["data"]] == [launch_id(3), launch_id(2), launch_id(1)]
    assert not rest["has_more"]
    assert browser.get("/launches?all=true").json()["data"][0]["launch_id"] == launch_id(6)
    assert browser.get("/launch").json() == browser.get("/launches").json()


def test_an_empty_list_has_no_last_id(browser):
    assert browser.get("/launches").json()["last_id"] is None
    assert browser.get("/launches?limit=0").status == 400
    assert browser.get("/launches?offset=1").error["param"] == "offset"


def test_status_has_state_progress_and_load(browser, services):
    services.supervisor.add(loading(1))
    shown = browser.get(f"/status/{launch_id(1)}").json()
    assert (shown["state"], shown["progress"]["phase"], shown["load"]["queued"]) == (
        "bootstrapping",
        "load",
        {"batch": 3},
    )


@pytest.mark.parametrize("path", ["/status/{}", "/status/{}/events", "/logs/{}"])
@pytest.mark.parametrize("unknown", ["l00000000000000000009", "x", "%2e%2e", "%00", "a'--", "%F0%9F%98%80"])
def test_an_unknown_launch_is_not_found(browser, path, unknown):
    answer = browser.get(path.format(unknown))
    assert (answer.status, answer.error["code"]) == (404, "not_found")


@pytest.mark.parametrize(("token", "sees"), [("monitor", False), ("root", True), ("both", True)])
def test_log_lines_in_a_failure_need_the_scope_logs(token, sees):
    services = make([key("monitor", "monitor"), key("root", "admin"), key("both", "monitor", "logs")])
    services.supervisor.add(failed(1))
    browser = Browser(services, token)
    for path in (f"/status/{launch_id(1)}", "/launches?all=true", "/launch?all=true"):
        answer = browser.get(path)
        assert answer.status == 200
        assert (SECRET_LINE.encode() in answer.body) is sees


# -- events ---------------------------------------------------------------------------------------------------------


def test_history_is_a_list_by_number(browser, services):
    services.supervisor.add(view(1))
    services.supervisor.rows[launch_id(1)] = [row(1), row(2), row(3)]
    page = browser.get(f"/status/{launch_id(1)}/events?limit=2").json()
    assert [one["seq"] for one in page["data"]] == [1, 2]
    assert (page["has_more"], page["last_id"]) == (True, "2")
    rest = browser.get(f"/status/{launch_id(1)}/events?after=2").json()
    assert ([one["seq"] for one in rest["data"]], rest["has_more"]) == ([3], False)


def test_history_streams_and_resumes_after_the_last_event_seen(browser, services):
    services.supervisor.add(view(1))
    services.supervisor.rows[launch_id(1)] = [row(1), row(2), row(3)]
    answer = browser.get(f"/status/{launch_id(1)}/events", accept="text/event-stream", last_event_id="1")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["x-accel-buffering"], answer.headers["cache-control"]) == ("no", "no-store")
    events = sse_events(answer.body)
    assert [event.get("id") for event in events] == ["2", "3", None]
    assert events[-1]["event"] == "end"


def test_news_arrive_and_a_client_that_leaves_closes_its_source(browser, services):
    services.supervisor.add(view(1))

    async def scenario():
        services.supervisor.news = asyncio.Queue()
        services.supervisor.news.put_nowait(row(8))
        path, accept = f"/status/{launch_id(1)}/events", {"accept": "text/event-stream"}
        return await browser.exchange("GET", path, headers=accept, leave_after=lambda sent: b"id: 8" in sent)

    answer = asyncio.run(asyncio.wait_for(scenario(), 10))
    assert sse_events(answer.body)[0]["id"] == "8"
    assert services.supervisor.closed == [launch_id(1)]


def test_head_never_streams(browser, services):
    services.supervisor.add(view(1))
    answer = browser.call("HEAD", f"/status/{launch_id(1)}/events", headers={"accept": "text/event-stream"})
    assert (answer.status, answer.body, answer.headers["content-type"]) == (200, b"", "application/json")


def stream(source, may_go_on, leave=None, **options):
    """Run a stream on its own; what it sent."""

    async def scenario():
        sent = []
        left = asyncio.Event()

        async def receive():
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message.get("body", b""))
            if leave is not None and leave(b"".join(sent)):
                left.set()

        await sse.EventStream(source(), may_go_on, **options)({}, receive, send)
        return b"".join(sent)

    return asyncio.run(asyncio.wait_for(scenario(), 10))


async def silence():
    await asyncio.Event().wait()
    yield b"never"


async def chatter():
    while True:
        yield sse.event("{}")
        await asyncio.sleep(0)


def test_a_stream_ends_when_its_caller_may_no_longer_listen():
    answers = iter([True, True, False])
    assert stream(silence, lambda: next(answers), tick_s=0.001) == b""
    more = iter([True] * 6)
    assert stream(chatter, lambda: next(more, False)).count(b"data") == 3


def test_a_silent_stream_says_that_it_is_still_there():
    sent = stream(
        silence, lambda: True, leave=lambda sent: sent.count(b": still here") == 3, tick_s=0.001, heartbeat_s=0
    )
    assert sent == b": still here\n\n" * 3


def test_a_failing_source_fails_the_stream():
    async def broken():
        yield b"data: 1\n\n"
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        stream(broken, lambda: True)


def test_a_draining_daemon_and_a_revoked_key_end_streams():
    services = make(one_key_each())
    monitor = services.keys.lookup(b"monitor")
    assert monitor is not None
    go_on = services.listener(monitor)
    assert go_on()
    services.phase = "draining"
    assert not go_on()


# -- ending ---------------------------------------------------------------------------------------------------------


def test_stop_waits_by_default_and_tells_what_it_took(browser, services):
    services.supervisor.add(view(1))
    answer = browser.post(f"/stop/{launch_id(1)}?force=true")
    assert answer.status == 200
    assert answer.json() == {
        "api_version": "v1",
        "launch_id": launch_id(1),
        "state": "stopped",
        "forced": True,
        "unsettled_gpus": ["GPU-0"],
        "replicas": [],
    }
    assert services.supervisor.calls == [(launch_id(1), True, True)]


@pytest.mark.parametrize(("method", "path"), [("POST", "/stop/"), ("DELETE", "/launches/")])
def test_options_in_a_body_that_nobody_reads_are_refused(browser, services, method, path):
    services.supervisor.add(view(1))
    headers = {"content-type": "application/json", "content-length": "15"}
    answer = browser.call(method, f"{path}{launch_id(1)}", b'{"force": true}', headers)
    assert (answer.status, answer.error["param"]) == (400, "body")
    assert services.supervisor.calls == []


def test_stop_without_waiting_is_accepted(browser, services):
    services.supervisor.add(view(1))
    answer = browser.post(f"/stop/{launch_id(1)}?wait=false", {})
    assert (answer.status, answer.json()["state"]) == (202, "ready")
    assert services.supervisor.calls == [(launch_id(1), False, False)]


def test_only_ended_launches_can_be_forgotten(browser, services):
    services.supervisor.add(view(1))
    services.supervisor.add(failed(2))
    refused = browser.call("DELETE", f"/launches/{launch_id(1)}")
    assert (refused.status, refused.headers["x-should-retry"]) == (409, "false")
    assert browser.call("DELETE", f"/launches/{launch_id(2)}").json()["deleted"] is True
    assert browser.call("DELETE", f"/launches/{launch_id(2)}").status == 404


# -- models ---------------------------------------------------------------------------------------------------------


def test_models_are_listed_in_openais_form_and_filtered_by_key():
    services = make([key("some", "realtime", models=("org/*", "model")), key("none", "batch", models=("other",))])
    services.supervisor.add(view(1))
    services.gate.found.append(advert(view(1)))
    browser = Browser(services, "some")
    assert [one["id"] for one in browser.get("/v1/models").json()["data"]] == ["model"]
    assert browser.get("/v1/models/model").json()["status"] == "loaded"
    other = Browser(services, "none")
    assert other.get("/v1/models").json() == {"object": "list", "data": []}
    refused = other.get("/v1/models/model")
    assert (refused.status, refused.error["code"], refused.error["param"]) == (404, "model_not_found", "model")
    assert browser.get("/v1/models/org/unknown").error["code"] == "model_not_found"
