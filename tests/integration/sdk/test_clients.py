"""Both clients against the real control plane over made-up launches."""

import asyncio
import contextlib
import dataclasses
import threading
from datetime import UTC, datetime

import pytest

from tests.support.control_plane import NOW, SECRET_LINE, failed, key, launch_id, loading, make, under_way, view
from tests.support.listening import Listening, StubDaemon
from tests.support.traffic import close, history, record
from tests.support.waiting import wait_for
from vllm_bootstrap import errors
from vllm_bootstrap.client import AsyncClient, Client, DaemonUnreachable, LaunchFailed, UnexpectedAnswer, WaitTimeout
from vllm_bootstrap.launches.types import EventView

ONE = launch_id(1)


@pytest.fixture
def daemon(tmp_path):
    with StubDaemon(tmp_path) as made:
        yield made


def row(seq, to="ready"):
    return EventView(seq, ONE, 1, NOW + seq, "became_ready", "bootstrapping", to, {})


class Sync:
    """Calls the sync client."""

    def __init__(self, url, key=None):
        self.url, self.key = url, key

    def __call__(self, method, *args, **kwargs):
        with Client(self.url, self.key) as client:
            return getattr(client, method)(*args, **kwargs)

    def all(self, method, *args, **kwargs):
        with Client(self.url, self.key) as client:
            return list(getattr(client, method)(*args, **kwargs))


class Async(Sync):
    """Calls the async client in a loop of its own."""

    def __call__(self, method, *args, **kwargs):
        async def main():
            async with AsyncClient(self.url, self.key) as client:
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(main())

    def all(self, method, *args, **kwargs):
        async def main():
            async with AsyncClient(self.url, self.key) as client:
                return [item async for item in getattr(client, method)(*args, **kwargs)]

        return asyncio.run(main())


@pytest.fixture(params=[Sync, Async])
def call(request, daemon):
    return request.param(daemon.url)


# -- calls ----------------------------------------------------------------------------------------------------------


def test_launching_and_looking(daemon, call):
    made = call("launch", "org/model", gpu_count=1, labels={"a": "b"}, engine=None)
    ((order, owner, idempotency),) = daemon.launches.calls
    assert (made.state, order.gpu_count, dict(order.labels), owner) == ("bootstrapping", 1, {"a": "b"}, "local")
    assert idempotency is not None
    assert call("status", made.launch_id).launch_id == made.launch_id
    assert [found.launch_id for found in call("launches").data] == [made.launch_id]


def test_pages_of_launches(daemon, call):
    for number in range(1, 4):
        daemon.launches.add(view(number, state="failed" if number == 2 else "ready"))
    assert [found.launch_id for found in call("launches").data] == [launch_id(3), ONE]
    page = call("launches", include_ended=True, limit=2)
    assert (len(page.data), page.has_more) == (2, True)
    assert [found.launch_id for found in call("launches", include_ended=True, after=page.last_id).data] == [ONE]


def test_stopping_and_forgetting(daemon, call):
    daemon.launches.add(view(1))
    with pytest.raises(errors.Conflict):
        call("delete", ONE)
    stopped = call("stop", ONE, force=True)
    assert (stopped.state, stopped.forced, stopped.unsettled_gpus) == ("stopped", True, ["GPU-0"])
    assert call("delete", ONE).deleted
    with pytest.raises(errors.NotFound):
        call("status", ONE)


def test_the_box(daemon, call):
    assert [gpu.state for gpu in call("gpus").data] == ["free", "busy", "unknown"]
    assert call("stats").uptime_s == 5
    assert call("version").version == "9.9"
    assert call("healthz").status == "ok"
    assert call("models").data == []
    assert call("request", "GET", "/version")["api_version"] == "v1"
    daemon.services.phase = "draining"
    with pytest.raises(errors.Draining) as caught:
        call("healthz")
    assert caught.value.retry_after == 10


def test_keys_are_sent_and_refusals_come_back_as_classes(tmp_path):
    with StubDaemon(tmp_path, make([key("watcher-key", "monitor")])) as daemon:
        daemon.launches.add(failed(1))
        assert Sync(daemon.url, "watcher-key")("status", ONE).failure.lines is None
        with pytest.raises(errors.Forbidden) as caught:
            Sync(daemon.url, "watcher-key")("stop", ONE)
        assert caught.value.details["needed_scopes"] == ["admin"]
        with pytest.raises(errors.Unauthorized):
            Sync(daemon.url, "wrong")("status", ONE)


def test_an_admin_sees_the_telling_lines(daemon, call):
    daemon.launches.add(failed(1))
    assert call("status", ONE).failure.lines == [SECRET_LINE]


# -- waiting --------------------------------------------------------------------------------------------------------


def test_waiting_for_ready(daemon, call):
    daemon.launches.add(loading(1))
    seen = []

    def on_progress(status):
        seen.append(status.state)
        if len(seen) == 2:
            daemon.launches.add(view(1))

    assert call("wait_ready", ONE, on_progress=on_progress).state == "ready"
    assert seen == ["bootstrapping", "bootstrapping", "ready"]


def test_waiting_ends_with_a_failure_or_with_the_time(daemon, call):
    daemon.launches.add(failed(1))
    with pytest.raises(LaunchFailed, match="bad_flag"):
        call("wait_ready", ONE)
    daemon.launches.add(loading(1))
    with pytest.raises(WaitTimeout):
        call("wait_ready", ONE, timeout_s=0.05)


def test_waiting_survives_a_restart_of_the_daemon(daemon, call):
    daemon.launches.add(loading(1))
    polls = []

    def on_progress(status):
        polls.append(status.state)
        if len(polls) == 1:
            daemon.launches.add(view(1))
            daemon.stop()
            threading.Thread(target=daemon.start).start()

    assert call("wait_ready", ONE, on_progress=on_progress).state == "ready"


def ready_at_once(daemon):
    launch = daemon.launches.launch

    async def launch_ready(order, owner, idempotency_key=None):
        made = await launch(order, owner, idempotency_key)
        return daemon.launches.add(dataclasses.replace(made, state="ready"))

    daemon.launches.launch = launch_ready


def test_launched_stops_whatever_happens(daemon):
    ready_at_once(daemon)
    with Client(daemon.url) as client:
        with client.launched("org/model", gpu_count=1) as launch:
            assert launch.base_url == f"{daemon.url}/proxy/{launch.id}/v1"
        assert client.status(launch.id).state == "stopped"
        with pytest.raises(ZeroDivisionError), client.launched("org/other") as launch:
            raise ZeroDivisionError
        assert client.status(launch.id).state == "stopped"


def test_launched_for_async_code(daemon):
    ready_at_once(daemon)

    async def main():
        async with AsyncClient(daemon.url) as client:
            async with client.launched("org/model") as launch:
                assert launch.served_model_name == "model"
            return (await client.status(launch.id)).state

    assert asyncio.run(main()) == "stopped"


def test_a_launch_that_never_gets_ready_is_stopped_too(daemon):
    with Client(daemon.url) as client:
        with pytest.raises(WaitTimeout), client.launched("org/model", ready_timeout_s=0.05):
            pytest.fail("it is not ready")
        assert client.status(ONE).state == "stopped"


# -- streams --------------------------------------------------------------------------------------------------------


def test_history_as_it_is_and_as_it_grows(daemon, call):
    daemon.launches.add(view(1))
    daemon.launches.rows[ONE] = [row(seq) for seq in range(1, 4)]
    assert [event.seq for event in call.all("events", ONE)] == [1, 2, 3]
    assert [event.seq for event in call.all("events", ONE, after=1)] == [2, 3]
    assert [event.seq for event in call.all("events", ONE, after=1, follow=True)] == [2, 3]


def test_logs_in_pieces(daemon, call):
    daemon.launches.add(view(1))
    daemon.write_log("one\ntwo\nthree\n")
    assert call("logs", ONE).content == "one\ntwo\nthree\n"
    assert call("logs", ONE, tail=1).content == "three\n"
    assert call("logs", ONE, offset=4, limit=16).offset == 4
    with pytest.raises(errors.OffsetOutOfRange):
        call("logs", ONE, offset=999)


def test_following_a_log_to_its_end(daemon, call):
    daemon.launches.add(view(1))
    daemon.write_log("one\n")

    def go_on():
        daemon.write_log("two\n")
        daemon.launches.add(view(1, state="stopped"))

    timer = threading.Timer(0.3, go_on)
    timer.start()
    assert "".join(page.content for page in call.all("follow_logs", ONE)) == "one\ntwo\n"
    timer.join()


def test_a_followed_log_goes_on_without_a_gap_after_a_restart(daemon, call):
    daemon.launches.add(view(1, attempt=2))
    daemon.write_log("one\n", attempt=2)
    asked = []
    daemon.on_request = lambda scope: asked.append(
        (scope["query_string"], dict(scope["headers"]).get(b"last-event-id"))
    )

    def restart():
        wait_for(lambda: asked)
        daemon.stop()
        daemon.write_log("two\n", attempt=2)
        daemon.launches.add(view(1, attempt=2, state="stopped"))
        daemon.start()

    thread = threading.Thread(target=restart)
    thread.start()
    found = "".join(page.content for page in call.all("follow_logs", ONE, tail=10))
    thread.join()
    assert found == "one\ntwo\n"
    assert asked[0] == (b"tail=10", None)
    assert asked[-1] == (b"attempt=2", b"4")


def test_leaving_a_stream_early_leaves_no_connection_behind(daemon):
    daemon.launches.add(view(1))
    daemon.launches.rows[ONE] = [row(1)]
    daemon.launches.news = asyncio.Queue()

    async def main():
        async with AsyncClient(daemon.url) as client, contextlib.aclosing(client.events(ONE, follow=True)) as stream:
            return (await anext(stream)).seq

    assert asyncio.run(main()) == 1
    wait_for(lambda: daemon.launches.closed)
    with Client(daemon.url) as client:
        stream = client.events(ONE, follow=True)
        assert next(stream).seq == 1
        stream.close()
    wait_for(lambda: len(daemon.launches.closed) == 2)


def test_streams_raise_what_the_daemon_answers(daemon, call):
    with pytest.raises(errors.NotFound):
        call.all("follow_logs", ONE)


# -- the wire -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Sync, Async])
def test_nobody_there_is_told_at_once(kind):
    with pytest.raises(DaemonUnreachable, match="connection refused") as caught:
        kind("http://127.0.0.1:1")("version")
    assert caught.value.never_met
    with pytest.raises(DaemonUnreachable):
        kind("http://127.0.0.1:1").all("follow_logs", ONE)


class Rude:
    """A server that does what it is told with the next connections."""

    def __init__(self):
        self.seen = []
        self.breaks = 1
        self.location = None

    async def __call__(self, scope, receive, send):
        self.seen.append((scope["method"], scope["path"], dict(scope["headers"])))
        if self.location:
            headers = [(b"location", self.location.encode())]
            await send({"type": "http.response.start", "status": 307, "headers": headers})
            await send({"type": "http.response.body"})
        elif len(self.seen) <= self.breaks:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
            await send({"type": "http.response.body", "body": b"{", "more_body": False})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b'{"status": "ok", "launch_id": "l", "deleted": true}'})


@pytest.mark.parametrize("kind", [Sync, Async])
def test_broken_connections_are_tried_once_more_where_that_is_harmless(kind):
    rude = Rude()
    with Listening(rude) as server:
        assert kind(server.url)("healthz").status == "ok"
        assert len(rude.seen) == 2
        rude.breaks = 3
        with pytest.raises(DaemonUnreachable, match="the connection broke"):
            kind(server.url)("delete", "l")
        assert len(rude.seen) == 3


@pytest.mark.parametrize("kind", [Sync, Async])
def test_redirects_never_take_the_key_along(kind):
    rude, stranger = Rude(), Rude()
    with Listening(rude) as server, Listening(stranger) as elsewhere:
        rude.location = f"{elsewhere.url}/healthz"
        with pytest.raises(UnexpectedAnswer, match="redirects to"):
            kind(server.url, "secret")("healthz")
        with pytest.raises(UnexpectedAnswer):
            kind(server.url, "secret").all("stream", "GET", "/x")
    assert stranger.seen == []


def test_proxies_of_the_environment_are_not_asked_about_this_machine(daemon, monkeypatch):
    proxy = Rude()
    with Listening(proxy) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, server.url)
        assert Sync(daemon.url, "secret")("version").version == "9.9"
        assert Async(daemon.url, "secret")("version").version == "9.9"
        # What is elsewhere may need the proxy.
        with pytest.raises((UnexpectedAnswer, DaemonUnreachable)):
            Sync("http://box.invalid")("version")
    assert {headers[b"host"] for _, _, headers in proxy.seen} == {b"box.invalid"}


# -- requests -------------------------------------------------------------------------------------------------------


def test_requests_under_way(daemon, call):
    under_way(daemon.services, "req_1")
    under_way(daemon.services, "req_2", cls="batch", state="queued", launch_id=None)
    assert [found.id for found in call("requests").data] == ["req_1", "req_2"]
    assert [found.id for found in call("requests", request_class="batch", state="queued", model=None).data] == ["req_2"]
    page = call("requests", limit=1)
    assert [found.id for found in call("requests", after=page.last_id).data] == ["req_2"]
    cancelled = call("cancel_request", "req_2")
    assert (cancelled.id, cancelled.state, cancelled.cancelled) == ("req_2", "queued", True)
    with pytest.raises(errors.NotFound):
        call("cancel_request", "req_2")


def test_finished_requests(daemon, call, tmp_path):
    with pytest.raises(errors.NotFound, match="ACTIVITY_ROWS is 0"):
        call("activity")
    records = [record(1, started_at=NOW), record(2, started_at=NOW + 60, owner="bob", status=502)]
    daemon.services.activity = kept = history(tmp_path, records)
    try:
        assert [found.request_id for found in call("activity").data] == ["req_2", "req_1"]
        since = datetime.fromtimestamp(NOW + 30, UTC)
        assert [found.request_id for found in call("activity", since=since, status="5xx").data] == ["req_2"]
        assert [found.request_id for found in call("activity", status=200, owner="alice").data] == ["req_1"]
        assert [(row.owner, row.requests, row.failed) for row in call("usage").data] == [("alice", 1, 0), ("bob", 1, 1)]
        assert [row.owner for row in call("usage", since).data] == ["bob"]
    finally:
        close(kept)
