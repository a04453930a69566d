"""Files with the stock ``openai`` client against a whole daemon: what it uploads is there, whole, for its own key, also
after the daemon was killed; what the settings say holds."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from tests.support.daemon import DaemonProcess

MIB = 1024**2
KEYS = {"keys": [
    {"name": "root", "token": "k-admin", "scopes": ["admin"]},
    {"name": "ann", "token": "k-ann", "scopes": ["upload", "batch"]},
    {"name": "bob", "token": "k-bob", "scopes": ["batch"]},
    {"name": "carl", "token": "k-carl", "scopes": ["realtime"]},
]}  # fmt: skip
LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "x"}}\n'


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps(KEYS))
    keys.chmod(0o600)
    with DaemonProcess(auth_keys_file=keys, key="k-admin", file_max_bytes=64 * MIB) as running:
        yield running


def client(daemon: DaemonProcess, key: str = "k-ann") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{daemon.url}/v1", api_key=key, max_retries=0, timeout=60)


def stored(daemon: DaemonProcess) -> list[Path]:
    return list((daemon.state_dir / "files").iterdir())


def test_fifty_megabytes_there_and_back(daemon: DaemonProcess, tmp_path: Path) -> None:
    sent = tmp_path / "in.jsonl"
    with sent.open("wb") as file:
        for number in range(50):
            file.write(hashlib.sha256(b"%d" % number).digest() * (MIB // 32))
    before = time.time()
    with client(daemon) as ann, sent.open("rb") as file:
        made = ann.files.create(file=file, purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
        assert (made.object, made.filename, made.purpose, made.bytes) == ("file", "in.jsonl", "batch", 50 * MIB)
        assert before - 1 <= made.created_at <= time.time()
        assert made.expires_at is not None
        assert made.expires_at - made.created_at in {3600, 3601}
        daemon.restart()  # killed: what was answered is on disk

    with client(daemon) as ann:
        assert ann.files.retrieve(made.id) == made
        assert [one.id for one in ann.files.list(purpose="batch")] == [made.id]
        got = tmp_path / "out.jsonl"
        with ann.files.with_streaming_response.content(made.id) as answer:
            answer.stream_to_file(got)
        assert hashlib.sha256(got.read_bytes()).digest() == hashlib.sha256(sent.read_bytes()).digest()
        part = ann.files.content(made.id, extra_headers={"Range": "bytes=1048570-1048579"})
        assert part.response.status_code == 206
        assert part.content == sent.read_bytes()[1048570:1048580]
        assert part.response.headers["content-range"] == f"bytes 1048570-1048579/{50 * MIB}"

        with client(daemon, "k-bob") as bob:
            for ask in (bob.files.retrieve, bob.files.content, bob.files.delete):
                with pytest.raises(openai.NotFoundError):
                    ask(made.id)
            assert bob.files.list().data == []
        with client(daemon, "k-carl") as carl, pytest.raises(openai.PermissionDeniedError):
            carl.files.list()

        assert ann.files.delete(made.id).deleted is True
        with pytest.raises(openai.NotFoundError):
            ann.files.retrieve(made.id)
        assert stored(daemon) == []


def test_every_way_in_which_the_client_sends_files(daemon: DaemonProcess, tmp_path: Path) -> None:
    path = tmp_path / "größe.jsonl"
    path.write_bytes(LINE)
    with client(daemon) as ann:
        ways = {
            path: path.name,
            ("named.jsonl", LINE): "named.jsonl",
            ("t.jsonl", LINE, "application/jsonl"): "t.jsonl",
        }
        made = [ann.files.create(file=file, purpose="user_data") for file in ways]
        assert [one.filename for one in made] == list(ways.values())
        made.append(ann.files.create(file=io.BytesIO(LINE), purpose="user_data"))
        pages = ann.files.list(limit=2, order="asc")
        assert [one.id for one in pages] == [one.id for one in made], "the client follows the pages"
        assert {ann.files.content(one.id).content for one in made} == {LINE}
        assert {one.expires_at for one in made} == {None}
        for one in made:
            ann.files.delete(one.id)


def test_what_is_refused_says_why(daemon: DaemonProcess) -> None:
    with client(daemon) as ann, client(daemon, "k-bob") as bob:
        with pytest.raises(openai.BadRequestError) as refused:
            ann.files.create(file=LINE, purpose="fine-tune")
        assert refused.value.param == "purpose"
        with pytest.raises(openai.PermissionDeniedError, match="'upload'"):
            bob.files.create(file=LINE, purpose="user_data")
        mine = bob.files.create(file=LINE, purpose="batch")
        assert bob.files.content(mine.id).content == LINE
        bob.files.delete(mine.id)
        with pytest.raises(openai.APIStatusError) as large:
            ann.files.create(file=b"x" * (64 * MIB + 1), purpose="batch")
        assert (large.value.status_code, large.value.code) == (413, "request_too_large")
        assert stored(daemon) == []


def test_memory_stays_flat_while_files_come_and_go(daemon: DaemonProcess) -> None:
    process = psutil.Process(daemon.pid)
    with client(daemon) as ann:
        warm = ann.files.create(file=b"x" * MIB, purpose="batch")
        before = process.memory_info().rss
        made = [ann.files.create(file=os.urandom(MIB) * 60, purpose="batch") for _ in range(3)]
        for one in made:
            assert len(ann.files.content(one.id).content) == 60 * MIB
        grown = process.memory_info().rss - before
        assert grown < 20 * MIB, f"{grown / MIB:.1f} MB"
        for one in [*made, warm]:
            ann.files.delete(one.id)


def test_settings_of_files() -> None:
    settings = {"file_expires_after_s": 7200, "disk_reserve_bytes": 1024**5}
    with DaemonProcess(**settings) as daemon:
        with client(daemon, "any") as anybody, pytest.raises(openai.APIStatusError) as refused:
            anybody.files.create(file=b"x" * 50 * MIB, purpose="batch")
        assert (refused.value.status_code, refused.value.code) == (507, "storage_full")
        assert stored(daemon) == []
        daemon.configure(disk_reserve_bytes=0)
        daemon.restart()
        with client(daemon, "any") as anybody:
            made = anybody.files.create(file=LINE, purpose="batch")
        assert made.expires_at is not None
        assert made.expires_at - made.created_at in {7200, 7201}
