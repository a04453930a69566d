"""A stand-in for the Hugging Face hub: a real HTTP server on loopback that speaks as much of it as downloads need.

It serves repositories from memory and can be told to misbehave: cut connections after so many bytes, go silent, answer
with errors, send something else than announced. It writes down what was asked for and how many bytes it sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_FROM_BYTES = 4096
PIECE = 16 * 1024


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Commit:
    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        seen = hashlib.sha1()
        for path, content in sorted(self.files.items()):
            seen.update(path.encode() + hashlib.sha1(content).digest())
        return seen.hexdigest()


@dataclass
class Repo:
    """``branches``: name to commit id. ``gated``: only who has ``token`` may read it, True: nobody."""

    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: str | bool = False

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        commit = Commit(dict(files))
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit.sha

    def commit(self, revision: str) -> tuple[str, Commit] | None:
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


@dataclass
class Asked:
    method: str
    path: str
    start: int = 0
    sent: int = 0
    token: str | None = None
    status: int = 200


class Hub:
    """``cuts``: how many bytes of a file each of the next answers may bring before it is cut, used up one by one.
    ``hold_at``: files go no further than so many bytes while ``go`` is not set. ``failing``: status of the next
    answers, used up. ``lies``: path to what is sent instead. ``no_ranges``: Range headers are ignored."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[Asked] = []
        self.cuts: list[int] = []
        self.failing: list[int] = []
        self.lies: dict[str, bytes] = {}
        self.hold_at: int | None = None
        self.go = threading.Event()
        self.holding = threading.Event()
        self.no_ranges = False
        self.silent = False
        self.redirects = True
        self.lock = threading.Lock()
        self.server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        assert self.server is not None
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def repo(self, name: str, files: dict[str, bytes]) -> Repo:
        repo = self.repos.setdefault(name, Repo())
        repo.push(files)
        return repo

    def sent(self, path: str) -> int:
        """Bytes of one file that left this server."""
        return sum(asked.sent for asked in self.asked if asked.path == path and asked.method == "GET")

    def env(self) -> dict[str, str]:
        """What makes huggingface_hub talk to this server, and to nothing else."""
        return {"HF_ENDPOINT": self.url, "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def take(self, queue: list[int]) -> int | None:
        with self.lock:
            return queue.pop(0) if queue else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Tests look at ``asked``."""

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        self.asked = Asked(self.command, path, token=token)
        self.hub.asked.append(self.asked)
        if self.hub.silent:
            self.hub.go.wait(30)
            self.close_connection = True
            return
        if (status := self.hub.take(self.hub.failing)) is not None:
            self._error(status, None)
        elif found := re.fullmatch(r"/api/models/(.+)/(revision|tree)/([^/]+)", path):
            self._api(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/api/models/(.+)", path):
            self._api(found[1], "revision", "main")
        elif found := re.fullmatch(r"/(?!lfs/)(.+?)/resolve/([^/]+)/(.+)", path):
            self._resolve(*found.groups())
        elif found := re.fullmatch(r"/lfs/(.+)/([0-9a-f]{40})/(.+)", path):
            self._content(self.hub.repos[found[1]].commits[found[2]].files[found[3]], found[3], {})
        else:
            self._error(404, None)

    def _find(self, name: str, revision: str) -> tuple[str, Commit] | None:
        """None: an error was sent."""
        repo = self.hub.repos.get(name)
        if repo is None:
            self._error(404 if self.asked.token else 401, "RepoNotFound")
            return None
        if repo.gated and (repo.gated is True or repo.gated != self.asked.token):
            self._error(403 if self.asked.token else 401, "GatedRepo")
            return None
        found = repo.commit(revision)
        if found is None:
            self._error(404, "RevisionNotFound")
        return found

    def _api(self, name: str, what: str, revision: str) -> None:
        found = self._find(name, revision)
        if found is None:
            return
        sha, commit = found
        if what == "revision":
            self._json({"id": name, "modelId": name, "sha": sha, "siblings": [{"rfilename": p} for p in commit.files]})
        else:
            self._json([_entry(path, content) for path, content in commit.files.items()])

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._find(name, revision)
        if found is None:
            return
        sha, commit = found
        content = commit.files.get(path)
        if content is None:
            self._error(404, "EntryNotFound")
            return
        large = len(content) >= LFS_FROM_BYTES
        etag = hashlib.sha256(content).hexdigest() if large else git_blob(content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if large and self.hub.redirects:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            # By another name for the same server: another host, as the real hub's storage is.
            port = self.server.server_address[1]
            headers["Location"] = f"http://localhost:{port}/lfs/{name}/{sha}/{path}"
            self.send_response(302)
            self._headers({**headers, "Content-Length": "0"})
        else:
            self._content(content, path, headers)

    def _content(self, content: bytes, path: str, headers: dict[str, str]) -> None:
        truth, content = content, self.hub.lies.get(path, content)
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")
        start = int(found[1]) if found and not self.hub.no_ranges else 0
        if start and start >= len(content):
            self._error(416, None)
            return
        self.asked.start = start
        self.send_response(206 if start else 200)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        announced = len(truth) if self.command == "HEAD" else len(content) - start
        self._headers({**headers, "Content-Length": str(announced)})
        if self.command == "GET":
            self._send(content, start, large=len(truth) >= LFS_FROM_BYTES)

    def _send(self, content: bytes, start: int, *, large: bool) -> None:
        cut = self.hub.take(self.hub.cuts) if large else None
        end = len(content) if cut is None else min(len(content), start + cut)
        position = start
        with contextlib.suppress(ConnectionError):
            while position < end:
                if large and self.hub.hold_at is not None and position >= self.hub.hold_at and not self.hub.go.is_set():
                    self.hub.holding.set()
                    self.hub.go.wait(30)
                piece = content[position : min(end, position + PIECE)]
                self.wfile.write(piece)
                position += len(piece)
                self.asked.sent += len(piece)
        if cut is not None and position < len(content):
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self._headers({"Content-Type": "application/json", "Content-Length": str(len(body))})
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str | None) -> None:
        self.asked.status = status
        self.send_response(status)
        self._headers({**({"X-Error-Code": code} if code else {}), "Content-Length": "0"})

    def _headers(self, headers: dict[str, str]) -> None:
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": git_blob(content)}
    if len(content) >= LFS_FROM_BYTES:
        sha = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
    return entry


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Who hangs up in the middle is what these tests are about."""


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """A hub until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with _Server(("127.0.0.1", 0), handler) as server:
        hub.server = server
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.go.set()
            server.shutdown()
            thread.join()
