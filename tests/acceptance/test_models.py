"""Models by name against a whole daemon with simulated engines: loaded when asked for, shown while they load, changed,
added, put to sleep, put away, and what happens when any of it fails."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.daemon import Answer
from tests.support.model_box import ModelBox, codes
from tests.support.waiting import wait_for

CHAT: Any = [{"role": "user", "content": "one two three"}]
GIB = 1024**3
SLOW = {"boot-delay": 1.2}
# Far more than any single step takes here, far less than what waits for something that never comes.
SOON_S = 10.0
# The keeper looks at once; a hold would be half a minute.
TOLD_WITHIN_S = 3.0


def entry(source: str, count: int | None = 1, **fields: Any) -> dict[str, Any]:
    return {"source": f"org/{source}", **({} if count is None else {"gpus": {"count": count}}), **fields}


# -- who may have what loaded ------------------------------------------------------------------------------------------


def test_off_loads_nothing_by_itself() -> None:
    with ModelBox({"a": entry("a")}, on_demand="off") as box:
        assert codes([box.complete("a"), box.complete("org/other")]) == ["model_not_found"] * 2
        assert box.models()["a"]["state"] == "unloaded"
        assert box.request("POST", "/models/a/load?wait=true").json()["state"] == "loaded"
        box.serves("a")


def test_the_catalogue_and_nothing_else() -> None:
    with ModelBox({"a": entry("a", aliases=["alpha"])}) as box:
        assert codes([box.complete("org/a"), box.complete("b")]) == ["model_not_found"] * 2
        assert box.serves("alpha") == box.serves("a")
        with box.api() as api:
            assert [model.id for model in api.models.list()] == ["a", "alpha"]
        assert [one["labels"]["vllm-bootstrap.model"] for one in box.everything()] == ["a"]


def test_any_name_of_a_repository_and_never_a_path() -> None:
    with ModelBox(on_demand=None) as box:
        box.serves("org/anything")
        box.serves("plain")
        answers = [box.complete(name) for name in ("/etc/passwd", "../x", "./x", "a/b/c", "a b", "http://x/y", "-x")]
        assert codes(answers) == ["model_not_found"] * 7
        assert {one["model"] for one in box.everything()} == {"org/anything", "plain"}


# -- what a client that comes too early sees ---------------------------------------------------------------------------

COLD_KEYS: dict[str, Any] = {
    "now": {"scopes": ["realtime"], "cold_start_hold_s": 0},
    "brief": {"scopes": ["realtime"], "cold_start_hold_s": 0.3},
    "patient": {"scopes": ["realtime"]},
    "only-a": {"scopes": ["realtime"], "models": ["a", "a1", "org/a"]},
    "watch-a": {"scopes": ["monitor", "realtime"], "models": ["a", "a1", "org/a"]},
    "rule-a": {"scopes": ["admin"], "models": ["a", "a1", "org/a"]},
}


@pytest.fixture(scope="module")
def cold() -> Iterator[ModelBox]:
    names = ("a", "b", "c", "d", "e", "f", "g", "shown")
    models = {name: entry(name, extra_args={**SLOW, "tokens-per-second": 0}, aliases=[f"{name}1"]) for name in names}
    models["shown"] |= {"show_loading": True, "extra_args": {"boot-delay": 2.6}}
    with ModelBox(models, keys=COLD_KEYS, devices="mock:8", access_key="k-admin") as box:
        yield box


def seconds(answer: Answer) -> int:
    return int(answer.headers["retry-after"])


def test_x_cold_start_error_is_told_when_to_come_again_and_the_stock_client_does(cold: ModelBox) -> None:
    early = cold.complete("b", key="patient", cold_start="error")
    assert (early.status, early.error["code"]) == (503, "model_loading")
    assert 1 <= seconds(early) <= 60
    assert early.headers.get("x-should-retry") != "false"
    with cold.api("patient", max_retries=8, default_headers={"X-Cold-Start": "error"}) as api:
        assert api.completions.create(model="b", prompt="x y", max_tokens=2).choices[0].text.split() == ["x", "y"]
    assert len(cold.launches_of("b")) == 1
    assert cold.complete("b", key="patient", cold_start="soon").status == 400


def test_each_key_waits_as_long_as_it_says(cold: ModelBox) -> None:
    with ThreadPoolExecutor() as pool:
        asked = [
            pool.submit(cold.complete, "c", key=key, cold_start=word)
            for key, word in (("now", None), ("brief", None), ("now", "wait"), ("brief", "error"), ("patient", None))
        ]
        answers = [one.result() for one in asked]
    assert codes(answers) == ["model_loading", "model_loading", 200, "model_loading", 200]
    assert "was held for" in answers[1].error["message"]
    assert all(1 <= seconds(answer) <= 60 for answer in answers if answer.status == 503)
    assert len(cold.launches_of("c")) == 1, "it is loaded once, however many ask"


def test_a_key_that_is_limited_can_neither_see_nor_load_others(cold: ModelBox) -> None:
    with cold.api("only-a") as api:
        assert [model.id for model in api.models.list()] == ["a", "a1"]
        with pytest.raises(openai.NotFoundError):
            api.models.retrieve("d")
    refused = [cold.complete(name, key="only-a") for name in ("d", "d1", "org/d", "no-such")]
    assert codes(refused) == ["model_not_found"] * 4
    said = {answer.error["message"].replace("'d'", "'no-such'") for answer in (refused[0], refused[3])}
    assert len(said) == 1, "it cannot tell which of them exist"
    watched = cold.request("GET", "/models", key="k-watch-a").json()["data"]
    assert [one["name"] for one in watched] == ["a"]
    for method, path in (("GET", "/models/d"), ("GET", "/models/d1"), ("POST", "/models/d/check")):
        assert cold.request(method, path, key="k-watch-a").error["code"] == "model_not_found"
    for path in ("load", "unload", "prefetch", "download"):
        assert cold.request("POST", f"/models/d/{path}", key="k-rule-a").error["code"] == "model_not_found"
    assert cold.launches_of("d", active=False) == []
    cold.serves("a1", key="only-a")


def test_a_stream_shows_how_the_load_goes_and_readers_do_not_notice(cold: ModelBox) -> None:
    with cold.api("patient") as api:
        with api.chat.completions.with_streaming_response.create(
            model="shown", messages=CHAT, stream=True
        ) as response:  # as its bytes
            text = response.read().decode()
        lines = text.split("\n\n")
        comments = [one for one in lines if one.startswith(":")]
        assert comments, text[:500]
        assert all(one.startswith(": loading shown") for one in comments)
        assert text.endswith("data: [DONE]\n\n")
        asked = {"X-Cold-Start": "progress"}
        told = list(api.completions.create(model="e", prompt="x y", stream=True, max_tokens=2, extra_headers=asked))
        assert "".join(choice.text for event in told for choice in event.choices).split() == ["x", "y"]


def test_a_client_that_leaves_while_it_waits_is_forgotten_and_the_load_goes_on(cold: ModelBox) -> None:
    with cold.api("patient", timeout=0.4) as api, pytest.raises(openai.APITimeoutError):
        api.completions.create(model="f", prompt="x")
    wait_for(lambda: not cold.request("GET", "/requests").json()["data"], 3, what="the request to be forgotten")
    cold.wait_model("f", "loaded")
    assert cold.model("f")["waiting"] == {"realtime": 0, "batch": 0}


# -- the catalogue's file changes --------------------------------------------------------------------------------------


def test_edits_take_effect_while_it_runs() -> None:
    models: dict[str, Any] = {"a": entry("a"), "b": entry("b")}
    with ModelBox(models) as box:
        first = box.serves("a")
        models["a"]["aliases"] = ["alpha"]
        models["c"] = entry("c")
        box.write(models)
        wait_for(lambda: "c" in box.models(), 5, what="the edit")
        box.serves("c")
        second = wait_for(lambda: box.complete("alpha"), 5)
        assert second.status == 200
        assert (second.headers["x-launch-id"] == first) is False, "an engine learns new names when it is started"
        assert box.complete("a").headers["x-launch-id"] == second.headers["x-launch-id"]

        box.catalogue.write_text("models: {a: {source: org/a, gpus: {cuont: 1}}}")
        note = wait_for(lambda: box.request("GET", "/models").json()["note"], 5, what="the note")
        assert "models.a.gpus.cuont" in note
        assert "did you mean count?" in note
        assert set(box.models()) == {"a", "b", "c"}
        assert note.splitlines()[0] in box.log
        box.serves("alpha")

        del models["a"]
        box.write(models)
        wait_for(lambda: box.request("GET", "/models").json()["note"] is None, 5, what="the correction")
        wait_for(lambda: not box.launches_of("a"), SOON_S, what="the removed model to be put away")
        assert box.complete("a").error["code"] == "model_not_found"
        assert box.request("GET", "/models/a").status == 404
        box.catalogue.unlink()
        wait_for(lambda: "there is no such file" in (box.request("GET", "/models").json()["note"] or ""), 5)
        box.serves("b")


def test_an_emptied_file_unloads_nothing_and_what_can_never_be_is_refused() -> None:
    impossible = {"source": "org/u", "gpus": {"count": 1, "share": 0.3}, "args": {"gpu_memory_utilization": 0.9}}
    models = {"a": entry("a"), "big": {"source": "org/big", "gpus": {"count": 1, "min_memory": "900TiB"}}}
    with ModelBox(models) as box:
        first = box.serves("a")
        for text, word in (("", "no model is left"), ("models:\n", "no model is left"), (None, "gpu_share 0.3")):
            if text is None:
                box.write({**models, "u": impossible})
            else:
                box.catalogue.write_text(text)
            wait_for(lambda word=word: word in (box.request("GET", "/models").json()["note"] or ""), 5, what=word)
            assert set(box.models()) == {"a", "big"}
            assert box.serves("a") == first
        box.write(models)
        wait_for(lambda: box.request("GET", "/models").json()["note"] is None, 5, what="the correction")
        assert box.serves("a") == first

        added = box.request("POST", "/models", {"name": "u", **impossible})
        assert (added.status, added.error["param"]) == (400, "args.gpu_memory_utilization")
        launch = {"model": "org/u", "gpu_count": 1, "gpu_share": 0.3, "gpu_memory_utilization": 0.9}
        launched = box.request("POST", "/launch", launch)
        assert (launched.status, launched.error["param"]) == (400, "gpu_memory_utilization")
        assert len(box.everything()) == 1

        refused = box.complete("big")
        assert (refused.status, refused.error["code"]) == (503, "model_failed")
        assert "921600 GiB" in refused.error["message"]

        box.catalogue.write_text("models: {}\n")
        wait_for(lambda: not box.launches_of("a"), SOON_S, what="what was emptied on purpose to be put away")
        assert box.models() == {}


def test_sighup_reads_it_now_and_what_runs_is_not_touched() -> None:
    models: dict[str, Any] = {"a": entry("a"), "b": entry("b")}
    with ModelBox(models) as box:
        a = box.serves("a")
        models["b"]["description"] = "for people"
        box.write(models)
        box.send_signal(signal.SIGHUP)
        wait_for(lambda: box.model("b")["entry"]["description"] == "for people", 3, what="the new description")
        assert box.serves("a") == a


def test_a_changed_entry_waits_for_who_runs_there() -> None:
    models: dict[str, Any] = {"a": entry("a", extra_args={"tokens-per-second": 20})}
    with ModelBox(models) as box, box.api() as api:
        stream = api.completions.create(
            model="a", prompt="x", stream=True, max_tokens=50, extra_body={"ignore_eos": True}
        )
        next(stream)
        models["a"]["args"] = {"max_model_len": 2048}
        box.write(models)
        wait_for(lambda: box.model("a")["outdated"], 5, what="the edit")
        assert sum(len(event.choices) for event in stream) >= 49
        wait_for(lambda: not box.model("a")["outdated"], SOON_S)
        launch = box.status(box.serves("a"))
        assert "--max-model-len=2048" in Path(f"/proc/{launch['pid']}/cmdline").read_text().split("\0")


# -- models are added while it runs ------------------------------------------------------------------------------------


def test_what_was_added_survives_a_kill_until_it_is_removed() -> None:
    with ModelBox({"a": entry("a")}) as box:
        added = box.request("POST", "/models", {"name": "new", **entry("new", aliases=["n"], ttl="1h")})
        assert (added.status, added.json()["origin"]) == (201, "runtime")
        assert box.request("POST", "/models", {"name": "a", **entry("x")}).status == 409
        launch = box.serves("n")
        box.restart()
        assert box.model("new")["entry"]["ttl"] == 3600
        assert box.serves("new") == launch
        assert box.request("DELETE", "/models/a").status == 409
        assert box.request("DELETE", "/models/n").status == 200
        wait_for(lambda: not box.launches_of("new"), SOON_S, what="its engine to be put away")
        box.restart()
        assert set(box.models()) == {"a"}
        assert box.complete("new").status == 404


def test_a_daemon_that_is_killed_while_it_loads_or_unloads_serves_again() -> None:
    loads = {"a": entry("a", extra_args=SLOW), "b": entry("b", extra_args={"slow-stop": 1.0})}
    with ModelBox(loads, devices="mock:1") as box:
        with ThreadPoolExecutor() as pool:
            lost = pool.submit(_completed, box, "a")
            box.wait_model("a", "loading")
            wait_for(lambda: box.launches_of("a"), 5)
            box.restart()
            assert lost.result() is None, "the connection ended with the daemon"
            box.serves("a")
            assert len(box.launches_of("a", active=False)) == 1, "the load went on"

            box.serves("b")
            asked = pool.submit(_completed, box, "a")
            wait_for(lambda: [one["state"] for one in box.launches_of("b")] == ["stopping"], 5, 0.005)
            box.restart()
            assert asked.result() is None
        box.serves("a")
        assert box.launches_of("b") == []
        assert len(box.launches_of("a")) == 1
        box.serves("b")
        box.unload_all()


def _completed(box: ModelBox, name: str) -> Answer | None:
    try:
        return box.complete(name)
    except OSError:
        return None


# -- loads that fail ---------------------------------------------------------------------------------------------------


def test_who_waits_for_a_load_that_fails_is_told_at_once_and_it_is_not_tried_again() -> None:
    models: dict[str, Any] = {
        "gated": entry("gated", extra_args={"die-at-boot": "gated_repository", "boot-delay": 0.8}),
        "shown": entry("shown", show_loading=True, extra_args={"die-at-boot": "bad_flag", "boot-delay": 2.5}),
    }
    with ModelBox(models) as box:
        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(_timed, box, "gated") for _ in range(4)]
            streamed = pool.submit(_streamed, box, "shown")
            answers = [one.result() for one in asked]
            told = streamed.result()
        (launch,) = box.launches_of("gated", active=False)
        failed_at = datetime.fromisoformat(launch["transitions"]["failed"]).timestamp()
        for answer, at in answers:
            assert (answer.status, answer.error["code"]) == (503, "model_failed")
            assert answer.error["failure"]["class"] == "gated_repository"
            assert answer.error["failure"]["launch_id"] == launch["launch_id"]
            assert "HF_TOKEN" in answer.error["failure"]["hint"]
            assert answer.headers["x-should-retry"] == "false"
            assert at - failed_at < TOLD_WITHIN_S
        assert told.code == "model_failed"
        assert told.body["failure"]["class"] == "bad_flag"  # type: ignore[index]
        assert _timed(box, "gated")[0].error["failure"]["class"] == "gated_repository"
        assert len(box.launches_of("gated", active=False)) == 1, "what is permanent is not tried again"
        found = box.model("gated")
        assert (found["state"], found["failure"]["retry_at"]) == ("failed", None)
        with box.api() as api:
            assert "gated" in {model.id for model in api.models.list()}

        models["gated"]["extra_args"] = {}
        box.write(models)
        wait_for(lambda: box.model("gated")["failure"] is None, 5, what="the correction")
        box.serves("gated")


def _timed(box: ModelBox, name: str) -> tuple[Answer, float]:
    answer = box.complete(name)
    return answer, time.time()


def _streamed(box: ModelBox, name: str) -> openai.APIError:
    with box.api() as api, pytest.raises(openai.APIError) as told:
        list(api.completions.create(model=name, prompt="x", stream=True))
    return told.value


def test_a_failure_that_passes_is_tried_again_later_and_by_hand_at_once() -> None:
    knobs = {"die-at-boot": "gpu_out_of_memory"}
    models: dict[str, Any] = {"a": entry("a", extra_args=knobs, restart="never")}
    with ModelBox(models, restart_backoff_s="20", restart_backoff_max_s="40") as box:
        first = box.complete("a")
        assert (first.status, first.error["failure"]["class"]) == (503, "gpu_out_of_memory")
        assert 10 <= seconds(first) <= 20
        assert box.model("a")["failure"]["retry_at"] is not None
        assert box.complete("a").error["code"] == "model_failed"
        assert len(box.launches_of("a", active=False)) == 1
        by_hand = box.request("POST", "/models/a/load?wait=true")
        assert (by_hand.status, by_hand.error["code"]) == (503, "model_failed")
        assert len(box.launches_of("a", active=False)) == 2


# -- sleep -------------------------------------------------------------------------------------------------------------


def sleepers(**options: Any) -> ModelBox:
    knobs = {"mock-memory-bytes": 8 * GIB}
    models = {name: entry(name, sleep=1, extra_args=knobs) for name in ("a", "b")}
    box = ModelBox(models, devices="mock:1", **{"sleep_memory_reserve_bytes": 0, **options})
    box.configure(mock_gpu_file=box.root / "gpus.json")
    return box


def test_asleep_for_anothers_room_and_woken_by_a_request() -> None:
    with sleepers() as box:
        a = box.serves("a")
        b = box.serves("b")
        assert box.model("a")["state"] == "asleep"
        with box.api() as api:
            states = {model.id: model.model_extra["status"] for model in api.models.list() if model.model_extra}
        assert (states["a"], states["b"]) == ("asleep", "loaded")
        assert box.serves("a") == a, "the same engine"
        assert box.model("b")["state"] == "asleep"
        wait_for(lambda: box.model("a")["wake_est_s"] is not None, 5, what="the time it took to wake")
        box.restart()
        assert box.model("b")["state"] == "asleep", box.log[-2000:]
        assert box.serves("b") == b
        assert len(box.everything()) == 2, "nothing was loaded twice"
        used = json.loads((box.root / "gpus.json").read_text())["used"]["GPU-mock-0"]
        assert 8 * GIB <= used < 10 * GIB, "one is awake"
        os.kill(box.status(a)["pid"], signal.SIGKILL)
        wait_for(lambda: box.model("a")["state"] != "asleep", SOON_S, what="the sleeper's death to be noticed")
        assert box.complete("a").status == 200, "it is loaded anew, and its caller only waits for that"
        assert "ended by SIGKILL while it slept" in box.log
        box.unload_all()


def test_what_cannot_sleep_is_unloaded() -> None:
    with sleepers(sleep_memory_reserve_bytes=2**60) as box:
        box.serves("a")
        box.serves("b")
        assert box.model("a")["state"] == "unloaded"
        assert box.launches_of("a") == []
        assert "cannot sleep and is unloaded instead" in box.log


# -- room --------------------------------------------------------------------------------------------------------------


def test_two_share_a_gpu_and_a_third_waits_until_one_goes() -> None:
    models = {
        "chat": {"source": "org/chat", "gpus": {"count": 1, "share": 0.6}},
        "embed": {"source": "org/embed", "gpus": {"count": 1, "share": 0.3}, "pin": True},
        "large": {"source": "org/large", "gpus": {"count": 1, "share": 0.7}},
    }
    with ModelBox(models, devices="mock:1") as box:
        box.serves("chat")
        box.serves("embed")
        assert box.loaded() == {"chat", "embed"}
        (gpu,) = box.request("GET", "/gpus").json()["data"]
        assert sorted(claim["share"] for claim in gpu["claims"]) == [0.3, 0.6]
        box.serves("large")
        assert box.loaded() == {"large", "embed"}, "the pinned one stays"
        models["huge"] = entry("huge")
        box.write(models)
        wait_for(lambda: "huge" in box.models(), 5)
        refused = box.complete("huge", cold_start="error")
        assert (refused.status, refused.error["code"]) == (503, "model_loading")
        why = wait_for(lambda: box.model("huge")["why"], 5)
        assert "'embed' is pinned" in why or "'large'" in why


def test_groups_keep_models_apart_and_the_box_for_themselves() -> None:
    models = {name: entry(name) for name in ("x", "y", "alone", "other")}
    groups = {
        "apart": {"members": ["x", "y"], "together": False},
        "box": {"members": ["alone"], "exclusive": True},
    }
    with ModelBox(models, groups=groups, devices="mock:4") as box:
        for name, together in (
            ("x", {"x"}), ("other", {"x", "other"}), ("y", {"y", "other"}), ("alone", {"alone"}), ("x", {"x"}),
        ):  # fmt: skip
            box.serves(name)
            assert box.loaded() == together, name


def test_a_large_model_is_not_overtaken_for_ever_by_small_ones() -> None:
    """Two small ones, asked for all the time, have both GPUs; the large one needs both at once."""
    models = {"s1": entry("s1"), "s2": entry("s2"), "large": entry("large", 2)}
    with ModelBox(models) as box:
        over = threading.Event()

        def keep_asking(name: str) -> None:
            while not over.is_set():
                box.complete(name)

        threads = [threading.Thread(target=keep_asking, args=(name,)) for name in ("s1", "s2", "s1", "s2")]
        for thread in threads:
            thread.start()
        try:
            wait_for(lambda: box.loaded() == {"s1", "s2"}, SOON_S)
            box.serves("large")
            box.serves("s1")
        finally:
            over.set()
            for thread in threads:
                thread.join()
