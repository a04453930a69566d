"""Durable batches on a real vLLM through the stock client: two thousand mixed lines, with kill -9 of engine, shim and
daemon while they run. A start costs half a minute, so one launch lives through the whole file."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.support.waiting import wait_for
from tests.vllm.box import SERVED, Box, engine_core_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RESTART = {"policy": "on-failure", "max_attempts": 10, "backoff_s": 0.5}
CHATS, COMPLETIONS = 1400, 600
TOO_LONG = 5000  # tokens, of a model that has 1,024
ENDED = {"completed", "failed", "expired", "cancelled"}


@pytest.fixture(scope="module")
def launch_id(box: Box, tiny_model: Path) -> str:
    launched = box.launch(tiny_model, restart=RESTART)
    box.wait_for(launched, "ready")
    return launched


def chat(number: int) -> dict[str, Any]:
    """Lines of all sorts, and every hundredth one that the engine must refuse."""
    text = f"Question {number}. " + "word " * (number % 7 * 20)
    tokens = TOO_LONG if number % 100 == 99 else 4 + number % 9 * 2
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens}
    if number % 5 == 0:
        body |= {"n": 2, "temperature": 0.8}  # no seed: vLLM 0.32 for the CPU dies of several of them in one step
    if number % 3 == 0:
        body |= {"logprobs": True, "top_logprobs": 2}
    return body


def completion(number: int) -> dict[str, Any]:
    prompt: str | list[int] = f"Text {number}: ä€𝄞 \u2028 end" if number % 4 else [1, 2, 3, 4 + number % 50]
    return {"prompt": prompt, "max_tokens": 2 + number % 5, "temperature": 0}


def write(path: Path, endpoint: str, bodies: list[dict[str, Any]]) -> Path:
    with path.open("w") as file:
        for number, body in enumerate(bodies):
            line = {"custom_id": f"line-{number}", "method": "POST", "url": endpoint, "body": {"model": SERVED, **body}}
            file.write(json.dumps(line, ensure_ascii=number % 2 == 0) + "\n")
    return path


def submit(client: openai.OpenAI, path: Path, endpoint: Any) -> str:
    file = client.files.create(file=path, purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h").id


def done(box: Box, batch_id: str) -> int:
    with box.openai() as client:
        counts = client.batches.retrieve(batch_id).request_counts
    assert counts is not None
    return counts.completed + counts.failed


def results(client: openai.OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    assert file_id is not None
    lines = [json.loads(line) for line in client.files.content(file_id).text.split("\n") if line]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def kill_engine(box: Box, launch_id: str) -> None:
    engine_core_of(box.status(launch_id)["pid"]).send_signal(signal.SIGKILL)


def kill_server(box: Box, launch_id: str) -> None:
    os.kill(box.status(launch_id)["pid"], signal.SIGKILL)


def kill_shim(box: Box, launch_id: str) -> None:
    os.kill(box.status(launch_id)["shim_pid"], signal.SIGKILL)


def restart_daemon(box: Box, launch_id: str) -> None:
    box.daemon.restart()


def test_two_thousand_mixed_lines_have_one_record_each_whatever_is_killed(
    box: Box, launch_id: str, tmp_path: Path
) -> None:
    with box.openai() as client:
        chats = submit(
            client, write(tmp_path / "chats.jsonl", "/v1/chat/completions", [chat(n) for n in range(CHATS)]),
            "/v1/chat/completions",
        )  # fmt: skip
        texts = submit(
            client, write(tmp_path / "texts.jsonl", "/v1/completions", [completion(n) for n in range(COMPLETIONS)]),
            "/v1/completions",
        )  # fmt: skip
    for kill in (restart_daemon, kill_engine, restart_daemon, kill_shim, kill_server):
        before = done(box, chats) + done(box, texts)
        wait_for(lambda: done(box, chats) + done(box, texts) > before + 50, 120, 0.2, f"lines before {kill.__name__}")  # noqa: B023
        attempt = box.status(launch_id)["attempt"]
        kill(box, launch_id)
        if kill is not restart_daemon:
            wait_for(lambda: box.status(launch_id)["attempt"] > attempt, 60, 0.2)  # noqa: B023
            box.wait_for(launch_id, "ready", attempt=attempt + 1)
    with box.openai() as client:
        for batch_id in (chats, texts):
            wait_for(lambda: client.batches.retrieve(batch_id).status in ENDED, 300, 0.5, "the batches to end")  # noqa: B023
        first, second = client.batches.retrieve(chats), client.batches.retrieve(texts)
        assert (first.status, second.status) == ("completed", "completed")
        good, bad, plain = (
            results(client, name) for name in (first.output_file_id, first.error_file_id, second.output_file_id)
        )
        assert second.error_file_id is None
        check_chats(first, good, bad)
        check_texts(second, plain)
    assert not [p for p in psutil.Process(box.daemon.process.pid).children() if "indexing" in " ".join(p.cmdline())]


def check_chats(batch: Any, good: dict[str, Any], bad: dict[str, Any]) -> None:
    refused = {f"line-{n}" for n in range(CHATS) if n % 100 == 99}
    assert set(bad) == refused
    assert all(line["response"]["status_code"] == 400 for line in bad.values())
    assert set(good) == {f"line-{n}" for n in range(CHATS)} - refused
    assert (batch.request_counts.total, batch.request_counts.failed) == (CHATS, len(refused))
    made = 0
    for number in range(CHATS):
        line = good.get(f"line-{number}")
        if line is None:
            continue
        body = line["response"]["body"]
        assert len(body["choices"]) == (2 if number % 5 == 0 else 1), number
        assert (body["choices"][0]["logprobs"] is not None) == (number % 3 == 0), number
        assert body["usage"]["completion_tokens"] <= (4 + number % 9 * 2) * len(body["choices"])
        made += body["usage"]["completion_tokens"]
    assert batch.usage.output_tokens == made


def check_texts(batch: Any, plain: dict[str, Any]) -> None:
    assert set(plain) == {f"line-{n}" for n in range(COMPLETIONS)}
    bodies = [plain[f"line-{n}"]["response"]["body"] for n in range(COMPLETIONS)]
    for number, body in enumerate(bodies):
        (choice,) = body["choices"]
        assert choice["index"] == 0
        assert body["usage"]["completion_tokens"] <= 2 + number % 5
    # The same prompt at temperature 0, whatever it travelled with.
    same = [body["choices"][0]["text"] for n, body in enumerate(bodies) if n % 200 == 0]
    assert len(set(same)) == 1
    assert batch.usage.output_tokens == sum(body["usage"]["completion_tokens"] for body in bodies)


def test_what_failed_is_run_again_and_a_joined_answer_is_the_same_as_its_own(
    box: Box, launch_id: str, tmp_path: Path
) -> None:
    bodies = [{"prompt": f"Say {n}", "max_tokens": 4, "temperature": 0} for n in range(40)]
    with box.openai() as client:
        batch_id = submit(client, write(tmp_path / "again.jsonl", "/v1/completions", bodies), "/v1/completions")
        wait_for(lambda: client.batches.retrieve(batch_id).status in ENDED, 60, 0.2)
        batch = client.batches.retrieve(batch_id)
        found = results(client, batch.output_file_id)
        for number, body in enumerate(bodies):
            alone = client.completions.create(model=SERVED, **body)  # type: ignore[call-overload]
            record = found[f"line-{number}"]["response"]["body"]
            assert record["choices"][0]["text"] == alone.choices[0].text
            assert record["usage"]["prompt_tokens"] == alone.usage.prompt_tokens
            assert record["usage"]["completion_tokens"] == alone.usage.completion_tokens
    box.daemon.stop_launch(launch_id)
