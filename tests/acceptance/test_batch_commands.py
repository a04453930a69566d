"""``vllm-bootstrap batch`` and webhooks against a running daemon and a simulated engine."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import openai
import pytest

from tests.support import commands
from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_for

SECRET = "the operator's own secret"


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(webhook_secret=SECRET, webhook_allow_private=True, webhook_attempts=1) as made:
        made.ready(max_num_seqs=8)
        yield made


class Hook:
    """Takes webhooks."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                hook.got.append((dict(self.headers.items()), body))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def url_of(daemon: DaemonProcess) -> str:
    host, port = daemon.address
    return f"http://{host}:{port}"


def run(daemon: DaemonProcess, *args: str, **options: Any) -> commands.Result:
    env = {"VLLM_BOOTSTRAP_URL": url_of(daemon), "VLLM_BOOTSTRAP_STATE_DIR": "/nonexistent"}
    return commands.run("batch", *args, env=env, **options)


def written(path: Path, count: int, **body: Any) -> str:
    asked = {"model": "sim", "prompt": "one two three", "max_tokens": 4, **body}
    lines = [
        {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": asked}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_from_the_file_to_the_answers(daemon: DaemonProcess, tmp_path: Path) -> None:
    file = written(tmp_path / "in.jsonl", 40)
    with Hook() as hook:
        submitted = run(
            daemon, "submit", file, "--priority", "5", "--metadata", "team=a", "--webhook", hook.url, "--wait"
        )
        assert submitted.code == 0, submitted.err
        batch_id, *last = submitted.out.splitlines()[-1].split()
        assert " ".join(last).startswith("completed after ")
        assert " ".join(last).endswith("40 of 40 lines")
        wait_for(lambda: hook.got, 10, what="the webhook")
    headers, body = hook.got[0]
    event = openai.OpenAI(api_key="none").webhooks.unwrap(body, headers, secret=SECRET)
    assert (event.type, getattr(event, "data").id) == ("batch.completed", batch_id)  # noqa: B009  (one of many classes)

    out = tmp_path / "answers.jsonl"
    assert run(daemon, "results", batch_id, "-o", str(out)).code == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [f"line-{number}" for number in range(40)]
    assert all(answer["response"]["status_code"] == 200 for answer in answers)
    assert run(daemon, "results", batch_id).out == out.read_text()

    shown = run(daemon, "status", batch_id).out
    for said in ("completed", "40 of 40 lines", "team=a", "sim (40)"):
        assert said in shown
    assert batch_id in run(daemon, "status").out
    assert run(daemon, "retry", batch_id).code == 1, "nothing has failed"


def test_a_batch_that_waits_says_for_what_and_can_be_steered(daemon: DaemonProcess, tmp_path: Path) -> None:
    file = written(tmp_path / "in.jsonl", 3, model="not-loaded")
    batch_id = run(daemon, "submit", file).out.strip()
    wait_for(lambda: "waits: " in run(daemon, "status", batch_id).out + run(daemon, "status").out, 10, what="a reason")
    assert "(paused)" in run(daemon, "pause", batch_id).out
    assert "(paused)" not in run(daemon, "resume", batch_id).out
    assert run(daemon, "priority", batch_id, "-100").out == f"{batch_id}  priority -100\n"
    assert run(daemon, "results", batch_id).code == 1
    assert run(daemon, "results", batch_id, "--partial").out == ""
    assert run(daemon, "cancel", batch_id).code == 0
    wait_for(lambda: run(daemon, "status", batch_id, "--json").json()["status"] == "cancelled", 10, what="its end")
    errors = [json.loads(line) for line in run(daemon, "results", batch_id, "--errors").out.splitlines()]
    assert [line["error"]["code"] for line in errors] == ["batch_cancelled"] * 3


def test_an_input_with_faults_is_refused_with_line_numbers(daemon: DaemonProcess, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    good = Path(written(path, 2)).read_text().splitlines()
    path.write_text("\n".join([good[0], "{", good[0]]) + "\n")
    result = run(daemon, "submit", str(path), "--wait")
    assert result.code == 1
    assert "failed" in result.out
    assert "line 2: " in result.err
    assert "line 3: " in result.err


def test_a_webhook_that_nobody_takes_is_given_up(daemon: DaemonProcess, tmp_path: Path) -> None:
    with Hook() as closed:
        pass
    batch_id = run(daemon, "submit", written(tmp_path / "in.jsonl", 1), "--webhook", closed.url).out.strip()
    told = f"of batch {batch_id} to 127.0.0.1 is given up after 1 attempts: no connection"
    wait_for(lambda: told in daemon.log, 15, what="its end")
    assert SECRET not in daemon.log


def test_items_through_the_client(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        made = client.items.submit(model="sim", prompt="one two three", max_tokens=3, priority=1)
        ended = client.items.wait(made.id, timeout_s=20)
        assert ended.status == "completed"
        assert ended.response is not None
        assert ended.response["body"]["usage"]["completion_tokens"] == 3
        assert client.items.cancel(made.id).status == "completed"
