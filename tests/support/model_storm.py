"""Three models that do not fit at once, asked for by everybody at the same time, while processes are killed.

Everything is chosen by one seeded generator; the timing of processes is not repeatable. What must hold is looked at
from outside: what clients got, who owned which GPU when, and which launch was ended while who ran there.

``python -m tests.support.model_storm [SECONDS [SEED [FILE]]]`` tells figures, and in the file what the daemon logged.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import openai

from tests.support.batches import COMPLETIONS, line
from tests.support.daemon import ENDED
from tests.support.model_box import MODEL_LABEL, ModelBox
from tests.support.waiting import wait_for

MODELS: dict[str, Any] = {
    "ant": {"source": "org/ant", "aliases": ["antony"], "gpus": {"count": 1}},
    "bee": {"source": "org/bee", "gpus": {"count": 1}, "priority": 0},
    "cat": {"source": "org/cat", "gpus": {"count": 2}, "show_loading": True},
}
NAMES = {"ant": "ant", "antony": "ant", "bee": "bee", "cat": "cat"}
KEYS: dict[str, Any] = {
    "ann": {"scopes": ["realtime"]},
    "bob": {"scopes": ["realtime"], "cold_start_hold_s": 2},
    "ivy": {"scopes": ["realtime"], "cold_start_hold_s": 0},
    "bulk": {"scopes": ["batch"]},
}
MIN_LOADED_S, MAX_WAIT_S = 1.0, 2.0
SETTINGS: dict[str, Any] = {
    "model_min_loaded_s": MIN_LOADED_S, "model_max_wait_s": MAX_WAIT_S, "model_batch_turn_s": 2,
    "cold_start_hold_s": 5, "restart_backoff_s": 0.2, "restart_backoff_max_s": 1, "stop_grace_s": 2,
    "activity_rows": 100_000,
}  # fmt: skip
KNOBS = {"tokens-per-second": 40, "boot-delay": 0.3}
PROMISED = frozenset({"model_loading", "model_failed", "overloaded", "launch_not_ready", "draining", "queue_full"})
"""Refusals that say: come again later."""
BROKEN = frozenset({"upstream_error", "upstream_timeout"})
"""An engine that was killed."""
LINES_EACH, TOKENS = 40, 8
CLIENT_TIMEOUT_S, TAIL_S = 45.0, 90.0
# Between a grant and the note of it, and between an answer's last byte and the note of that.
BLUR_S = 0.1


class Outcome(NamedTuple):
    """``kind``: ``whole`` (a full answer), ``error`` (ours, an HTTP status), ``broken`` (an error event in a stream),
    ``cut`` (the connection ended)."""

    model: str
    kind: str
    code: str
    began: float
    ended: float
    problem: str | None = None


@dataclass
class Figures:
    outcomes: Counter[str] = field(default_factory=Counter)
    killed: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    longest_s: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.seconds:.0f} s, killed {dict(self.killed)}, launches {dict(self.launches)}, "
            f"outcomes {dict(sorted(self.outcomes.items()))}, longest {self.longest_s:.1f} s"
        )


class Storm:
    """``run`` raises ``AssertionError`` when something does not hold. ``log``: what the daemon said, at the end."""

    def __init__(self, seed: int, seconds: float) -> None:
        self._chance, self._seconds = random.Random(seed), seconds
        self._seed = seed
        self.figures = Figures()
        self.log = ""
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._outcomes: list[Outcome] = []
        self._downs: list[tuple[float, float]] = []
        self._hit: set[str] = set()
        self._items: list[str] = []
        self._room = (0.0, 0.0)

    def run(self) -> None:
        models = {name: {**entry, "extra_args": KNOBS} for name, entry in MODELS.items()}
        with ModelBox(models, keys=KEYS, port=_free_port(), **SETTINGS) as box:
            self._box = box
            try:
                self._run()
            finally:
                self.log = box.log
        assert not self.figures.problems, "\n".join([str(self.figures), *self.figures.problems[:20]])

    def _run(self) -> None:
        began = time.monotonic()
        batch_id = self._submit()
        with self._traffic():
            self._kill_for(self._seconds)
        self._make_room()
        self._check_batch(self._ended(batch_id))
        self._check_items()
        self.figures.seconds = time.monotonic() - began
        self._check_calm()
        self._check_clients()
        self._check_launches()
        self._check_log()
        self._box.unload_all()

    # -- what is done --------------------------------------------------------------------------------------------

    @contextmanager
    def _traffic(self) -> Iterator[None]:
        work: list[Callable[[], None]] = [self._watch]
        for number, key in enumerate(["ann", "bob", "ivy", "ann", "bulk"]):
            work.append(lambda key=key, number=number: self._client(key, random.Random(self._seed * 100 + number)))
        work.append(lambda: self._bring_items(random.Random(self._seed * 100 + 99)))
        threads = [threading.Thread(target=self._guarded(one), daemon=True) for one in work]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join(CLIENT_TIMEOUT_S + 10)
        assert not any(thread.is_alive() for thread in threads), "a client hangs"

    def _guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as exc:  # noqa: BLE001 - told at the end, like all that went wrong
                self._problem(f"{type(exc).__name__}: {exc}")

        return run

    def _problem(self, text: str) -> None:
        with self._lock:
            self.figures.problems.append(text)

    def _client(self, key: str, chance: random.Random) -> None:
        number = 0
        with self._box.api(key, timeout=CLIENT_TIMEOUT_S) as api:
            while not self._over.is_set():
                number += 1
                self._one(api, key, chance, f"{key}{chance.randrange(10**6)}x{number}")
                self._over.wait(chance.choice([0.0, 0.05, 0.2, 0.5]))

    def _one(self, api: openai.OpenAI, key: str, chance: random.Random, prompt: str) -> None:
        """One request, and what became of it. The prompt is one word, which the engine says again and again."""
        model, stream = chance.choice(list(NAMES)), chance.random() < 0.5
        tokens = chance.choice([1, 8, 40])
        headers = {"X-Cold-Start": word} if (word := chance.choice(["", "", "", "wait", "error", "progress"])) else {}
        began = time.monotonic()
        try:
            problem = (_streamed if stream else _whole)(api, model, prompt, tokens, headers)
            kind, code = "whole", "200"
        except openai.APITimeoutError:
            kind, code, problem = "hang", "timeout", f"no answer within {CLIENT_TIMEOUT_S:g} s"
        except openai.APIConnectionError as exc:
            kind, code, problem = "cut", "connection", repr(exc.__cause__ or exc)
        except openai.APIStatusError as exc:
            kind, code, problem = "error", str(exc.code), _dishonest(exc)
        except openai.APIError as exc:  # an error event in a stream
            kind, code, problem = "broken", str(exc.code), None
        except Exception as exc:  # noqa: BLE001 - httpx in the middle of a stream
            kind, code, problem = "cut", type(exc).__name__, repr(exc)
        outcome = Outcome(NAMES[model], kind, code, began, time.monotonic(), problem)
        if kind == "cut":
            self._over.wait(0.3)
        with self._lock:
            self._outcomes.append(outcome)
            self.figures.outcomes[f"{key} {kind} {code}"] += 1

    def _submit(self) -> str:
        lines = [
            line(f"{model}-{n}", model=model, prompt=f"{model}w{n}", max_tokens=TOKENS, ignore_eos=True)
            for n in range(LINES_EACH)
            for model in MODELS
        ]
        with self._box.api() as api:
            file = api.files.create(file=("in.jsonl", b"\n".join(lines)), purpose="batch")
            return api.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h").id

    def _bring_items(self, chance: random.Random) -> None:
        while not self._over.wait(chance.uniform(0.5, 3)):
            body = {"model": chance.choice(list(NAMES)), "prompt": "item", "max_tokens": 4}
            with contextlib.suppress(OSError):
                answer = self._box.request("POST", "/v1/batch/completions", body)
                if answer.status in {200, 201, 202}:
                    self._items.append(answer.json()["id"])
                elif answer.status != 503:
                    self._problem(f"an item was refused: {answer.body!r}")

    def _make_room(self) -> None:
        """Batch does not put away what realtime has used a moment ago; an operator may, and need not let it stay for
        its time: between two of these batch may have loaded the next."""
        began = time.time()
        for name in MODELS:
            assert self._box.request("POST", f"/models/{name}/unload", timeout_s=60).status == 200
        self._room = (began, time.time())

    def _kill_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        kinds = ["engine", "shim", "daemon"]
        first = self._chance.sample(kinds, len(kinds))
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, self._chance.uniform(0.3, 4.0)))
            self._kill(first.pop() if first else self._chance.choice(["engine", *kinds]))
        wait_for(lambda: set(self._answered()) == set(MODELS), TAIL_S, 0.1, "an answer of each model")

    def _kill(self, what: str) -> None:
        if what == "daemon":
            began = time.monotonic()
            self._box.kill()
            time.sleep(self._chance.choice([0, 0, 0.5]))
            self._box.start()
            self._downs.append((began, time.monotonic()))
            self.figures.killed[what] += 1
            return
        active = [launch for launch in self._box.everything() if launch["state"] not in ENDED]
        if not active:
            return
        launch = self._chance.choice(active)
        pid = launch["pid" if what == "engine" else "shim_pid"]
        with contextlib.suppress(OSError):
            if pid is not None and f"{self._box.state_id}/".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                self._hit.add(launch["launch_id"])
                os.kill(pid, signal.SIGKILL)
                self.figures.killed[what] += 1

    def _answered(self) -> Counter[str]:
        with self._lock:
            return Counter(one.model for one in self._outcomes if one.kind == "whole")

    # -- what must hold ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            with contextlib.suppress(OSError):
                self._look()

    def _look(self) -> None:
        for gpu in self._box.request("GET", "/gpus").json()["data"]:
            owners = {claim["launch_id"]: claim["share"] for claim in gpu["claims"]}
            if sum(owners.values()) > 1:
                self._problem(f"{gpu['uuid']} has several owners: {owners}")
        active = Counter(
            launch["labels"].get(MODEL_LABEL) for launch in self._box.everything() if launch["state"] not in ENDED
        )
        if twice := [name for name, number in active.items() if number > 1]:
            self._problem(f"{twice} have several launches at once")

    def _ended(self, batch_id: str) -> Any:
        def ended() -> Any:
            with self._box.api() as api:
                batch = api.batches.retrieve(batch_id)
            return batch if batch.status in {"completed", "failed", "expired", "cancelled"} else None

        try:
            return wait_for(ended, TAIL_S, 0.2, "end of the batch")
        except AssertionError:
            raise AssertionError(f"{self._box.request('GET', '/models').body!r}\n{self._box.log[-5000:]}") from None

    def _check_batch(self, batch: Any) -> None:
        assert batch.status == "completed", batch
        with self._box.api() as api:
            good, bad = (
                [] if file_id is None else [json.loads(item) for item in api.files.content(file_id).text.splitlines()]
                for file_id in (batch.output_file_id, batch.error_file_id)
            )
        ids = sorted(record["custom_id"] for record in good + bad)
        assert ids == sorted(f"{model}-{n}" for n in range(LINES_EACH) for model in MODELS), f"{len(ids)} records"
        self.figures.outcomes["lines whole"], self.figures.outcomes["lines failed"] = len(good), len(bad)
        for record in good:
            text = record["response"]["body"]["choices"][0]["text"]
            assert text.split()[0] == record["custom_id"].replace("-", "w"), record

    def _check_items(self) -> None:
        for item_id in self._items:
            found = self._box.request("GET", f"/v1/batch/completions/{item_id}?wait=60", timeout_s=70).json()
            assert found["status"] in {"completed", "failed"}, found
            self.figures.outcomes[f"item {found['status']}"] += 1

    def _check_calm(self) -> None:
        """Nobody waits, nobody runs."""

        def calm() -> bool:
            text = self._box.request("GET", "/metrics").body.decode()
            names = "held_requests|in_flight_requests|queue_depth|items_waiting|batch_running_sequences"
            found = re.findall(rf"(?m)^vllm_bootstrap_(?:{names})(?:\{{.*\}})? (\S+)$", text)
            loads = [one["load"] for one in self._box.everything()]
            busy = [sum([*load["in_flight"].values(), *load["queued"].values()]) for load in loads]
            models = self._box.models().values()
            held = [sum([one["in_flight"], one["batch_lines"], *one["waiting"].values()]) for one in models]
            under_way = self._box.request("GET", "/requests").json()["data"]
            return len(found) >= 7 and not any([*map(float, found), *busy, *held, *under_way])

        wait_for(calm, 10, 0.1, "counters to return to zero")

    def _check_clients(self) -> None:
        for one in self._outcomes:
            self.figures.longest_s = max(self.figures.longest_s, one.ended - one.began)
            down = any(one.began < up and began < one.ended for began, up in self._downs)
            if one.kind == "cut" and not down:
                self._problem(f"a connection of {one.model} broke while the daemon was up: {one.problem}")
            elif one.kind != "cut" and one.problem:
                self._problem(f"{one.model}: {one.problem}")
            elif one.kind == "broken" and one.code not in PROMISED | BROKEN:
                self._problem(f"a stream of {one.model} ended with {one.code}")

    def _check_launches(self) -> None:
        """The history of launches: no GPU and no model had two at once, each one that was put away had its time, and
        nobody ran there."""
        launches = self._box.everything()
        assert len(launches) < 1000
        spans: dict[str, list[tuple[float, float, str]]] = {}
        for launch in launches:
            name = launch["labels"][MODEL_LABEL]
            self.figures.launches[name] += 1
            times = {state: _unix(at) for state, at in launch["transitions"].items()}
            end = times.get("stopped", times.get("failed", float("inf")))
            for what in (name, *(gpu["uuid"] for gpu in launch["gpus"])):
                spans.setdefault(what, []).append((_unix(launch["created_at"]), end, launch["launch_id"]))
            if "stopping" in times and "ready" in times and launch["launch_id"] not in self._hit:
                stayed = times["stopping"] - times["ready"]
                by_operator = self._room[0] <= times["stopping"] <= self._room[1]
                if stayed < MIN_LOADED_S - 0.01 and not by_operator:
                    self._problem(f"{launch['launch_id']} of {name} was put away after {stayed:.2f} s")
        for what, found in spans.items():
            found.sort()
            for (_, end, one), (start, _, other) in pairwise(found):
                if start < end - 0.001:
                    self._problem(f"{what}: {other} began {end - start:.3f} s before {one} had ended")
        self._check_in_flight({one["launch_id"]: one for one in launches})

    def _check_in_flight(self, launches: dict[str, dict[str, Any]]) -> None:
        rows = self._rows()
        assert len(rows) > 20, "the history is kept"
        for row in rows:
            launch = launches.get(row["launch_id"] or "")
            if launch is None or launch["launch_id"] in self._hit:
                continue
            where = f"{row['request_id']} ({row['class']}, {row['status']} {row['code']}) at {launch['launch_id']}"
            if row["code"] in BROKEN:
                self._problem(f"{where} was broken, and nobody had killed anything there")
            stopping = launch["transitions"].get("stopping")
            began = _unix(row["started_at"]) + row["queue_ms"] / 1000
            ended = _unix(row["started_at"]) + row["duration_ms"] / 1000
            if stopping is not None and began + BLUR_S < _unix(stopping) < ended - BLUR_S:
                self._problem(f"{where} ran when that was put away")

    def _rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        suffix = ""
        while True:
            page = self._box.request("GET", f"/activity?limit=1000{suffix}").json()
            found += page["data"]
            if not page["has_more"]:
                return found
            suffix = f"&after={page['data'][-1]['id']}"

    def _check_log(self) -> None:
        for told in ("Traceback", "look at the models failed", " CRITICAL "):
            at = self._box.log.find(told)
            if at >= 0:
                self._problem(f"the log says: {self._box.log[max(0, at - 300) : at + 1500]}")


def _whole(api: openai.OpenAI, model: str, prompt: str, tokens: int, headers: dict[str, str]) -> str | None:
    answer = api.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, extra_headers=headers, extra_body={"ignore_eos": True}
    )
    return _wrong(answer.choices[0].text, answer.choices[0].finish_reason, prompt, tokens)


def _streamed(api: openai.OpenAI, model: str, prompt: str, tokens: int, headers: dict[str, str]) -> str | None:
    text, reason = "", None
    events = api.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, stream=True, extra_headers=headers,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    for event in events:
        for choice in event.choices:
            text += choice.text
            reason = choice.finish_reason or reason
    return _wrong(text, reason, prompt, tokens)


def _wrong(text: str, reason: str | None, prompt: str, tokens: int) -> str | None:
    """What is wrong with an answer that claims to be whole."""
    if reason != "length" or text.split() != [prompt] * tokens:
        return f"{len(text.split())} of {tokens} words, ended with {reason}: {text[:80]!r}"
    return None


def _dishonest(error: openai.APIStatusError) -> str | None:
    """What is wrong with a refusal."""
    code, retry = str(error.code), error.response.headers.get("retry-after", "")
    if error.status_code == 502 and code in BROKEN:
        return None
    if error.status_code not in {503, 429} or code not in PROMISED:
        return f"{error.status_code} {code}: {error.message}"
    body = error.body if isinstance(error.body, dict) else {}
    if code == "model_failed" and not body.get("failure", {}).get("class"):
        return f"model_failed without a class: {body}"
    if not (retry.isdigit() and 1 <= int(retry) <= 60):
        return f"{code} with Retry-After {retry!r}"
    return None


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _unix(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 120.0
    storm = Storm(int(sys.argv[2]) if len(sys.argv) > 2 else 1, seconds)
    try:
        storm.run()
    finally:
        print(storm.figures, flush=True)
        if len(sys.argv) > 3:
            Path(sys.argv[3]).write_text(storm.log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
