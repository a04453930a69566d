"""One-model mode: a model named in the environment, behind the routes that a plain engine container has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.daemon import Answer, DaemonProcess
from tests.support.model_box import ModelBox
from tests.support.waiting import wait_for

MODEL = "org/only-one"


def one_model(env: dict[str, str] | None = None, **settings: Any) -> ModelBox:
    return ModelBox(env={"MODEL_ID": MODEL, **(env or {})}, on_demand=None, **settings)


def argv(box: ModelBox) -> set[str]:
    (launch,) = box.launches_of(MODEL)
    return set(Path(f"/proc/{launch['pid']}/cmdline").read_text().split("\0"))


def health(box: DaemonProcess) -> Answer:
    return box.request("GET", "/healthz", key="")


def ready(box: DaemonProcess) -> Answer:
    return wait_for(lambda: (found := health(box)).status == 200 and found, 20, 0.02, "readiness")


def test_it_serves_as_a_plain_engine_container_would() -> None:
    defaults = {"--max-model-len=8192", "--tensor-parallel-size=1"}
    with one_model({"BUILD_SHA": "abc123", "BUILD_TIME": "then"}, access_key="k-of-the-operator") as box:
        early = health(box)
        assert early.status in {200, 503}
        if early.status == 503:
            assert early.error["code"] == "model_loading"
            assert 1 <= int(early.headers["retry-after"]) <= 60
        assert box.request("GET", "/livez", key="").status == 200
        with openai.OpenAI(base_url=f"{box.url}/v1", api_key="k-of-the-operator", max_retries=0, timeout=20) as api:
            answer = api.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "one two"}])
            assert answer.choices[0].message.content == "one two"
            assert [model.id for model in api.models.list()] == [MODEL]
        assert ready(box).status == 200
        for body in ({"prompt": "one two"}, {"prompt": "one two", "stream": True}):
            told = box.request("POST", "/v1/completions", body)
            assert told.status == 200, told.body
            assert b"two" in told.body
        version = box.request("GET", "/version", key="").json()
        assert (version["build_sha"], version["build_time"]) == ("abc123", "then")
        assert defaults <= argv(box)
        assert (box.model(MODEL)["origin"], box.model(MODEL)["entry"]["pin"]) == ("setting", True)
        assert box.request("POST", f"/models/{MODEL}/unload").status == 409
        assert box.request("DELETE", f"/models/{MODEL}").status == 409


def test_health_follows_the_model_through_a_wait_for_room_and_the_death_of_its_engine() -> None:
    box = one_model(restart_backoff_s="1.5")
    gpus = box.root / "gpus.json"
    gpus.write_text(json.dumps({"used": dict.fromkeys(("GPU-mock-0", "GPU-mock-1"), 70 * 1024**3)}))
    box.configure(mock_gpu_file=gpus)
    with box:
        for _ in range(2):
            early = health(box)
            assert (early.status, early.error["code"]) == (503, "model_loading")
            assert 1 <= int(early.headers["retry-after"]) <= 60
            time.sleep(0.3)
        assert box.complete(MODEL, cold_start="error").error["code"] == "model_loading"
        assert box.request("GET", "/livez").status == 200
        gpus.write_text("{}")
        ready(box)

        (launch,) = box.launches_of(MODEL)
        os.kill(launch["pid"], signal.SIGKILL)
        sick = wait_for(lambda: (found := health(box)).status == 503 and found, 10, 0.01, "the death to show")
        while sick.status == 503:
            assert 1 <= int(sick.headers["retry-after"]) <= 60
            last, sick = sick, health(box)
        assert last.error["code"] in {"model_loading", "model_failed"}
        box.serves(MODEL)
        assert [one["attempt"] for one in box.launches_of(MODEL, active=False)] == [2]


def test_the_environment_says_how_it_is_run() -> None:
    said = {
        "DTYPE": "float16", "TENSOR_PARALLEL": "2", "MAX_MODEL_LEN": "4096", "GPU_MEMORY_UTILIZATION": "0.5",
        "MODEL_REVISION": "v2",
    }  # fmt: skip
    with one_model(said) as box:
        ready(box)
        wanted = {"--dtype=float16", "--tensor-parallel-size=2", "--max-model-len=4096", "--revision=v2"}
        found = argv(box)
        assert wanted <= found, found
        assert "--gpu-memory-utilization=0.5" in found
        (launch,) = box.launches_of(MODEL)
        assert [gpu["index"] for gpu in launch["gpus"]] == [0, 1]


def test_beside_a_catalogue_the_one_model_is_the_default_and_stays() -> None:
    with ModelBox({"other": {"source": "org/other"}}, env={"MODEL_ID": MODEL}, devices="mock:1") as box:
        ready(box)
        assert set(box.models()) == {MODEL, "other"}
        refused = box.complete("other", cold_start="error")
        assert (refused.status, refused.error["code"]) == (503, "model_loading")
        wait_for(lambda: "is pinned" in (box.model("other")["why"] or ""), 5, what="the reason")
        assert health(box).status == 200


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"DTYPE": "half"}, "DTYPE"),
        ({"MODEL_ID": "-org/x"}, "MODEL_ID"),
        ({"MODEL_ID": "org/model/load"}, "MODEL_ID"),
    ],
)
def test_what_makes_no_sense_refuses_to_start(env: dict[str, str], told: str) -> None:
    box = ModelBox(env=env)
    try:
        done = subprocess.run(
            box._command, env=box._env, cwd=box.root, capture_output=True, text=True, timeout=30, check=False
        )
    finally:
        box.close()
    assert done.returncode == 2, done.stderr
    assert told in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr
