"""scripts/smoke_test.sh against a real daemon with a simulated engine, and against servers that are not well."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.support.daemon import DaemonProcess

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/smoke_test.sh"
KEY = "vb-a-key-that-must-not-be-seen"


def smoke(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "ENV_FILE": "/dev/null", "WAIT_S": "20", **environment}
    return subprocess.run([SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(access_key=KEY) as daemon:
        daemon.ready("org/model")
        yield daemon


def test_all_is_well_and_the_key_is_no_argument(daemon: DaemonProcess, tmp_path: Path) -> None:
    wrapper = tmp_path / "curl"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/argv\nexec {shutil.which("curl")} "$@"\n')
    wrapper.chmod(0o755)
    done = smoke(daemon.url, VLLM_BOOTSTRAP_KEY=KEY, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.returncode, done.stderr) == (0, "")
    steps = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert steps == ["alive", "ready", "version", "model", "completion", "chat", "All is well at http"]
    assert "model: org/model" in done.stdout
    assert len((tmp_path / "argv").read_text().splitlines()) == 6
    assert KEY not in (tmp_path / "argv").read_text() + done.stdout


def test_the_key_comes_from_the_env_file_of_the_container_too(daemon: DaemonProcess, tmp_path: Path) -> None:
    (tmp_path / "env").write_text(f"PORT=1\nVLLM_ACCESS_KEY={KEY}\r\nX=$(touch {tmp_path}/executed)\n")
    done = smoke(daemon.url + "/", "org/model", ENV_FILE=str(tmp_path / "env"))
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"VLLM_BOOTSTRAP_KEY": "wrong"}, "/v1/models: the key is not known there (401)\n"),
        ({}, "(401); none was given: set VLLM_BOOTSTRAP_KEY"),
    ],
)
def test_a_wrong_key_is_named_as_the_cause(daemon: DaemonProcess, given: dict[str, str], words: str) -> None:
    done = smoke(daemon.url, **given)
    assert done.returncode == 1
    assert words in done.stderr


def test_a_model_that_is_not_there_fails_with_the_daemons_words(daemon: DaemonProcess) -> None:
    done = smoke(daemon.url, "nobody/knows-it", VLLM_BOOTSTRAP_KEY=KEY)
    assert done.returncode == 1
    assert "completion: status 404:" in done.stderr
    assert "nobody/knows-it" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "env"), [(["localhost:8000"], {}), (["http://x", 'a"b'], {}), ([], {"WAIT_S": "soon"})]
)
def test_a_wrong_call_is_a_usage_error(daemon: DaemonProcess, arguments: list[str], env: dict[str, str]) -> None:
    called = [daemon.url if argument == "http://x" else argument for argument in arguments]
    assert smoke(*called, VLLM_BOOTSTRAP_KEY=KEY, **env).returncode == 2


class Answers(BaseHTTPRequestHandler):
    """What the server says, by path: status and body. Anything else is 404."""

    said: dict[str, tuple[int, str]]

    def do_GET(self) -> None:  # the name is the library's
        status, body = self.said.get(self.path, (404, ""))
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET  # noqa: N815  # likewise

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    made = HTTPServer(("127.0.0.1", 0), Answers)
    Answers.said = dict.fromkeys(("/livez", "/healthz", "/version"), (200, "{}"))
    Answers.said["/v1/models"] = (200, '{"data": [{"id": "first"}, {"id": "second"}]}')
    Answers.said["/v1/completions"] = (200, '{"choices": [{"text": "hello"}]}')
    thread = Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def url(server: HTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_a_model_that_never_gets_ready_is_given_up(server: HTTPServer) -> None:
    Answers.said["/healthz"] = (503, '{"error": {"message": "first is \\"loading\\": 40 %", "code": "model_loading"}}')
    done = smoke(url(server), WAIT_S="1")
    assert done.returncode == 1
    assert done.stdout == "alive\n"
    assert 'alive, but not ready within 1 s: /healthz says 503: first is \\"loading\\": 40 %' in done.stderr


def test_nobody_there_is_said_in_curls_words(server: HTTPServer) -> None:
    port = server.server_port + 1 if server.server_port < 65535 else 1
    done = smoke(f"http://127.0.0.1:{port}", WAIT_S="0")
    assert done.returncode == 1
    assert "not alive within 0 s: /livez says 000: curl: (7)" in done.stderr


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ('data: {"choices": [{"delta": {"content": "hel"}}]}\n\n', "the stream has no end"),
        ("data: [DONE]\n\n", "a stream without any piece"),
    ],
)
def test_a_stream_that_breaks_off_is_not_well(server: HTTPServer, stream: str, words: str) -> None:
    Answers.said["/v1/chat/completions"] = (200, stream)
    done = smoke(url(server))
    assert done.returncode == 1
    assert f"chat: {words}" in done.stderr
    assert "model: first\n" in done.stdout


def test_without_any_model_it_says_what_to_do(server: HTTPServer) -> None:
    Answers.said["/v1/models"] = (200, '{"data": []}')
    done = smoke(url(server))
    assert done.returncode == 1
    assert "/v1/models lists none: launch one" in done.stderr
