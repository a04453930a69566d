"""A batch in a whole daemon whose processes are killed at odd moments, and what must be true of its end.

``python -m tests.support.batch_kills [FIRST [COUNT]]`` runs seeds one after another.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Self

import openai

from tests.support.batches import COMPLETIONS, line
from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_for

LINES, KILLS = 200, 4
KNOBS = {"tokens_per_second": 60, "echo_headers": True}
RESTART = {"policy": "on-failure", "max_attempts": 100, "backoff_s": 0.1}
TAIL_S = 60.0


class Listener:
    """Asks the engines all the time what they have received, past the daemon. ``seen``: prompts by request id, of every
    request for lines, in the order of coming."""

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self.seen: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def look(self) -> None:
        for path in self._runtime_dir.glob("*/tmp/engine.sock"):
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                self._note(_asked(path))

    def _run(self) -> None:
        while not self._over.wait(0.05):
            self.look()

    def _note(self, requests: list[dict[str, Any]]) -> None:
        with self._lock:
            for request in requests:
                if request["target"] == COMPLETIONS:
                    headers = {name.lower(): value for name, value in request["headers"]}
                    prompt = json.loads(request["body"])["prompt"]
                    self.seen[headers["x-request-id"]] = [prompt] if isinstance(prompt, str) else prompt


def _asked(path: Path) -> list[dict[str, Any]]:
    connection = http.client.HTTPConnection("localhost", timeout=2)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.settimeout(2)
        connection.sock.connect(str(path))
        connection.request("GET", "/debug/requests")
        found: list[dict[str, Any]] = json.loads(connection.getresponse().read())["requests"]
        return found
    finally:
        connection.close()


class Night:
    """One batch, some kills. ``killed``: what, in order."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self._finished: list[tuple[int, set[str]]] = []

    def run(self) -> None:
        """Raises ``AssertionError`` when a promise was broken."""
        with (
            DaemonProcess(devices="mock:1", restart_backoff_s="0.1") as daemon,
            Listener(daemon.runtime_dir) as listener,
        ):
            self._daemon, self._listener = daemon, listener
            self._launch = daemon.ready("sim", max_num_seqs=16, knobs=KNOBS, restart=RESTART)["launch_id"]
            self._batch_id = self._submit()
            for _ in range(KILLS):
                time.sleep(self._chance.uniform(0.0, 0.8))
                self._kill(self._chance.choice(["daemon", "daemon", "engine", "shim"]))
            self._check(self._ended())
            assert not re.search(r"vllm_bootstrap/batches|stopped by an error", daemon.log), daemon.log[-3000:]

    def _api(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self._daemon.url}/v1", api_key="none")

    def _submit(self) -> str:
        lines = [line(f"id-{n}", model="sim", prompt=f"w{n}", max_tokens=8, ignore_eos=True) for n in range(LINES)]
        with self._api() as api:
            file = api.files.create(file=("in.jsonl", b"\n".join(lines)), purpose="batch")
            batch = api.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")
            return batch.id

    def _kill(self, what: str) -> None:
        self.killed[what] += 1
        if what == "daemon":
            self._daemon.kill()
            self._listener.look()
            self._finished.append((len(self._listener.seen), self._recorded()))
            self._daemon.start()
            return
        found = self._daemon.status(self._launch)
        pid = found["pid" if what == "engine" else "shim_pid"]
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _recorded(self) -> set[str]:
        """Prompts of lines that have a record on disk now, while nobody writes."""
        folder = self._daemon.state_dir / "batches"
        with tempfile.TemporaryDirectory() as copy:
            for path in folder.glob(f"{self._batch_id}.db*"):
                if not path.name.endswith("-shm") and ".part" not in path.name:
                    shutil.copy(path, copy)
            database = Path(copy) / f"{self._batch_id}.db"
            if not database.exists():
                return set()
            with contextlib.closing(sqlite3.connect(database)) as conn:
                return {f"w{row[0] - 1}" for row in conn.execute("SELECT line FROM records")}

    def _ended(self) -> Any:
        def ended() -> Any:
            with self._api() as api:
                batch = api.batches.retrieve(self._batch_id)
            return batch if batch.status in {"completed", "failed", "expired", "cancelled"} else None

        return wait_for(ended, TAIL_S, 0.1, "end of the batch")

    def _check(self, batch: Any) -> None:
        assert batch.status == "completed", batch
        with self._api() as api:
            good, bad = (
                [] if file_id is None else [json.loads(item) for item in api.files.content(file_id).text.splitlines()]
                for file_id in (batch.output_file_id, batch.error_file_id)
            )
        ids = [record["custom_id"] for record in good + bad]
        assert sorted(ids) == sorted(f"id-{n}" for n in range(LINES)), f"{len(ids)} records, {len(set(ids))} different"
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (LINES, len(good), len(bad))
        for record in good:
            text = record["response"]["body"]["choices"][0]["text"]
            assert text.split()[0] == record["custom_id"].replace("id-", "w"), record
        requests = list(self._listener.seen.values())
        for before, finished in self._finished:
            again = finished & {prompt for prompts in requests[before:] for prompt in prompts}
            assert not again, f"run again although finished: {sorted(again)[:5]}"


def main() -> int:
    first = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 50
    began, failed, killed = time.monotonic(), 0, Counter[str]()
    for seed in range(first, first + count):
        night = Night(seed)
        try:
            night.run()
        except Exception as exc:  # noqa: BLE001 - the next seed is to be tried as well
            failed += 1
            print(f"seed {seed}: {type(exc).__name__}: {str(exc)[-2000:]}", flush=True)
        killed += night.killed
    print(f"{count} seeds, {failed} failed, killed {dict(killed)}, {time.monotonic() - began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
