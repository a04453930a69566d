"""The catalogue on a real vLLM with one place for an engine: two tiny models by name with the stock client, a batch of
both, adapters, kills during loads, a download over a bad line, and the one-model mode.

A start costs half a minute on two cores, so one daemon lives through the file and the tests are in the order of
its life. Later ones need the earlier ones.
"""

from __future__ import annotations

import io
import json
import signal
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.support import hub as stand_in
from tests.support import orphans
from tests.support.daemon import DaemonProcess
from tests.support.hub import Hub
from tests.support.waiting import wait_for
from tests.vllm.box import engine_core_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

LOAD_S = 150
REPO, WEIGHTS = "org/tiny", "model.safetensors"
CHAT: Any = [{"role": "user", "content": "Tell me something."}]
EVERYTHING = ["admin", "monitor", "logs", "realtime", "batch", "upload"]
KEYS = {"keys": [
    {"name": "root", "token": "k-root", "scopes": EVERYTHING, "cold_start_hold_s": LOAD_S},
    {"name": "hasty", "token": "k-hasty", "scopes": ["realtime"], "cold_start_hold_s": 1},
]}  # fmt: skip
MODELS = ("one", "two", "fetched")
LINES = 40


@dataclass
class Shop:
    """A daemon with the catalogue. ``said``: the first answer of each name, which all later ones must repeat."""

    daemon: DaemonProcess
    hub: Hub
    said: dict[str, str] = field(default_factory=dict)
    at_once: set[tuple[str, ...]] = field(default_factory=set)

    def client(self, key: str = "k-root", **options: Any) -> openai.OpenAI:
        wanted = {"max_retries": 0, "timeout": LOAD_S, **options}
        return openai.OpenAI(base_url=f"{self.daemon.url}/v1", api_key=key, **wanted)

    def text(self, name: str, key: str = "k-root", **options: Any) -> str:
        """What the model says to always the same prompt; the same as ever."""
        with self.client(key, **options) as client:
            answer = client.completions.create(model=name, prompt="Tell me", max_tokens=8, temperature=0)
        assert answer.model == ("one" if name == "uno" else name)  # vLLM answers an alias by the first name
        assert self.said.setdefault(name, answer.choices[0].text) == answer.choices[0].text
        return answer.choices[0].text

    def ask(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        answer = self.daemon.request(method, path, body, timeout_s=LOAD_S)
        assert answer.status == status, answer.body
        return answer.json()

    def model(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/models/{name}")
        return found

    def states(self) -> dict[str, str]:
        return {name: self.model(name)["state"] for name in MODELS}

    def launches(self) -> list[dict[str, Any]]:
        """Of all models, those that have ended included, the oldest first."""
        return list(reversed(self.ask("GET", "/launches?all=true")["data"]))

    def running(self) -> dict[str, Any]:
        """The launch that has not ended; there is one."""
        (launch,) = self.ask("GET", "/launches")["data"]
        return self.daemon.status(launch["launch_id"])

    def look_at_processes(self) -> None:
        """Notes whose processes there are, from the kernel's view."""
        marks = set()
        for pid in orphans.marked(self.daemon.state_id):
            try:
                marks.add(psutil.Process(pid).environ()["VBS_LAUNCH"].split("/")[1])
            except (psutil.Error, KeyError):
                continue
        self.at_once.add(tuple(sorted(marks)))


def make(engine_python: Path, script: str, *args: Path | int) -> Path:
    command = [str(engine_python), str(Path(__file__).with_name(script)), *map(str, args)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return Path(str(args[0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="module")
def other_model(engine_python: Path, folder: Path) -> Path:
    return make(engine_python, "make_tiny_model.py", folder / "two", 8)


@pytest.fixture(scope="module")
def adapter(engine_python: Path, folder: Path) -> Path:
    return make(engine_python, "make_tiny_adapter.py", folder / "support", 8)


@pytest.fixture(scope="module")
def archive(engine_python: Path, folder: Path) -> bytes:
    """Another adapter, as it is uploaded."""
    made = make(engine_python, "make_tiny_adapter.py", folder / "brought", 4)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for path in sorted(made.iterdir()):
            tar.add(path, path.name)
    return packed.getvalue()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with stand_in.running() as found:
        yield found


@pytest.fixture(scope="module")
def shop(engine_python: Path, tiny_model: Path, other_model: Path, adapter: Path, hub: Hub) -> Iterator[Shop]:
    adapters = {"support": {"source": str(adapter)}}
    models = {
        "one": {"source": str(tiny_model), "aliases": ["uno"], "adapters": adapters},
        "two": {"source": str(other_model), "args": {"seed": 1}},
        "fetched": {"source": REPO},
    }
    catalogue = {"defaults": {"args": {"max_model_len": 512}}, "models": models}
    daemon = DaemonProcess(
        key="k-root", env=hub.env(), devices="cpu", engine_python=engine_python, stop_grace_s=7, probe_timeout_s=5,
        model_min_loaded_s=0.5,
    )  # fmt: skip
    (daemon.root / "keys.json").write_text(json.dumps(KEYS))
    (daemon.root / "models.yaml").write_text(json.dumps(catalogue))
    daemon.configure(auth_keys_file=daemon.root / "keys.json", models_file=daemon.root / "models.yaml")
    over = threading.Event()
    with daemon:
        found = Shop(daemon, hub)

        def look() -> None:
            while not over.wait(0.3):
                found.look_at_processes()

        watching = threading.Thread(target=look)
        watching.start()
        try:
            yield found
        finally:
            over.set()
            watching.join()


# -- both models in one batch ------------------------------------------------------------------------------------------


def line(number: int) -> str:
    body = {"model": MODELS[number % 2], "prompt": "Tell me", "max_tokens": 8, "temperature": 0}
    return json.dumps({"custom_id": f"{number}", "method": "POST", "url": "/v1/completions", "body": body})


def test_a_batch_of_two_models_has_each_loaded_once(shop: Shop) -> None:
    with shop.client() as client:
        lines = "\n".join(line(number) for number in range(LINES)).encode()
        file = client.files.create(file=("both.jsonl", lines), purpose="batch")
        batch_id = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h").id
        wait_for(lambda: client.batches.retrieve(batch_id).status not in {"validating", "in_progress"}, 2 * LOAD_S, 0.5)
        wait_for(lambda: client.batches.retrieve(batch_id).status != "finalizing")
        batch = client.batches.retrieve(batch_id)
        assert (batch.status, batch.error_file_id) == ("completed", None)
        records = [json.loads(text) for text in client.files.content(str(batch.output_file_id)).text.splitlines()]
    assert sorted(int(record["custom_id"]) for record in records) == list(range(LINES))
    for record in records:
        name = MODELS[int(record["custom_id"]) % 2]
        answer = record["response"]["body"]
        assert answer["model"] == name
        assert shop.said.setdefault(name, answer["choices"][0]["text"]) == answer["choices"][0]["text"]
    assert shop.said["one"] != shop.said["two"]
    assert [launch["served_model_name"] for launch in shop.launches()] == ["one", "two"]
    assert shop.states() == {"one": "unloaded", "two": "loaded", "fetched": "unloaded"}


# -- by name, with adapters --------------------------------------------------------------------------------------------


def test_an_uploaded_adapter_is_a_model(shop: Shop, archive: bytes) -> None:
    answer = httpx.post(
        f"{shop.daemon.url}/models/one/adapters",
        headers={"authorization": "Bearer k-root"},
        data={"name": "brought"},
        files={"file": ("brought.tar.gz", archive)},
    )
    assert answer.status_code == 201, answer.text
    with shop.client() as client:
        listed = {model.id: (model.model_extra or {}).get("parent") for model in client.models.list()}
    assert listed == {"one": None, "uno": None, "support": "one", "brought": "one", "two": None, "fetched": None}


def test_who_does_not_wait_is_told_when_and_the_stock_client_comes_back_by_itself(shop: Shop) -> None:
    took = shop.model("one")["load_est_s"]
    with pytest.raises(openai.InternalServerError) as refused:
        shop.text("one", "k-hasty")
    assert (refused.value.status_code, refused.value.code) == (503, "model_loading")
    assert took / 2 <= int(refused.value.response.headers["retry-after"]) <= took + 1
    shop.text("one", "k-hasty", max_retries=5)
    assert shop.states() == {"one": "loaded", "two": "unloaded", "fetched": "unloaded"}


def test_chat_and_completion_whole_and_streamed(shop: Shop) -> None:
    with shop.client() as client:
        whole = client.chat.completions.create(model="one", messages=CHAT, max_tokens=8, temperature=0)
        stream = client.chat.completions.create(model="one", messages=CHAT, max_tokens=8, temperature=0, stream=True)
        events = list(stream)
        assert {event.model for event in events} == {whole.model} == {"one"}
        said = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
        assert said == whole.choices[0].message.content
        texts = client.completions.create(model="one", prompt="Tell me", max_tokens=8, temperature=0, stream=True)
        assert "".join(event.choices[0].text for event in texts if event.choices) == shop.said["one"]


def test_an_alias_and_adapters_answer_on_the_same_engine(shop: Shop) -> None:
    said = {name: shop.text(name) for name in ("one", "uno", "support", "brought")}
    assert said["one"] == said["uno"]
    assert len(set(said.values())) == 3
    assert shop.states()["one"] == "loaded"
    assert shop.ask("DELETE", "/models/one/adapters/brought", status=409)["error"]["code"] == "conflict"


# -- a load that is killed ---------------------------------------------------------------------------------------------


def core_pid(shop: Shop) -> int | None:
    """The engine's main process, once it has begun to load the model in another one."""
    pid = shop.running()["pid"] if shop.states()["two"] == "loading" and shop.states()["one"] == "unloaded" else None
    if pid is None:
        return None
    try:
        engine_core_of(pid)
    except (AssertionError, psutil.Error):
        return None
    return int(pid)


def test_kill_9_during_the_load_is_told_to_who_waits_and_the_next_request_loads_it(shop: Shop) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(shop.text, "two") for _ in range(3)]
        pid = wait_for(lambda: core_pid(shop), 60, 0.1)
        assert pid is not None
        psutil.Process(pid).send_signal(signal.SIGKILL)
        for request in waiting:
            error = request.exception(timeout=20)
            assert isinstance(error, openai.InternalServerError)
            assert (error.status_code, error.code) == (503, "model_failed")
            assert error.body["failure"]["class"] == "killed_by_signal"  # type: ignore[index]
    shop.text("two", max_retries=3)
    assert shop.model("two")["failure"] is None


# -- a model that is fetched first -------------------------------------------------------------------------------------


def test_a_model_is_fetched_over_a_bad_line_and_served_without_network(shop: Shop, other_model: Path) -> None:
    files = {path.name: path.read_bytes() for path in other_model.iterdir() if path.name[0] != "."}
    size = len(files[WEIGHTS])
    commit = shop.hub.repo(REPO, files).branches["main"]
    shop.hub.cuts = [size // 3, size // 3, 1000]
    shop.ask("POST", "/models/fetched/download", status=202)
    wait_for(lambda: shop.ask("GET", "/models/fetched/download")["state"] not in {"queued", "running"}, 60, 0.2)
    download = shop.ask("GET", "/models/fetched/download")
    assert (download["state"], download["commit"]) == ("completed", commit)
    assert any(asked.start for asked in shop.hub.asked)  # gone on with, not begun anew
    on_disk = shop.ask("GET", "/models/fetched/files")
    assert (on_disk["complete"], on_disk["commit"]) == (True, commit)
    shop.hub.repos[REPO].push({"config.json": b"{}"})  # what the branch is now could not be served
    shop.ask("POST", "/models/fetched/prefetch", status=202)
    wait_for(lambda: shop.ask("GET", "/models/fetched/prefetch")["state"] != "running")
    prefetch = shop.ask("GET", "/models/fetched/prefetch")
    assert (prefetch["state"], prefetch["bytes_done"]) == ("completed", prefetch["bytes_total"])
    shop.hub.asked.clear()
    assert shop.text("fetched") == shop.said["two"]
    assert shop.hub.asked == []
    assert f"--revision={commit}" in psutil.Process(shop.running()["pid"]).cmdline()


# -- the end -----------------------------------------------------------------------------------------------------------


def test_there_never_were_two_engines_and_at_the_end_nothing_is_left(shop: Shop) -> None:
    for name in MODELS:
        shop.ask("POST", f"/models/{name}/unload")
    assert set(shop.states().values()) == {"unloaded"}
    shop.daemon.assert_no_leftovers(timeout_s=0)
    names = [launch["served_model_name"] for launch in shop.launches()]
    assert names == ["one", "two", "one", "two", "fetched"]
    assert all(len(launches) <= 1 for launches in shop.at_once), shop.at_once
    assert {launch for launches in shop.at_once for launch in launches} == {
        launch["launch_id"] for launch in shop.launches()
    }


# -- one model ---------------------------------------------------------------------------------------------------------


def test_one_model_mode_serves_as_a_plain_engine_container_would(engine_python: Path, tiny_model: Path) -> None:
    env = {"MODEL_ID": str(tiny_model), "MAX_MODEL_LEN": "512", "DTYPE": "float32", "HF_HUB_OFFLINE": "1"}
    settings: Any = {"devices": "cpu", "engine_python": engine_python, "stop_grace_s": 7, "probe_timeout_s": 5}

    def health() -> int:
        return daemon.request("GET", "/healthz").status

    def text() -> str:
        body = {"prompt": "Tell me", "max_tokens": 8, "temperature": 0}
        answer = daemon.request("POST", "/v1/completions", body, timeout_s=60)
        assert answer.status == 200, answer.body
        assert answer.json()["model"] == str(tiny_model)
        return str(answer.json()["choices"][0]["text"])

    with DaemonProcess(env=env, **settings) as daemon:
        assert (health(), daemon.request("GET", "/livez").status) == (503, 200)
        assert daemon.request("GET", "/version").json()["build_sha"] == "dev"
        wait_for(lambda: health() == 200, LOAD_S, 0.2)
        first = text()
        (listed,) = daemon.request("GET", "/v1/models").json()["data"]
        assert (listed["id"], listed["max_model_len"]) == (str(tiny_model), 512)
        (launch,) = daemon.request("GET", "/launches").json()["data"]
        status = daemon.status(launch["launch_id"])
        assert {"--dtype=float32", "--max-model-len=512"} <= set(psutil.Process(status["pid"]).cmdline())
        psutil.Process(status["pid"]).send_signal(signal.SIGKILL)
        wait_for(lambda: health() == 503)
        wait_for(lambda: health() == 200, LOAD_S, 0.2)
        assert text() == first
        assert daemon.status(launch["launch_id"])["attempt"] == 2
        assert daemon.stop() == 0
        daemon.assert_no_leftovers(timeout_s=0)
