"""Batches through the whole application: what is taken, what is answered, and who sees whose."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.support.batch_desks import FakeBatches, FakeShelf, batch_id
from tests.support.control_plane import NOW, Answer, Browser, key, make, one_key_each, sse_events
from vllm_bootstrap.api.services import Services
from vllm_bootstrap.batches import jobs
from vllm_bootstrap.batches.types import ENDPOINTS, BatchEvent, BatchView, Counts, Progress, Webhook

WISH = {"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"}
SECRET = "a secret of enough letters"


@pytest.fixture
def services() -> Services:
    made = make([*one_key_each(), key("other", "batch")])
    shelf(made).add("file-1", "batch")
    shelf(made).add("file-out", "batch", "batch_output")
    shelf(made).add("file-other", "other")
    return made


@pytest.fixture
def browser(services: Services) -> Browser:
    return Browser(services, "batch")


def desk(services: Services) -> FakeBatches:
    assert isinstance(services.batches, FakeBatches)
    return services.batches


def shelf(services: Services) -> FakeShelf:
    assert isinstance(services.files, FakeShelf)
    return services.files


def ids(answer: Answer) -> list[str]:
    return [row["id"] for row in answer.json()["data"]]


def refusal(answer: Answer) -> tuple[int, str, str | None]:
    return answer.status, answer.error["code"], answer.error["param"]


# -- creating -------------------------------------------------------------------------------------------------------


def test_a_batch_is_made_as_openais_client_asks_for_it(services: Services, browser: Browser) -> None:
    answer = browser.post("/v1/batches", WISH)
    assert answer.status == 200
    shown = answer.json()
    assert (shown["object"], shown["status"], shown["owner"], shown["usage"]) == ("batch", "validating", "batch", None)
    assert (shown["created_at"], shown["expires_at"]) == (int(NOW), int(NOW) + 86400)
    (new,) = desk(services).accepted.values()
    assert (new.owner, new.window_s, new.launch_id, new.webhook, new.idempotency_key) == (
        "batch", 86400, None, None, None,
    )  # fmt: skip


def test_all_that_can_be_asked_for_reaches_the_desk(services: Services, browser: Browser) -> None:
    wish = {
        **WISH, "completion_window": "90m", "metadata": {"launch_id": "l1", "night": "1"}, "priority": -5,
        "output_expires_after": {"anchor": "created_at", "seconds": 3600},
        "webhook": {"url": "https://example.com/done", "secret": SECRET},
    }  # fmt: skip
    shown = browser.post("/v1/batches", wish, idempotency_key="abc").json()
    assert (shown["priority"], shown["metadata"]) == (-5, {"launch_id": "l1", "night": "1"})
    assert SECRET not in json.dumps(shown)
    new = desk(services).accepted[shown["id"]]
    assert (new.window_s, new.launch_id, new.output_expires_after_s) == (5400, "l1", 3600)
    assert new.webhook == Webhook("https://example.com/done", SECRET)
    assert new.idempotency_key == "abc"


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_endpoint_whose_answer_comes_whole(browser: Browser, endpoint: str) -> None:
    assert browser.post("/v1/batches", {**WISH, "endpoint": endpoint}).json()["endpoint"] == endpoint


def test_the_same_key_again_gives_the_same_batch(services: Services, browser: Browser) -> None:
    first = browser.post("/v1/batches", WISH, idempotency_key="abc")
    again = browser.post("/v1/batches", WISH, idempotency_key="abc")
    assert (again.status, again.body) == (200, first.body)
    assert len(desk(services).views) == 1
    other = browser.post("/v1/batches", {**WISH, "priority": 1}, idempotency_key="abc")
    assert refusal(other) == (400, "bad_request", "idempotency-key")


WEBHOOK = {"url": "https://example.com/", "secret": SECRET}


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"input_file_id": ""}, "bad_request", "input_file_id"),
        ({"input_file_id": "file-out"}, "bad_request", "input_file_id"),
        ({"endpoint": "/v1/audio/transcriptions"}, "bad_request", "endpoint"),
        ({"endpoint": "/v1/completions/"}, "bad_request", "endpoint"),
        ({"completion_window": "soon"}, "bad_request", "completion_window"),
        ({"completion_window": "31d"}, "bad_request", "completion_window"),
        ({"completion_window": 24}, "bad_request", "completion_window"),
        ({"priority": 101}, "bad_request", "priority"),
        ({"priority": True}, "bad_request", "priority"),
        ({"priority": 1.5}, "bad_request", "priority"),
        ({"metadata": {"a": "b" * 513}}, "bad_request", "metadata.a"),
        ({"metadata": {str(n): "" for n in range(17)}}, "bad_request", "metadata"),
        ({"metadata": {"a": 1}}, "bad_request", "metadata.a"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "bad_request",
         "output_expires_after.seconds"),
        ({"webhook": {**WEBHOOK, "url": "ftp://example.com/"}}, "bad_request", "webhook.url"),
        ({"webhook": {**WEBHOOK, "url": "example.com"}}, "bad_request", "webhook.url"),
        ({"webhook": {**WEBHOOK, "url": "https://bob:pw@example.com/"}}, "bad_request", "webhook.url"),
        ({"webhook": {**WEBHOOK, "url": "https://example.com/\r\nX: y"}}, "bad_request", "webhook.url"),
        ({"webhook": {**WEBHOOK, "url": "http://127.0.0.1:9/"}}, "bad_request", "webhook.url"),
        ({"webhook": {**WEBHOOK, "secret": "short"}}, "bad_request", "webhook.secret"),
        ({"webhook": {**WEBHOOK, "secret": "whsec_no base 64 at all!"}}, "bad_request", "webhook.secret"),
        ({"webhook": {**WEBHOOK, "method": "GET"}}, "unknown_field", "webhook.method"),
        ({"model": "m"}, "unknown_field", "model"),
    ],
)  # fmt: skip
def test_a_wrong_wish_is_refused_by_field(
    services: Services, browser: Browser, change: dict[str, Any], code: str, param: str
) -> None:
    assert refusal(browser.post("/v1/batches", {**WISH, **change})) == (400, code, param)
    assert not desk(services).accepted


def test_a_webhook_is_signed_with_the_daemons_secret_where_none_is_sent() -> None:
    wish = {**WISH, "webhook": {"url": "https://example.com/"}}
    without = make([key("batch", "batch")])
    shelf(without).add("file-1", "batch")
    refused = Browser(without, "batch").post("/v1/batches", wish)
    assert refusal(refused) == (400, "bad_request", "webhook.secret")
    assert "VLLM_BOOTSTRAP_WEBHOOK_SECRET" in refused.error["message"]
    with_one = make([key("batch", "batch")], settings={"webhook_secret": SECRET})
    shelf(with_one).add("file-1", "batch")
    assert Browser(with_one, "batch").post("/v1/batches", wish).status == 200
    (new,) = desk(with_one).accepted.values()
    assert new.webhook == Webhook("https://example.com/", SECRET)


def test_private_addresses_are_called_where_the_operator_allows_it() -> None:
    services = make([key("batch", "batch")], settings={"webhook_allow_private": True})
    shelf(services).add("file-1", "batch")
    wish = {**WISH, "webhook": {"url": "http://127.0.0.1:9/", "secret": SECRET}}
    assert Browser(services, "batch").post("/v1/batches", wish).status == 200


def test_a_file_that_is_not_there_and_one_of_somebody_else_look_the_same(browser: Browser) -> None:
    none, foreign = (browser.post("/v1/batches", {**WISH, "input_file_id": f}) for f in ("file-9", "file-other"))
    assert refusal(none) == refusal(foreign) == (404, "not_found", "input_file_id")
    assert none.body.replace(b"file-9", b"file-other") == foreign.body


@pytest.mark.parametrize(
    "body",
    [b"{", b"\xff", b"[]", b'{"priority": NaN}', b'{"endpoint": "a", "endpoint": "b"}',
     b'{"metadata": {"a":"","a":""}}', b'{"metadata": {"a": "\\ud800"}}', b"[" * 50_000],
)  # fmt: skip
def test_a_body_that_is_no_json_object(services: Services, browser: Browser, body: bytes) -> None:
    answer = browser.post("/v1/batches", body)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
    assert not desk(services).accepted


def test_a_body_of_another_kind_or_beyond_a_mebibyte(browser: Browser) -> None:
    form = browser.call("POST", "/v1/batches", b"a=b", {"content-type": "application/x-www-form-urlencoded"})
    assert (form.status, form.error["code"]) == (415, "unsupported_media_type")
    long = browser.post("/v1/batches", {**WISH, "endpoint": "m" * 1_100_000})
    assert (long.status, long.error["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(("phase", "code"), [("starting", "overloaded"), ("draining", "draining")])
def test_nothing_is_taken_on_while_the_daemon_starts_or_ends(services: Services, phase: Any, code: str) -> None:
    desk(services).put(1, "batch", phase=jobs.COMPLETED, counts=Counts(3, 1, 2))
    services.phase = phase
    browser = Browser(services, "batch")
    for path, body in (("/v1/batches", WISH), (f"/v1/batches/{batch_id(1)}/retry", None)):
        answer = browser.post(path, body)
        assert (answer.status, answer.error["code"]) == (503, code)
        assert "retry-after" in answer.headers
    assert browser.get(f"/v1/batches/{batch_id(1)}").status == 200
    assert not desk(services).accepted


# -- whose ----------------------------------------------------------------------------------------------------------

ROUTES = [
    ("GET", "", None), ("POST", "/cancel", None), ("POST", "/pause", None), ("POST", "/resume", None),
    ("POST", "/retry", None), ("POST", "/priority", {"priority": 3}), ("DELETE", "", None), ("GET", "/events", None),
    ("GET", "/output", None), ("GET", "/errors", None),
]  # fmt: skip


def ask(browser: Browser, method: str, path: str, body: Any, **headers: str) -> Answer:
    data = b"" if body is None else json.dumps(body).encode()
    return browser.call(method, path, data, {"content-type": "application/json", **headers} if data else headers)


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_somebody_elses_batch_cannot_be_told_from_none(
    services: Services, browser: Browser, method: str, path: str, body: Any
) -> None:
    before = desk(services).put(1, "other", phase=jobs.COMPLETED, counts=Counts(3, 1, 2))
    for headers in ({}, {"accept": "text/event-stream"}):
        foreign = ask(browser, method, f"/v1/batches/{batch_id(1)}{path}", body, **headers)
        none = ask(browser, method, f"/v1/batches/{batch_id(2)}{path}", body, **headers)
        assert (foreign.status, foreign.error["code"]) == (404, "not_found")
        assert foreign.body.replace(batch_id(1).encode(), batch_id(2).encode()) == none.body
    assert desk(services).views == {batch_id(1): before}


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_an_administrator_has_everybodys(services: Services, method: str, path: str, body: Any) -> None:
    ended = path in {"", "/retry"}
    desk(services).put(1, "other", phase=jobs.COMPLETED if ended else jobs.IN_PROGRESS, counts=Counts(3, 1, 2))
    assert ask(Browser(services, "admin"), method, f"/v1/batches/{batch_id(1)}{path}", body).status == 200


def test_an_administrators_own_batch_carries_its_name(services: Services) -> None:
    shelf(services).add("file-admin", "admin")
    wish = {**WISH, "input_file_id": "file-admin"}
    assert Browser(services, "admin").post("/v1/batches", wish).json()["owner"] == "admin"


def test_lists_hold_ones_own_newest_first_page_by_page(services: Services, browser: Browser) -> None:
    for number in range(1, 6):
        desk(services).put(number, "other" if number == 3 else "batch")
    page = browser.get("/v1/batches?limit=2")
    assert ids(page) == [batch_id(5), batch_id(4)]
    shown = page.json()
    assert (shown["object"], shown["first_id"], shown["last_id"], shown["has_more"]) == (
        "list", batch_id(5), batch_id(4), True,
    )  # fmt: skip
    rest = browser.get(f"/v1/batches?limit=2&after={batch_id(4)}")
    assert (ids(rest), rest.json()["has_more"]) == ([batch_id(2), batch_id(1)], False)
    assert len(ids(Browser(services, "admin").get("/v1/batches"))) == 5
    assert Browser(services, "other").get(f"/v1/batches?after={batch_id(1)}").json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("query", "code", "param"),
    [("limit=0", "bad_request", "limit"), ("limit=101", "bad_request", "limit"),
     ("order=asc", "unknown_field", "order"), ("after=item_1", "bad_request", "after")],
)  # fmt: skip
def test_wrong_questions(browser: Browser, query: str, code: str, param: str) -> None:
    assert refusal(browser.get(f"/v1/batches?{query}")) == (400, code, param)


# -- one batch ------------------------------------------------------------------------------------------------------


def test_a_batch_is_paused_resumed_put_first_cancelled(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")
    one = f"/v1/batches/{batch_id(1)}"
    assert browser.post(f"{one}/pause").json()["paused"] is True
    assert browser.post(f"{one}/pause", {}).json()["paused"] is True
    assert browser.post(f"{one}/resume").json()["paused"] is False
    assert browser.post(f"{one}/priority", {"priority": 100}).json()["priority"] == 100
    assert refusal(browser.post(f"{one}/priority", {"priority": -101})) == (400, "bad_request", "priority")
    assert refusal(browser.post(f"{one}/priority")) == (400, "bad_request", None)
    assert browser.post(f"{one}/cancel").json()["status"] == "cancelling"
    assert browser.post(f"{one}/cancel").json()["status"] == "cancelling"


@pytest.mark.parametrize("action", ["cancel", "pause", "resume", "retry"])
def test_options_that_nobody_reads_are_refused(services: Services, browser: Browser, action: str) -> None:
    before = desk(services).put(1, "batch")
    assert refusal(browser.post(f"/v1/batches/{batch_id(1)}/{action}", {"force": True})) == (400, "bad_request", "body")
    assert desk(services).views[batch_id(1)] == before


def test_what_has_ended_can_be_run_again_or_forgotten_and_nothing_else(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch", phase=jobs.COMPLETED, counts=Counts(3, 1, 2))
    one = f"/v1/batches/{batch_id(1)}"
    for action in ("pause", "resume"):
        assert browser.post(f"{one}/{action}").error["code"] == "conflict"
    assert browser.post(f"{one}/retry").json()["status"] == "in_progress"
    assert browser.post(f"{one}/retry").headers["x-should-retry"] == "false"
    assert browser.call("DELETE", one).error["code"] == "conflict"
    desk(services).put(1, "batch", phase=jobs.FAILED)
    assert browser.call("DELETE", one).json() == {"id": batch_id(1), "object": "batch", "deleted": True}
    assert browser.call("DELETE", one).status == 404


def test_the_methods_of_a_path_and_head(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")
    head = browser.call("HEAD", f"/v1/batches/{batch_id(1)}")
    assert (head.status, head.body) == (200, b"")
    assert browser.call("OPTIONS", "/v1/batches").headers["allow"] == "GET, HEAD, OPTIONS, POST"
    assert browser.call("OPTIONS", f"/v1/batches/{batch_id(1)}").headers["allow"] == "DELETE, GET, HEAD, OPTIONS"
    assert browser.call("PUT", "/v1/batches").status == 405


# -- history and progress -------------------------------------------------------------------------------------------


def test_history_is_a_list_by_number(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")
    desk(services).history[batch_id(1)] = [
        BatchEvent(n, batch_id(1), NOW + n, "paused", "in_progress", "in_progress", {"by": "batch"}) for n in (1, 2, 3)
    ]
    page = browser.get(f"/v1/batches/{batch_id(1)}/events?limit=2").json()
    assert ([row["seq"] for row in page["data"]], page["has_more"], page["last_id"]) == ([1, 2], True, "2")
    assert page["data"][0] == {
        "seq": 1, "at": NOW + 1, "event": "paused", "from_status": "in_progress", "to_status": "in_progress",
        "detail": {"by": "batch"},
    }  # fmt: skip
    rest = browser.get(f"/v1/batches/{batch_id(1)}/events?after=2").json()
    assert ([row["seq"] for row in rest["data"]], rest["has_more"]) == ([3], False)


def test_progress_streams_until_the_end(services: Services, browser: Browser) -> None:
    running = desk(services).put(1, "batch", counts=Counts(4, 1, 0), progress=Progress(in_flight=2))
    ended = desk(services).put(1, "batch", phase=jobs.COMPLETED, counts=Counts(4, 4, 0))
    desk(services).views[batch_id(1)] = running

    async def scenario() -> Answer:
        desk(services).news = news = asyncio.Queue[BatchView]()
        news.put_nowait(ended)
        headers = {"accept": "text/event-stream", "last-event-id": "7"}
        return await browser.exchange("GET", f"/v1/batches/{batch_id(1)}/events", headers=headers)

    answer = asyncio.run(asyncio.wait_for(scenario(), 10))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = sse_events(answer.body)
    assert [event.get("id") for event in events] == ["8", "9", None]
    shown = [json.loads(event["data"]) for event in events[:-1]]
    assert [(one["status"], one["progress"]["percent"]) for one in shown] == [
        ("in_progress", 25.0),
        ("completed", 100.0),
    ]
    assert events[-1]["event"] == "end"


def test_a_watcher_that_leaves_closes_its_source(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")

    async def scenario() -> None:
        desk(services).news = asyncio.Queue()
        path, accept = f"/v1/batches/{batch_id(1)}/events", {"accept": "text/event-stream"}
        await browser.exchange("GET", path, headers=accept, leave_after=lambda sent: b"id: 1" in sent)

    asyncio.run(asyncio.wait_for(scenario(), 10))
    assert desk(services).closed == [batch_id(1)]


# -- partial output -------------------------------------------------------------------------------------------------


def test_answers_can_be_read_while_the_batch_runs(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")
    desk(services).pieces = {False: [b'{"a":1}\n{"a"', b":2}\n"], True: [b'{"e":1}\n']}
    answer = browser.get(f"/v1/batches/{batch_id(1)}/output")
    assert (answer.status, answer.body) == (200, b'{"a":1}\n{"a":2}\n')
    assert answer.headers["content-type"] == "application/jsonl"
    assert "content-length" not in answer.headers
    assert browser.get(f"/v1/batches/{batch_id(1)}/errors").body == b'{"e":1}\n'
    assert len(desk(services).closed) == 2


def test_no_answers_yet_are_an_empty_file_and_head_reads_nothing(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")
    empty = browser.get(f"/v1/batches/{batch_id(1)}/output")
    assert (empty.status, empty.body) == (200, b"")
    desk(services).pieces[False] = [b"{}\n"] * 3
    head = browser.call("HEAD", f"/v1/batches/{batch_id(1)}/output")
    assert (head.status, head.body, head.headers["content-type"]) == (200, b"", "application/jsonl")
    assert len(desk(services).closed) == 2


def test_a_reader_that_leaves_closes_its_source(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")
    source = endless()
    services.batches.partial = lambda *_args, **_kwargs: source  # type: ignore[method-assign]

    async def scenario() -> Answer:
        path = f"/v1/batches/{batch_id(1)}/output"
        return await browser.exchange("GET", path, leave_after=lambda sent: len(sent) > 30)

    answer = asyncio.run(asyncio.wait_for(scenario(), 10))
    assert answer.body.startswith(b"{}\n")
    with pytest.raises(StopAsyncIteration):
        asyncio.run(anext(source))


async def endless() -> Any:
    while True:
        yield b"{}\n"
        await asyncio.sleep(0)


class Sent:
    """The application asked by hand: what came out before it was over, and whether the answer came to its end."""

    def __init__(self, browser: Browser) -> None:
        self.browser, self.messages = browser, list[dict[str, Any]]()

    async def read(self, path: str, room: asyncio.Semaphore | None = None) -> None:
        scope = {
            "type": "http", "http_version": "1.1", "method": "GET", "path": path, "raw_path": path.encode(),
            "query_string": b"", "root_path": "", "scheme": "http", "state": {},
            "headers": [(b"host", b"localhost"), (b"authorization", b"Bearer batch")],
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            return {}

        async def send(message: dict[str, Any]) -> None:
            if room is not None:
                await room.acquire()
            self.messages.append(message)

        await self.browser.app(scope, receive, send)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def ended(self) -> bool:
        return self.messages[-1].get("more_body") is False


def test_a_slow_reader_holds_the_source_back(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")
    taken = []

    async def source() -> Any:
        for number in range(100):
            taken.append(number)
            yield b"{}\n"

    services.batches.partial = lambda *_args, **_kwargs: source()  # type: ignore[method-assign]

    async def scenario() -> None:
        sent, room = Sent(browser), asyncio.Semaphore(3)  # the head and two pieces
        reading = asyncio.ensure_future(sent.read(f"/v1/batches/{batch_id(1)}/output", room))
        for _ in range(50):
            await asyncio.sleep(0)
        assert (len(sent.messages), len(taken)) == (3, 3)
        for _ in range(200):
            room.release()
        await reading
        assert sent.ended
        assert sent.body == b"{}\n" * 100

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_output_that_cannot_be_read_to_its_end_is_cut_off(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")
    desk(services).pieces[False] = [b"{}\n", OSError("bad sector")]

    async def scenario() -> None:
        sent = Sent(browser)
        with pytest.raises(OSError, match="bad sector"):
            await sent.read(f"/v1/batches/{batch_id(1)}/output")
        assert (sent.body, sent.ended) == (b"{}\n", False)

    asyncio.run(asyncio.wait_for(scenario(), 10))
    desk(services).pieces[False] = [OSError("bad sector")]
    answer = browser.get(f"/v1/batches/{batch_id(1)}/output")
    assert (answer.status, answer.error["code"]) == (500, "internal_error")


def test_a_daemon_that_ends_cuts_output_off(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")
    desk(services).pieces[False] = [b"{}\n"] * 3
    services.phase = "draining"

    async def scenario() -> None:
        sent = Sent(browser)
        await sent.read(f"/v1/batches/{batch_id(1)}/output")
        assert (sent.body, sent.ended) == (b"", False)

    asyncio.run(asyncio.wait_for(scenario(), 10))
    assert desk(services).closed == [batch_id(1)]
