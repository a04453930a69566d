"""One file over HTTP, byte by byte: what is gone on with, and what is refused."""

from __future__ import annotations

import fcntl
import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from vllm_bootstrap.models import transfer as module
from vllm_bootstrap.models.hub import HubTrouble, Origin
from vllm_bootstrap.models.transfer import Stopped, Transfer, locked

CONTENT = bytes(range(256)) * 64
SHA256 = hashlib.sha256(CONTENT).hexdigest()
Answer = Callable[[BaseHTTPRequestHandler, int], None]


class Server:
    """Answers each request with the next of ``answers``, the last one for ever; ``ranges`` is what was asked for."""

    def __init__(self) -> None:
        self.answers: list[Answer] = [whole]
        self.ranges: list[str | None] = []
        self.url = ""


def reply(request: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    request.wfile.write(body)


def whole(request: BaseHTTPRequestHandler, start: int) -> None:
    part = CONTENT[start:]
    if start:
        reply(request, 206, part, Content_Range=f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
    else:
        reply(request, 200, part)


def status(code: int) -> Answer:
    return lambda request, _: reply(request, code)


def half(request: BaseHTTPRequestHandler, start: int) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(CONTENT)))
    request.end_headers()
    request.wfile.write(CONTENT[: len(CONTENT) // 2])
    request.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = self.headers.get("range")
            found.ranges.append(asked)
            answer = found.answers.pop(0) if len(found.answers) > 1 else found.answers[0]
            answer(self, int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0)

        def log_message(self, *args: object) -> None:
            """The test looks at ``ranges``."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        found.url = f"http://127.0.0.1:{listening.server_address[1]}/file"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield found
        listening.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.001)


def fetch(server: Server, part: Path, blob: str = SHA256, **changes: Any) -> list[int]:
    told: list[int] = []
    stop = changes.pop("stop", threading.Event())
    reserve = changes.pop("reserve", 0)
    with httpx.Client(timeout=5, trust_env=False) as client:
        origin = Origin(blob, changes.pop("size", len(CONTENT)), server.url, {"authorization": "Bearer x"})
        Transfer(client, origin, part, stop, told.append, reserve).run()
    return told


@pytest.mark.parametrize("blob", [SHA256, hashlib.sha1(b"blob 16384\0" + CONTENT).hexdigest(), "an-etag-of-a-mirror"])
def test_it_goes_on_behind_what_is_there(server: Server, tmp_path: Path, blob: str) -> None:
    part = tmp_path / "part"
    part.write_bytes(CONTENT[:1000])
    assert fetch(server, part, blob)[-1] == len(CONTENT)
    assert part.read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]
    fetch(server, part, blob)
    assert len(server.ranges) == 1  # nothing was missing any more


def test_what_was_on_disk_and_is_wrong_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(b"x" * 1000)
    fetch(server, part)
    assert part.read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-", None]
    part.write_bytes(b"x" * 20_000)  # longer than the file
    fetch(server, part)
    assert part.read_bytes() == CONTENT


def test_what_is_wrong_twice_is_damaged(server: Server, tmp_path: Path) -> None:
    server.answers = [lambda request, _: reply(request, 200, bytes(len(CONTENT)))]
    with pytest.raises(HubTrouble) as caught:
        fetch(server, tmp_path / "part")
    assert caught.value.name == "damaged"
    assert len(server.ranges) == 2


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        (status(401), "token"),
        (status(403), "token"),
        (status(404), "hub"),
        (status(503), "hub"),
        (lambda request, _: reply(request, 206, b"x", Content_Range="bytes 5-5/16384"), "hub"),
        (lambda request, _: reply(request, 206, b"x"), "hub"),
        (lambda request, start: reply(request, 206, b"x", Content_Range=f"bytes {start}-{start}/99999"), "damaged"),
        (lambda request, _: reply(request, 200, b"x", Content_Encoding="gzip"), "hub"),
        (lambda request, _: reply(request, 200, CONTENT + b"x"), "damaged"),
    ],
)
def test_answers_that_are_none(server: Server, tmp_path: Path, answer: Answer, name: str) -> None:
    part = tmp_path / "part"
    part.write_bytes(CONTENT[:1000])
    server.answers = [answer]
    with pytest.raises(HubTrouble) as caught:
        fetch(server, part)
    assert caught.value.name == name


def test_a_rest_that_does_not_exist_means_to_begin_anew(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(b"x" * 1000)
    server.answers = [status(416), whole]
    fetch(server, part)
    assert part.read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-", None]


def test_a_server_that_brings_nothing_is_given_up(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(CONTENT[:1000])
    server.answers = [status(416)]
    with pytest.raises(HubTrouble) as caught:
        fetch(server, part)
    assert caught.value.name == "connection"
    assert len(server.ranges) == module.CUTS_WITHOUT_PROGRESS + 1


def test_a_cut_on_the_way_keeps_what_came(server: Server, tmp_path: Path) -> None:
    server.answers = [half, whole]
    fetch(server, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=8192-"]


def test_it_stops_when_another_file_has_failed(server: Server, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        fetch(server, tmp_path / "part", stop=stop)
    server.answers = [status(416)]
    (tmp_path / "part").write_bytes(b"")
    with pytest.raises(Stopped):
        fetch(server, tmp_path / "part", stop=stop)


def test_the_reserve_of_the_disk_is_looked_at_on_the_way(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SYNC_BYTES", 1000)
    fetch(server, tmp_path / "part")
    (tmp_path / "part").unlink()
    with pytest.raises(HubTrouble) as caught:
        fetch(server, tmp_path / "part", reserve=2**60)
    assert caught.value.name == "full"
    assert 0 < (tmp_path / "part").stat().st_size <= len(CONTENT)


def test_the_lock_of_a_blob_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_POLL_S", 0.01)
    path, stop, inside = tmp_path / "locks" / "x.lock", threading.Event(), threading.Event()

    def take() -> None:
        with locked(path, stop):
            inside.set()

    with locked(path, stop):
        waiting = threading.Thread(target=take)
        waiting.start()
        assert not inside.wait(0.05)
        path.unlink()  # as some releases of the library do with a lock that they give back
    waiting.join(10)
    assert inside.is_set()
    assert path.exists()
    with path.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        stop.set()
        with pytest.raises(Stopped):
            take()
