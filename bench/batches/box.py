"""What the batch bench runs against: a daemon, one launch, inputs written on the spot, and how long things take."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from bench.common import cpu_s
from tests.support.daemon import DaemonProcess

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENDED = {"completed", "failed", "expired", "cancelled"}
POLL_S = 0.5
CORES = os.cpu_count() or 1


class Box:
    """A daemon with one launch of the simulator (or of what ``launch`` says), on core 0; engines on core 1."""

    def __init__(self, **settings: Any) -> None:
        env = settings.pop("env", {})
        self.daemon = DaemonProcess(env=env, **{"devices": "mock:1", "disk_reserve_bytes": 0, **settings})
        self.launch_id = ""

    def __enter__(self) -> Self:
        self.daemon.__enter__()
        self.pin()
        return self

    def __exit__(self, *_: object) -> None:
        self.daemon.close()

    @property
    def pid(self) -> int:
        process = self.daemon.process
        assert process is not None
        return process.pid

    def pin(self) -> None:
        """The daemon and all its threads to core 0, engines to core 1, where there are two and ``taskset``."""
        if CORES < 2 or shutil.which("taskset") is None:
            return
        subprocess.run(["taskset", "-apc", "0", str(self.pid)], check=False, stdout=subprocess.DEVNULL)
        if self.launch_id:
            engine = self.daemon.status(self.launch_id)["pid"]
            subprocess.run(["taskset", "-apc", "1", str(engine)], check=False, stdout=subprocess.DEVNULL)

    def launch(self, slots: int = 256, **knobs: Any) -> None:
        """A simulator that answers at once, unless ``knobs`` say otherwise."""
        wanted = {"tokens_per_second": 0, "prefill_tokens_per_second": 0, **knobs}
        self.launch_id = self.daemon.ready("sim", max_num_seqs=slots, knobs=wanted)["launch_id"]
        self.pin()

    def upload(self, path: Path) -> str:
        """Send a file as a form, from disk. Returns its id."""
        boundary = "bench-boundary"
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{boundary}\r\n'
            f'Content-Disposition: form-data; name="file"; filename="{path.name}"\r\n\r\n'
        ).encode()
        tail = f"\r\n--{boundary}--\r\n".encode()
        host, port = self.daemon.address
        connection = http.client.HTTPConnection(host, port, timeout=600)
        try:
            connection.putrequest("POST", "/v1/files")
            connection.putheader("content-type", f"multipart/form-data; boundary={boundary}")
            connection.putheader("content-length", str(len(head) + path.stat().st_size + len(tail)))
            if self.daemon.key:
                connection.putheader("authorization", f"Bearer {self.daemon.key}")
            connection.endheaders()
            connection.send(head)
            with path.open("rb") as file:
                while piece := file.read(1024 * 1024):
                    connection.send(piece)
            connection.send(tail)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise SystemExit(body.decode())
            return str(json.loads(body)["id"])
        finally:
            connection.close()

    def submit(self, file_id: str, endpoint: str = CHAT) -> str:
        wish = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h"}
        answer = self.daemon.request("POST", "/v1/batches", wish, timeout_s=60)
        if answer.status != 200:
            raise SystemExit(answer.body.decode())
        return str(answer.json()["id"])

    def batch(self, batch_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.daemon.request("GET", f"/v1/batches/{batch_id}", timeout_s=60).json()
        return found

    def until(self, batch_id: str, done: Callable[[dict[str, Any]], bool], timeout_s: float) -> dict[str, Any]:
        """Poll until the batch is ``done``. Ends the bench when it has ended otherwise, or in time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = self.batch(batch_id)
            if done(found):
                return found
            if found["status"] in ENDED:
                raise SystemExit(f"the batch has ended as {found['status']}: {found['errors']}")
            time.sleep(POLL_S)
        raise SystemExit(f"the batch is not done after {timeout_s} s: {self.batch(batch_id)}")

    def run(self, path: Path, endpoint: str = CHAT, timeout_s: float = 900) -> Took:
        """A whole batch; the time from its first line's start until its files are written, by its own history."""
        batch_id = self.submit(self.upload(path), endpoint)
        cpu = cpu_s(self.pid)
        found = self.until(batch_id, lambda found: found["status"] == "completed", timeout_s)
        cpu = cpu_s(self.pid) - cpu
        counts = found["request_counts"]
        if counts["failed"]:
            raise SystemExit(f"lines have failed: {counts}")
        history = self.daemon.request("GET", f"/v1/batches/{batch_id}/events").json()["data"]
        at = {entry["event"]: entry["at"] for entry in history}
        return Took(counts["completed"], at["files_written"] - at["input_accepted"], cpu, found)


class Took:
    """What a batch took: lines, seconds, the daemon's CPU seconds."""

    def __init__(self, lines: int, seconds: float, cpu: float, batch: dict[str, Any]) -> None:
        self.lines, self.seconds, self.cpu, self.batch = lines, seconds, cpu, batch

    @property
    def rate(self) -> float:
        return self.lines / self.seconds

    @property
    def cpu_us(self) -> float:
        return 1e6 * self.cpu / max(1, self.lines)


def write_input(path: Path, bodies: Iterator[dict[str, Any]], endpoint: str = CHAT) -> Path:
    with path.open("w") as file:
        for number, body in enumerate(bodies):
            request = {"custom_id": f"line-{number:07d}", "method": "POST", "url": endpoint, "body": body}
            file.write(json.dumps(request) + "\n")
    return path


def chats(count: int, model: str = "sim", tokens: int = 4, chars: int = 40) -> Iterator[dict[str, Any]]:
    for number in range(count):
        text = (f"question {number} " * (chars // 10))[:chars]
        yield {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens}


def completions(count: int, model: str = "sim", tokens: int = 4, chars: int = 40) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {"model": model, "prompt": (f"text {number} " * (chars // 6))[:chars], "max_tokens": tokens}
