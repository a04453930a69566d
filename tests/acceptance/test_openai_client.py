"""The stock ``openai`` client against a whole daemon: every way to ask, to leave, to wait and to be refused."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from tests.support.stock_client import CHAT, LONG, MODEL, Box, boxed
from tests.support.waiting import wait_for

WAYS = ["/v1", "/proxy/{id}/v1"]


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with boxed() as made:
        yield made


# -- asking ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_whole_answers(box: Box, way: str) -> None:
    with box.client(way) as client:
        chat = client.chat.completions.create(model=MODEL, messages=CHAT, n=2)
        assert [sorted((choice.message.content or "").split()) for choice in chat.choices] == [
            ["one", "three", "two"]
        ] * 2
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 6
        several = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=2)
        assert [choice.index for choice in several.choices] == [0, 1]
        told = client.responses.create(model=MODEL, input="one two")
        assert told.output_text == "one two"
        numbers = client.embeddings.create(model=MODEL, input=["one", "two"])
        plain = client.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="float")
        for found, wanted in zip(numbers.data, plain.data, strict=True):
            assert found.embedding == pytest.approx(wanted.embedding, abs=1e-6)
        if way == "/v1":
            assert [model.id for model in client.models.list()] == [MODEL]
            assert client.models.retrieve(MODEL).id == MODEL


@pytest.mark.parametrize("way", WAYS)
def test_streams(box: Box, way: str) -> None:
    with box.client(way) as client:
        for options, asked in (({}, False), ({"stream_options": {"include_usage": True}}, True)):
            chat = list(client.chat.completions.create(model=MODEL, messages=CHAT, stream=True, **options))
            assert "".join(e.choices[0].delta.content or "" for e in chat if e.choices) == "one two three"
            assert [event.usage is not None for event in chat] == [False] * (len(chat) - 1) + [asked]
            assert all(event.choices for event in chat[:-1])
            assert bool(chat[-1].choices) is not asked
            plain = list(client.completions.create(model=MODEL, prompt="a b c", max_tokens=3, stream=True, **options))
            assert (plain[-1].usage is not None) is asked
            assert len([event for event in plain if event.choices]) >= 3
        with client.chat.completions.stream(model=MODEL, messages=CHAT) as events:
            assert events.get_final_completion().choices[0].message.content == "one two three"
        pieces: dict[int, str] = {0: "", 1: ""}
        for event in client.chat.completions.create(model=MODEL, messages=CHAT, n=2, stream=True):
            for choice in event.choices:
                pieces[choice.index] += choice.delta.content or ""
        assert [sorted(text.split()) for text in pieces.values()] == [["one", "three", "two"]] * 2
        told = list(client.responses.create(model=MODEL, input="one two", stream=True))
        assert [event.type for event in told][:: len(told) - 1] == ["response.created", "response.completed"]
        assert "".join(event.delta for event in told if event.type == "response.output_text.delta") == "one two"


def test_the_async_client_asks_many_at_once(box: Box) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        if number % 2:
            whole = await client.chat.completions.create(model=MODEL, messages=CHAT)
            return whole.choices[0].message.content or ""
        stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
        return "".join([event.choices[0].delta.content or "" async for event in stream if event.choices])

    async def main() -> None:
        async with box.async_client() as client:
            assert set(await asyncio.gather(*(one(client, n) for n in range(40)))) == {"one two three"}
            numbers = await client.embeddings.create(model=MODEL, input="one")
            assert numbers.data[0].embedding

    asyncio.run(main())
    box.assert_freed()


def test_the_async_client_gets_what_the_plain_one_gets(box: Box) -> None:
    async def main() -> None:
        async with box.async_client() as client:
            chat = await client.chat.completions.create(model=MODEL, messages=CHAT, n=2)
            assert [choice.index for choice in chat.choices] == [0, 1]
            plain = await client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=2)
            assert len(plain.choices) == 2
            assert (await client.responses.create(model=MODEL, input="one two")).output_text == "one two"
            assert [model.id async for model in client.models.list()] == [MODEL]
            with pytest.raises(openai.NotFoundError) as unknown:
                await client.chat.completions.create(model="nobody", messages=CHAT)
            assert unknown.value.code == "model_not_found"
        async with box.async_client(key="k-wrong") as stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()
        async with box.async_client(key="k-one") as client:
            held = await client.completions.create(model=MODEL, prompt="a", stream=True, **LONG)
            await anext(aiter(held))
            with pytest.raises(openai.RateLimitError) as refused:
                await client.completions.create(model=MODEL, prompt="a", max_tokens=1)
            assert refused.value.code == "concurrency_limit"
            assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
            await held.close()

    asyncio.run(main())
    box.assert_freed()


def test_batch_class_by_key_header_and_service_tier(box: Box) -> None:
    asks: list[tuple[str, dict[str, Any]]] = [
        ("k-batch", {}),
        ("k-realtime", {"extra_headers": {"X-Priority": "batch"}}),
        ("k-realtime", {"service_tier": "flex"}),
    ]
    for number, (key, options) in enumerate(asks, 1):
        with box.client(key=key) as client:
            client.chat.completions.create(model=MODEL, messages=CHAT, **options)
        metrics = box.daemon.request("GET", "/metrics").body.decode()
        assert f'vllm_bootstrap_proxy_requests_total{{class="batch",code="200"}} {number}.0' in metrics


def test_raw_answers_show_our_headers(box: Box) -> None:
    with box.client(key="k-few") as client:
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=CHAT, extra_headers={"X-Request-Id": "my-own-id"}
        )
        assert raw.parse().choices
        assert raw.headers["x-request-id"] == "my-own-id"
        assert raw.headers["x-launch-id"] == box.launch_id
        assert int(raw.headers["x-queue-ms"]) >= 0
        assert raw.headers["x-ratelimit-limit-requests"] == "600"
        assert int(raw.headers["x-ratelimit-remaining-requests"]) < 600
        assert raw.headers["x-ratelimit-reset-requests"]
        assert raw.retries_taken == 0
        with client.chat.completions.with_streaming_response.create(
            model=MODEL, messages=CHAT, stream=True
        ) as streamed:
            assert streamed.headers["x-accel-buffering"] == "no"
            assert streamed.headers["content-type"].startswith("text/event-stream")
            assert list(streamed.iter_lines())[-2:] == ["data: [DONE]", ""]


# -- leaving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_fault_18_a_stream_that_is_closed_midway_frees_the_engine(box: Box, way: str) -> None:
    with box.client(way) as client:
        for create in (
            lambda: client.chat.completions.create(model=MODEL, messages=CHAT, stream=True, **LONG),
            lambda: client.completions.create(model=MODEL, prompt="a", stream=True, **LONG),
        ):
            stream = create()
            next(iter(stream))
            assert box.running() == 1
            stream.close()
            box.assert_freed()


@pytest.mark.parametrize("streamed", [True, False])
def test_fault_18_an_async_task_that_is_cancelled_frees_the_engine(box: Box, streamed: bool) -> None:
    async def ask(client: openai.AsyncOpenAI) -> None:
        if not streamed:
            await client.chat.completions.create(model=MODEL, messages=CHAT, **LONG)
            return
        async for _ in await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True, **LONG):
            pass

    async def main() -> None:
        async with box.async_client() as client:
            tasks = [asyncio.create_task(ask(client)) for _ in range(5)]
            await asyncio.to_thread(wait_for, lambda: box.running() == 5)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(box.assert_freed)

    asyncio.run(main())


@pytest.mark.parametrize("timeout", [0.3, httpx.Timeout(5, read=0.3)])
def test_fault_18_a_client_that_runs_out_of_patience_frees_the_engine(box: Box, timeout: Any) -> None:
    with box.client() as client, pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=timeout).completions.create(model=MODEL, prompt="a", **LONG)
    box.assert_freed()
    with box.client() as client, pytest.raises(openai.APITimeoutError):
        client.completions.create(model=MODEL, prompt="a", timeout=timeout, **LONG)
    box.assert_freed()


# -- being refused -----------------------------------------------------------------------------------------------------

REFUSALS: list[tuple[str, str, dict[str, Any], type[openai.APIStatusError], str]] = [
    ("k-wrong", "/v1", {}, openai.AuthenticationError, "invalid_api_key"),
    ("k-eyes", "/v1", {}, openai.PermissionDeniedError, "insufficient_scope"),
    ("k-realtime", "/v1", {"model": "nobody"}, openai.NotFoundError, "model_not_found"),
    ("k-realtime", "/proxy/l-nobody/v1", {}, openai.NotFoundError, "not_found"),
    ("k-realtime", "/v1", {"extra_body": {"kv_transfer_params": {}}}, openai.BadRequestError, ""),
    ("k-realtime", "/v1", {"extra_headers": {"Content-Type": "text/plain"}}, openai.APIStatusError, ""),
]


@pytest.mark.parametrize(("key", "way", "options", "kind", "code"), REFUSALS)
def test_refusals_are_the_clients_own_exceptions(
    box: Box, key: str, way: str, options: dict[str, Any], kind: type[openai.APIStatusError], code: str
) -> None:
    with box.client(way, key) as client, pytest.raises(kind) as refused:
        client.chat.completions.create(**{"model": MODEL, "messages": CHAT, **options})
    assert refused.value.response.json()["src"] == "vllm-bootstrap"
    assert refused.value.message
    assert refused.value.request_id
    if code:
        assert refused.value.code == code


class Waits:
    """Stands for the module ``time`` in the client: notes how long it wants to wait, and lets happen what it waits
    for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, meanwhile: Any) -> None:
        self.asked: list[float] = []
        self._meanwhile = meanwhile
        double = SimpleNamespace(**{**vars(time), "sleep": self._sleep})
        monkeypatch.setattr("openai._base_client.time", double)

    def _sleep(self, seconds: float) -> None:
        self.asked.append(seconds)
        self._meanwhile()


def test_fault_28_a_429_is_tried_again_when_it_says(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    with box.client(key="k-one") as holder, box.client(key="k-one", max_retries=2) as client:
        stream = holder.completions.create(model=MODEL, prompt="a", stream=True, **LONG)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as refused:
            client.with_options(max_retries=0).completions.create(model=MODEL, prompt="a", max_tokens=1)
        assert refused.value.code == "concurrency_limit"
        seconds = float(refused.value.response.headers["retry-after"])

        def meanwhile() -> None:
            stream.close()
            box.assert_freed()

        waits = Waits(monkeypatch, meanwhile)
        raw = client.completions.with_raw_response.create(model=MODEL, prompt="a", max_tokens=1)
        assert raw.retries_taken == 1
        assert waits.asked == [seconds]


def test_fault_28_a_503_while_loading_is_tried_again_and_a_409_is_not(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_id = box.daemon.launch("org/late", served_model_name="late", knobs={"boot-delay": 0.5})
    waits = Waits(monkeypatch, lambda: box.daemon.wait_state(launch_id, "ready"))
    with box.client(max_retries=2) as client:
        raw = client.chat.completions.with_raw_response.create(model="late", messages=CHAT)
        assert raw.retries_taken == 1
        assert raw.headers["x-launch-id"] == launch_id
        assert 1 <= waits.asked[0] <= 60
    assert box.daemon.stop_launch(launch_id).json()["state"] == "stopped"
    with (
        openai.OpenAI(base_url=f"{box.daemon.url}/proxy/{launch_id}/v1", api_key="k-realtime", timeout=20) as client,
        pytest.raises(openai.ConflictError) as refused,
    ):
        client.chat.completions.create(model="late", messages=CHAT)
    assert refused.value.code == "launch_not_ready"
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert refused.value.response.request.headers["x-stainless-retry-count"] == "0"
    assert len(waits.asked) == 1


def test_fault_30_an_engine_that_dies_breaks_a_stream_with_the_clients_own_error(box: Box) -> None:
    status = box.daemon.ready("org/frail", served_model_name="frail")
    with box.client() as client:
        stream = iter(client.completions.create(model="frail", prompt="a", stream=True, **LONG))
        next(stream)
        os.kill(status["pid"], signal.SIGKILL)
        with pytest.raises(openai.APIError, match="engine") as broken:
            list(stream)
    assert not isinstance(broken.value, openai.APIStatusError)
    assert broken.value.code == "upstream_error"
    box.daemon.wait_state(status["launch_id"], "failed")


def test_a_client_of_the_old_kind_with_its_own_transport_and_timeouts(box: Box) -> None:
    with httpx.Client(timeout=httpx.Timeout(5, read=10), trust_env=False) as transport:
        client = openai.OpenAI(base_url=box.base("/v1"), api_key="k-realtime", http_client=transport, max_retries=0)
        assert client.chat.completions.create(model=MODEL, messages=CHAT).choices
        stream = client.completions.create(model=MODEL, prompt="a b c", stream=True)
        assert "".join(event.choices[0].text for event in stream) == "a b c"
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(model=MODEL, prompt="a", timeout=httpx.Timeout(5, read=0.2), **LONG)
    box.assert_freed()
