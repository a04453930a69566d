"""Single items through the whole application: what an engine will get of them, who waits for whom, who sees whose."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.support.aio import eventually
from tests.support.batch_desks import FakeItems, item_id
from tests.support.control_plane import NOW, Answer, Browser, key, make, one_key_each
from vllm_bootstrap.api.services import Services
from vllm_bootstrap.batches.types import NewItem

ITEMS = "/v1/batch/completions"
PROMPT = {"model": "m", "prompt": "once"}
CHAT = {"launch_id": "l1", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def services() -> Services:
    return make([*one_key_each(), key("other", "batch"), key("some", "batch", models=("org/*",), max_sequences=2)])


@pytest.fixture
def browser(services: Services) -> Browser:
    return Browser(services, "batch")


def desk(services: Services) -> FakeItems:
    assert isinstance(services.items, FakeItems)
    return services.items


def accepted(services: Services) -> NewItem:
    (new,) = desk(services).accepted.values()
    return new


def refusal(answer: Answer) -> tuple[int, str, str | None]:
    return answer.status, answer.error["code"], answer.error["param"]


# -- submitting -----------------------------------------------------------------------------------------------------


def test_a_prompt_is_accepted_and_says_where_it_is(services: Services, browser: Browser) -> None:
    wish = {**PROMPT, "max_tokens": 7, "priority": 5, "expires_after_s": 60, "temperature": 1.0, "stop": ["\n"]}
    answer = browser.post(ITEMS, wish, idempotency_key="abc")
    assert answer.status == 202
    shown = answer.json()
    assert answer.headers["location"] == f"{ITEMS}/{shown['id']}"
    assert (shown["object"], shown["status"], shown["endpoint"]) == ("batch.item", "queued", "/v1/completions")
    assert (shown["priority"], shown["expires_at"]) == (5, int(NOW) + 60)
    assert accepted(services) == NewItem(
        "batch", "/v1/completions", {**PROMPT, "max_tokens": 7, "temperature": 1.0, "stop": ["\n"]}, "m", None, 5, 60,
        "abc",
    )  # fmt: skip


def test_messages_for_a_launch_go_as_chat_without_a_model(services: Services, browser: Browser) -> None:
    answer = browser.post(ITEMS, {**CHAT, "stream": False, "prompt": None})
    assert (answer.status, answer.json()["endpoint"], answer.json()["model"]) == (202, "/v1/chat/completions", None)
    assert accepted(services) == NewItem(
        "batch", "/v1/chat/completions", {"messages": CHAT["messages"]}, None, "l1", 0, None, None
    )


@pytest.mark.parametrize("prompt", ["once", ["a", "b"], [1, 2, 3], [[1, 2], [3]], [1, 2.5, None, {"a": True}]])
def test_a_prompt_goes_on_as_it_came(services: Services, browser: Browser, prompt: Any) -> None:
    assert browser.post(ITEMS, {"model": "m", "prompt": prompt}).status == 202
    found = accepted(services).body["prompt"]
    assert json.dumps(found) == json.dumps(prompt)


def test_the_same_key_again_gives_the_same_item(services: Services, browser: Browser) -> None:
    first, again = (browser.post(ITEMS, PROMPT, idempotency_key="abc") for _ in range(2))
    assert (again.status, again.body) == (202, first.body)
    assert len(desk(services).views) == 1


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "bad_request", "model"),
        ({**PROMPT, "launch_id": "l1"}, "bad_request", "model"),
        ({"prompt": "x"}, "bad_request", "model"),
        ({"model": "m"}, "bad_request", "prompt"),
        ({**PROMPT, "messages": CHAT["messages"]}, "bad_request", "prompt"),
        ({"model": "m", "prompt": 7}, "bad_request", "prompt"),
        ({"model": "m", "messages": []}, "bad_request", "messages"),
        ({"model": "m", "messages": "hi"}, "bad_request", "messages"),
        ({"model": 7, "prompt": "x"}, "bad_request", "model"),
        ({"model": "a\nb", "prompt": "x"}, "bad_request", "model"),
        ({**PROMPT, "stream": True}, "bad_request", "stream"),
        ({**PROMPT, "stream": 1}, "bad_request", "stream"),
        ({**PROMPT, "priority": 101}, "bad_request", "priority"),
        ({**PROMPT, "priority": True}, "bad_request", "priority"),
        ({**PROMPT, "priority": "high"}, "bad_request", "priority"),
        ({**PROMPT, "expires_after_s": 0}, "bad_request", "expires_after_s"),
        ({**PROMPT, "expires_after_s": 1e9}, "bad_request", "expires_after_s"),
        ({**PROMPT, "kv_transfer_params": {}}, "bad_request", "kv_transfer_params"),
        ({**PROMPT, "logits_processors": ["os.system"]}, "bad_request", "logits_processors"),
        ({**CHAT, "chat_template": "{{ 1 }}"}, "bad_request", "chat_template"),
        ({**CHAT, "chat_template_kwargs": {"chat_template": "x"}}, "bad_request", "chat_template_kwargs.chat_template"),
        (b'{"model": "a", "model": "b", "prompt": "x"}', "invalid_json", None),
        (b'{"model": "m", "prompt": "\\ud800"}', "invalid_json", None),
        (b'{"model": "m", "prompt": "x", "temperature": NaN}', "invalid_json", None),
        (b"\xff", "invalid_json", None),
        ([PROMPT], "bad_request", None),
    ],
)
def test_a_wrong_item_is_refused_by_field(
    services: Services, browser: Browser, body: Any, code: str, param: str | None
) -> None:
    assert refusal(browser.post(ITEMS, body)) == (400, code, param)
    assert not desk(services).accepted


def test_an_item_of_another_kind_or_beyond_a_mebibyte(browser: Browser) -> None:
    text = browser.call("POST", ITEMS, b"hello", {"content-type": "text/plain"})
    assert (text.status, text.error["code"]) == (415, "unsupported_media_type")
    long = browser.post(ITEMS, {"model": "m", "prompt": "x" * 1_100_000})
    assert (long.status, long.error["code"]) == (413, "request_too_large")


def test_a_key_is_held_to_its_models_and_its_sequences(services: Services) -> None:
    browser = Browser(services, "some")
    assert refusal(browser.post(ITEMS, PROMPT)) == (404, "model_not_found", "model")
    fits = {"model": "org/m", "prompt": ["a", "b"]}
    assert browser.post(ITEMS, fits).status == 202
    assert refusal(browser.post(ITEMS, {**fits, "n": 2})) == (400, "bad_request", "n")
    assert len(desk(services).accepted) == 1


@pytest.mark.parametrize(("phase", "code"), [("starting", "overloaded"), ("draining", "draining")])
def test_nothing_is_taken_on_while_the_daemon_starts_or_ends(services: Services, phase: Any, code: str) -> None:
    desk(services).put(1, "batch")
    services.phase = phase
    browser = Browser(services, "batch")
    assert (browser.post(ITEMS, PROMPT).status, browser.post(ITEMS, PROMPT).error["code"]) == (503, code)
    assert browser.get(f"{ITEMS}/{item_id(1)}").status == 200
    assert not desk(services).accepted


# -- whose ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "query"), [("GET", ""), ("GET", "?wait=5"), ("DELETE", "")])
def test_somebody_elses_item_cannot_be_told_from_none(
    services: Services, browser: Browser, method: str, query: str
) -> None:
    before = desk(services).put(1, "other")
    foreign = browser.call(method, f"{ITEMS}/{item_id(1)}{query}")
    none = browser.call(method, f"{ITEMS}/{item_id(2)}{query}")
    assert (foreign.status, foreign.error["code"]) == (404, "not_found")
    assert foreign.body.replace(item_id(1).encode(), item_id(2).encode()) == none.body
    assert desk(services).views == {item_id(1): before}
    assert Browser(services, "admin").call(method, f"{ITEMS}/{item_id(1)}{query.replace('5', '0.01')}").status == 200


def test_lists_hold_ones_own_newest_first_by_state(services: Services, browser: Browser) -> None:
    for number in range(1, 6):
        desk(services).put(number, "other" if number == 3 else "batch")
    desk(services).finish(4)

    def ids(query: str, who: Browser = browser) -> list[str]:
        return [row["id"] for row in who.get(ITEMS + query).json()["data"]]

    assert ids("") == [item_id(number) for number in (5, 4, 2, 1)]
    assert ids("?state=queued&limit=2") == [item_id(5), item_id(2)]
    assert ids(f"?after={item_id(4)}") == [item_id(2), item_id(1)]
    assert len(ids("", Browser(services, "admin"))) == 5
    page = browser.get(f"{ITEMS}?limit=1").json()
    assert (page["has_more"], page["first_id"], page["last_id"]) == (True, item_id(5), item_id(5))
    assert refusal(browser.get(f"{ITEMS}?state=done")) == (400, "bad_request", "state")
    assert refusal(browser.get(f"{ITEMS}?limit=101")) == (400, "bad_request", "limit")
    assert refusal(browser.get(f"{ITEMS}?owner=other")) == (400, "unknown_field", "owner")


def test_cancelling_says_what_became_of_it_as_often_as_one_asks(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")
    desk(services).put(2, "batch")
    desk(services).finish(2)
    first, again = (browser.call("DELETE", f"{ITEMS}/{item_id(1)}") for _ in range(2))
    assert (first.status, first.json()["status"], again.body) == (200, "cancelled", first.body)
    assert browser.call("DELETE", f"{ITEMS}/{item_id(2)}").json()["status"] == "completed"
    refused = browser.call("DELETE", f"{ITEMS}/{item_id(1)}", b'{"a": 1}', {"content-type": "application/json"})
    assert refusal(refused) == (400, "bad_request", "body")


def test_methods_and_head(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")
    head = browser.call("HEAD", f"{ITEMS}/{item_id(1)}")
    assert (head.status, head.body) == (200, b"")
    assert browser.call("OPTIONS", ITEMS).headers["allow"] == "GET, HEAD, OPTIONS, POST"
    assert browser.call("PUT", f"{ITEMS}/{item_id(1)}").headers["allow"] == "DELETE, GET, HEAD, OPTIONS"


# -- waiting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "inf", "soon"])
def test_one_waits_for_a_minute_at_most(services: Services, browser: Browser, wait: str) -> None:
    desk(services).put(1, "batch")
    assert refusal(browser.get(f"{ITEMS}/{item_id(1)}?wait={wait}")) == (400, "bad_request", "wait")


def test_without_patience_the_answer_comes_at_once(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")
    for query in ("", "?wait=0"):
        assert browser.get(f"{ITEMS}/{item_id(1)}{query}").json()["status"] == "queued"
    assert desk(services).patience == []


def test_who_waits_gets_the_answer_when_it_is_there(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")

    async def scenario() -> Answer:
        asked = asyncio.ensure_future(browser.exchange("GET", f"{ITEMS}/{item_id(1)}?wait=60"))
        await eventually(lambda: desk(services).waiting)
        desk(services).finish(1)
        return await asked

    answer = asyncio.run(asyncio.wait_for(scenario(), 20))
    assert (answer.status, answer.json()["status"], answer.json()["attempts"]) == (200, "completed", 1)
    assert answer.json()["response"]["status_code"] == 200
    assert desk(services).patience == [60]
    assert browser.get(f"{ITEMS}/{item_id(1)}?wait=60").body == answer.body  # ended already: nothing to wait for


def test_patience_ends(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")
    assert browser.get(f"{ITEMS}/{item_id(1)}?wait=0.02").json()["status"] == "queued"
    assert desk(services).patience == [0.02]


def test_nobody_is_waited_for_who_has_gone(services: Services, browser: Browser) -> None:
    desk(services).put(1, "batch")

    async def scenario() -> None:
        async def receive() -> dict[str, Any]:
            await eventually(lambda: desk(services).waiting)
            return {"type": "http.disconnect"}

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        path = f"{ITEMS}/{item_id(1)}"
        scope = {
            "type": "http", "http_version": "1.1", "method": "GET", "path": path, "raw_path": path.encode(),
            "query_string": b"wait=60", "root_path": "", "scheme": "http", "state": {},
            "headers": [(b"host", b"localhost"), (b"authorization", b"Bearer batch")],
        }  # fmt: skip
        await browser.app(scope, receive, send)
        assert sent == []

    asyncio.run(asyncio.wait_for(scenario(), 20))
    assert desk(services).waiting == 0


def test_a_daemon_that_ends_answers_those_who_wait(
    services: Services, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_bootstrap.api.items.TICK_S", 0.01)
    desk(services).put(1, "batch")

    async def scenario() -> Answer:
        asked = asyncio.ensure_future(browser.exchange("GET", f"{ITEMS}/{item_id(1)}?wait=60"))
        await eventually(lambda: desk(services).waiting)
        services.phase = "draining"
        return await asked

    answer = asyncio.run(asyncio.wait_for(scenario(), 20))
    assert (answer.status, answer.json()["status"]) == (200, "queued")
    assert desk(services).waiting == 0


@pytest.mark.interpreted
def test_a_key_that_is_revoked_meanwhile_gets_no_answer(
    services: Services, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_bootstrap.api.items.TICK_S", 0.01)
    desk(services).put(1, "batch")

    async def scenario() -> Answer:
        asked = asyncio.ensure_future(browser.exchange("GET", f"{ITEMS}/{item_id(1)}?wait=60"))
        await eventually(lambda: desk(services).waiting)
        monkeypatch.setattr(services.guard, "is_current", lambda _principal: False)
        return await asked

    assert asyncio.run(asyncio.wait_for(scenario(), 20)).status == 401
