"""Files over HTTP, through the whole application and onto a real disk: uploads, pages, ranges, and who may what."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.aio import eventually, run
from tests.support.control_plane import Answer, Browser, key, make
from vllm_bootstrap.api import downloads
from vllm_bootstrap.batches.files import FileStore
from vllm_bootstrap.db import Database

LIMIT = 2 * 1024**2
KEYS = [
    key("root", "admin"), key("ann", "upload", "batch"), key("bob", "batch"), key("carl", "upload"),
    key("eve", "realtime"),
]  # fmt: skip
LINES = b'{"custom_id": "a"}\n' * 1000


class Desk:
    """The application with a store in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "files"
        self.db = Database.open(folder / "state.db", network=False)
        self.services = make(KEYS)
        self.now = 1_800_000_000.75
        self.store = FileStore(
            self.db, self.folder, max_bytes=LIMIT, expires_after_s=86400, reserve_bytes=0, clock=lambda: self.now
        )
        self.services.files = self.store
        self.browsers = {one.principal.name: Browser(self.services, one.principal.name) for one in KEYS}

    def as_(self, name: str) -> Browser:
        return self.browsers[name]

    def upload(self, data: bytes = LINES, name: str = "ann", **fields: str) -> Answer:
        body, content_type = form(("file", "in.jsonl", data), **{"purpose": "batch", **fields})
        return self.as_(name).post("/v1/files", body, content_type=content_type)

    def uploaded(self, data: bytes = LINES, name: str = "ann", **fields: str) -> dict[str, Any]:
        answer = self.upload(data, name, **fields)
        assert answer.status == 200, answer.body
        found: dict[str, Any] = answer.json()
        return found

    def close(self) -> None:
        self.store.close()
        self.db.close()


def form(*parts: tuple[str, str, bytes], **fields: str) -> tuple[bytes, str]:
    found = b""
    for name, value in fields.items():
        found += f'--cut\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
    for name, filename, data in parts:
        head = f'--cut\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n\r\n'
        found += head.encode() + data + b"\r\n"
    return found + b"--cut--\r\n", "multipart/form-data; boundary=cut"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.close()


def test_a_file_is_answered_as_the_sdk_reads_it(desk: Desk) -> None:
    made = desk.uploaded(LINES)
    assert made == {
        "id": made["id"], "object": "file", "bytes": len(LINES), "created_at": 1_800_000_000,
        "expires_at": 1_800_086_400, "filename": "in.jsonl", "purpose": "batch", "status": "processed",
        "status_details": None,
    }  # fmt: skip
    assert (desk.folder / made["id"]).read_bytes() == LINES
    assert desk.as_("ann").get(f"/v1/files/{made['id']}").json() == made


def test_a_file_may_expire_when_its_form_says(desk: Desk) -> None:
    wanted = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "7200"}
    assert desk.uploaded(**wanted)["expires_at"] == 1_800_000_000 + 7200
    answer = desk.upload(**{**wanted, "expires_after[seconds]": "60"})
    assert (answer.status, answer.error["param"]) == (400, "expires_after.seconds")


def test_purposes(desk: Desk) -> None:
    assert desk.uploaded(purpose="user_data")["expires_at"] is None
    for purpose in ("batch_output", "assistants", "vision", "fine-tune", "evals", "", "nonsense"):
        answer = desk.upload(purpose=purpose)
        assert (answer.status, answer.error["param"]) == (400, "purpose")
        assert "'batch' or 'user_data'" in answer.error["message"]


@pytest.mark.parametrize("late", [False, True])
def test_a_key_without_upload_uploads_for_batches_only(desk: Desk, *, late: bool) -> None:
    assert desk.uploaded(name="bob")["purpose"] == "batch"
    parts, fields = [("file", "x", b"data")], {"purpose": "user_data"}
    body, content_type = form(*parts, **fields)
    if late:
        body = form(*parts)[0].removesuffix(b"--cut--\r\n") + form(**fields)[0]
    answer = desk.as_("bob").post("/v1/files", body, content_type=content_type)
    assert (answer.status, answer.error["code"], answer.error["needed_scopes"]) == (
        403,
        "insufficient_scope",
        ["upload"],
    )
    assert desk.uploaded(name="carl", purpose="user_data")["purpose"] == "user_data"
    assert len(list(desk.folder.iterdir())) == 2


def test_whose_file_it_is(desk: Desk) -> None:
    mine = desk.uploaded(name="ann")["id"]
    for path in (f"/v1/files/{mine}", f"/v1/files/{mine}/content"):
        answers = [desk.as_(name).get(path) for name in ("bob", "carl", "eve", "root", "ann")]
        assert [answer.status for answer in answers] == [404, 404, 403, 200, 200]
    assert desk.as_("bob").call("DELETE", f"/v1/files/{mine}").status == 404
    missing = desk.as_("bob").get("/v1/files/file-" + "0" * 20).error
    assert {**missing, "message": missing["message"].replace("file-" + "0" * 20, mine)} == desk.as_("bob").get(
        f"/v1/files/{mine}"
    ).error
    assert [len(desk.as_(name).get("/v1/files").json()["data"]) for name in ("ann", "bob", "root")] == [1, 0, 1]
    assert desk.as_("root").call("DELETE", f"/v1/files/{mine}").json() == {
        "id": mine,
        "object": "file",
        "deleted": True,
    }
    assert desk.as_("ann").get(f"/v1/files/{mine}").status == 404
    assert list(desk.folder.iterdir()) == []


def test_pages(desk: Desk) -> None:
    made = []
    for number in range(5):
        desk.now += 1
        made.append(desk.uploaded(purpose="batch" if number % 2 else "user_data")["id"])

    def page(query: str) -> tuple[list[int], bool]:
        found = desk.as_("ann").get(f"/v1/files{query}").json()
        ids = [one["id"] for one in found["data"]]
        assert (found["object"], found["first_id"], found["last_id"]) == (
            "list", ids[0] if ids else None, ids[-1] if ids else None
        )  # fmt: skip
        return [made.index(one) for one in ids], found["has_more"]

    assert page("") == ([4, 3, 2, 1, 0], False)
    assert page("?limit=2") == ([4, 3], True)
    assert page(f"?limit=2&order=asc&after={made[2]}") == ([3, 4], False)
    assert page("?purpose=user_data") == ([4, 2, 0], False)
    assert page("?purpose=vision") == ([], False)
    for wrong in ("?limit=0", "?limit=10001", "?order=up", "?after=x", "?color=red"):
        assert desk.as_("ann").get(f"/v1/files{wrong}").status == 400, wrong


# What is refused, and leaves nothing


FILE = ("file", "in.jsonl", b"x" * 300_000)


def test_bad_forms_leave_nothing_behind(desk: Desk) -> None:
    good, content_type = form(FILE, purpose="batch")
    cases = [
        (good[:-20], content_type, 400),
        (good.removesuffix(b"--cut--\r\n") + good, content_type, 400),
        (form(FILE)[0], content_type, 400),
        (form(purpose="batch")[0], content_type, 400),
        (form(FILE, purpose="batch", colour="red")[0], content_type, 400),
        (form(("file", "a\x01b", b"x"), purpose="batch")[0], content_type, 400),
        (good, "multipart/form-data", 400),
        (good, "multipart/form-data; boundary=other", 400),
        (b"nothing like a form", content_type, 400),
        (good, "application/json", 415),
        (b"", content_type, 400),
        (form(("file", "x", b"y" * (LIMIT + 1)), purpose="batch")[0], content_type, 413),
        (form(("file", "x", b"y" * (LIMIT + 1024**2)), purpose="batch")[0], content_type, 413),
    ]
    for number, (body, sent_type, status) in enumerate(cases):
        answer = desk.as_("ann").call("POST", "/v1/files", body, {"content-type": sent_type})
        assert (answer.status, bool(answer.error["message"])) == (status, True), (number, answer.body)
        assert list(desk.folder.iterdir()) == [], number
    assert desk.as_("ann").get("/v1/files").json()["data"] == []


@pytest.mark.interpreted
def test_an_upload_whose_key_was_revoked_meanwhile_is_not_kept(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk.services.guard, "is_current", lambda principal: False)
    assert desk.upload().status == 401
    assert list(desk.folder.iterdir()) == []


def test_while_the_daemon_ends_nothing_is_taken(desk: Desk) -> None:
    made = desk.uploaded()
    desk.services.phase = "draining"
    assert (desk.upload().status, desk.upload().error["code"]) == (503, "draining")
    assert desk.as_("ann").get(f"/v1/files/{made['id']}").status == 200


# Content


def content(desk: Desk, file_id: str, method: str = "GET", **headers: str) -> Answer:
    return desk.as_("ann").call(
        method, f"/v1/files/{file_id}/content", headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


def test_content_comes_as_it_was_sent_and_is_no_page_of_ours(desk: Desk) -> None:
    data = os.urandom(600_000)
    body, content_type = form(("file", 'a "b" größe.html', data), purpose="batch")
    made = desk.as_("ann").post("/v1/files", body, content_type=content_type).json()
    answer = content(desk, made["id"])
    assert (answer.status, answer.body) == (200, data)
    assert answer.headers["content-length"] == str(len(data))
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-disposition"].startswith("attachment; filename*=UTF-8''a%20")
    assert "content-range" not in answer.headers
    empty = content(desk, desk.uploaded(b"")["id"])
    assert (empty.status, empty.body, empty.headers["content-length"]) == (200, b"", "0")


def test_head_tells_the_size_without_reading(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made = desk.uploaded()
    monkeypatch.setattr(downloads, "_open", None)
    answer = content(desk, made["id"], "HEAD", range="bytes=0-1")
    assert (answer.status, answer.headers["content-length"], answer.body) == (200, str(len(LINES)), b"")
    assert answer.headers["etag"] == f'"{made["id"]}-{len(LINES)}"'


def test_ranges(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PIECE_BYTES", 1000)
    data = os.urandom(10_000)
    file_id, size = desk.uploaded(data)["id"], 10_000
    for header, start, end in [("bytes=0-", 0, size), ("bytes=500-4499", 500, 4500), ("bytes=-7", size - 7, size),
                               ("bytes=9999-20000", 9999, size)]:  # fmt: skip
        answer = content(desk, file_id, range=header)
        assert (answer.status, answer.body) == (206, data[start:end]), header
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert answer.headers["content-length"] == str(end - start)
    for header in ("bytes=0-1,5-6", "lines=0-1", "bytes=5-4"):
        assert (content(desk, file_id, range=header).status, content(desk, file_id, range=header).body) == (200, data)
    beyond = content(desk, file_id, range="bytes=10000-")
    assert (beyond.status, beyond.error["code"], beyond.headers["content-range"]) == (
        416, "offset_out_of_range", "bytes */10000"
    )  # fmt: skip


def test_a_range_of_another_file_gets_the_whole(desk: Desk) -> None:
    file_id = desk.uploaded()["id"]
    first = content(desk, file_id)
    for known in (first.headers["etag"], first.headers["last-modified"]):
        assert content(desk, file_id, range="bytes=0-3", if_range=known).status == 206
    for other in ('"another"', "Thu, 01 Jan 1970 00:00:00 GMT", "W/" + first.headers["etag"]):
        assert content(desk, file_id, range="bytes=0-3", if_range=other).body == LINES


def test_a_file_that_is_not_what_was_stored_is_not_given_out(desk: Desk) -> None:
    made = desk.uploaded()
    (desk.folder / made["id"]).write_bytes(b"short")
    answer = content(desk, made["id"])
    assert (answer.status, answer.error["code"]) == (503, "storage_failed")
    (desk.folder / made["id"]).unlink()
    (desk.folder / made["id"]).symlink_to("/etc/passwd")
    assert content(desk, made["id"]).error["code"] == "storage_failed"
    (desk.folder / made["id"]).unlink()
    assert content(desk, made["id"]).status == 404


def test_a_file_that_ends_too_early_cuts_the_answer(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = desk.uploaded()["id"]
    monkeypatch.setattr(os, "pread", lambda fd, size, at: b"")
    with pytest.raises(RuntimeError, match="the file ends at 0"):
        content(desk, file_id)


def test_an_answer_that_is_ended_while_the_disk_is_slow_closes_its_file(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_id = desk.uploaded()["id"]
    entered, release, real = threading.Event(), threading.Event(), os.pread

    def slow(fd: int, size: int, at: int) -> bytes:
        entered.set()
        assert release.wait(10)
        return real(fd, size, at)

    def still_open() -> list[str]:
        return [one.path for one in psutil.Process().open_files() if file_id in one.path]

    async def main() -> None:
        monkeypatch.setattr(os, "pread", slow)
        answering = asyncio.create_task(desk.as_("ann").exchange("GET", f"/v1/files/{file_id}/content"))
        await eventually(entered.is_set)
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering
        assert still_open(), "a thread reads it"
        release.set()
        await eventually(lambda: not still_open())

    run(main())


def test_who_goes_away_ends_the_reading(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PIECE_BYTES", 1000)
    data = b"x" * 1_000_000
    file_id = desk.uploaded(data)["id"]
    path = f"/v1/files/{file_id}/content"
    answer = run(desk.as_("ann").exchange("GET", path, leave_after=lambda sent: len(sent) >= 3000))
    assert 3000 <= len(answer.body) < 100_000
    assert [one.path for one in psutil.Process().open_files() if file_id in one.path] == []


@pytest.mark.interpreted
def test_a_revoked_key_reads_no_further(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PIECE_BYTES", 1000)
    file_id = desk.uploaded(b"x" * 10_000)["id"]
    looks = iter([True, True, True])
    monkeypatch.setattr(desk.services.guard, "is_current", lambda principal: next(looks, False))
    answer = content(desk, file_id)
    assert len(answer.body) == 3000
    assert answer.headers["content-length"] == "10000"


def test_the_form_is_described(desk: Desk) -> None:
    described = json.loads(desk.as_("root").get("/openapi.json").body)["paths"]["/v1/files"]["post"]
    schema = described["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(schema["properties"]) == {"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"}
    assert described["x-scopes"] == ["batch", "upload"]
