"""The catalogue through the whole application: what is taken, what is answered, and who sees which model."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from tests.support.control_plane import Answer, Browser, advert, key, launch_id, make, one_key_each, sse_events, view
from tests.support.model_desk import LAUNCH, MIB, NOW, OOM, FakeModels, entry, rich
from vllm_bootstrap.api.services import Services
from vllm_bootstrap.models.types import AdapterView, FitReport, GpuNeed, ModelLaunch, ModelProgress

ONE = "/models/org/chat"
GONE = ("model_not_found", "model")


@pytest.fixture
def services() -> Services:
    made = make([
        *one_key_each(), key("narrow", "admin", models=("org/*", "hub/chat")),
        key("watcher", "monitor", models=("other", "hub/*")), key("bob", "upload"),
        key("narrow-upload", "upload", models=("org/*", "hub/*", "sql*")),
    ])  # fmt: skip
    models = desk(made)
    models.put(rich())
    models.put(entry("other", origin="runtime"))
    return made


def desk(services: Services) -> FakeModels:
    assert isinstance(services.models, FakeModels)
    return services.models


def as_(services: Services, token: str) -> Browser:
    return Browser(services, token)


@pytest.fixture
def admin(services: Services) -> Browser:
    return as_(services, "admin")


def names(answer: Answer) -> list[str]:
    assert answer.status == 200, answer.body
    return [row.get("name", row.get("id")) for row in answer.json()["data"]]


def refusal(answer: Answer) -> tuple[str, str | None]:
    return answer.error["code"], answer.error["param"]


# -- looking --------------------------------------------------------------------------------------------------------


def test_the_list_is_by_name_and_says_what_is_wrong_with_the_file(services: Services, admin: Browser) -> None:
    listed = admin.get("/models")
    assert names(listed) == ["org/chat", "other"]
    assert (listed.json()["note"], listed.json()["has_more"]) == (None, False)
    desk(services).note = "line 3: gpu: no such key"
    assert admin.get("/models").json()["note"] == "line 3: gpu: no such key"


def test_the_list_goes_by_state_and_in_pages(services: Services, admin: Browser) -> None:
    desk(services).loaded("other")
    assert names(admin.get("/models?state=loaded")) == ["other"]
    page = admin.get("/models?limit=1").json()
    assert (page["has_more"], page["last_id"]) == (True, "org/chat")
    assert names(admin.get("/models?after=org/chat")) == ["other"]
    assert admin.get("/models?state=happy").status == 400


def test_a_model_is_shown_with_all_that_is_known(services: Services, admin: Browser) -> None:
    running = ModelLaunch(LAUNCH, "bootstrapping", 0)
    desk(services).put(
        rich(), state="loading", why="Room is made for it.", launches=(running,), group_id="g1",
        progress=ModelProgress("weights", 0.5, 3.0, 4.0, "2/4"), load_est_s=7.0, wake_est_s=1.5,
        waiting={"realtime": 2}, batch_lines=9, idle_s=1.23456, outdated=True,
    )  # fmt: skip
    shown = admin.get(ONE).json()
    assert (shown["name"], shown["state"], shown["origin"], shown["why"]) == (
        "org/chat", "loading", "file", "Room is made for it.",
    )  # fmt: skip
    assert shown["launches"] == [{"launch_id": LAUNCH, "state": "bootstrapping", "in_flight": 0}]
    assert (shown["progress"]["phase"], shown["progress"]["eta_s"]) == ("weights", 4.0)
    assert (shown["load_est_s"], shown["wake_est_s"], shown["idle_s"], shown["outdated"]) == (7.0, 1.5, 1.235, True)
    assert (shown["waiting"], shown["batch_lines"], shown["failure"]) == ({"realtime": 2}, 9, None)


def test_an_entry_is_spelled_as_in_the_file_and_tells_no_values_of_its_environment(
    services: Services, admin: Browser
) -> None:
    desk(services).put(replace(rich(), gpus=GpuNeed(2, ("GPU-0", 1), 40 << 30, 0.5), ttl_s=900))
    answer = admin.get(ONE)
    shown = answer.json()["entry"]
    assert shown["gpus"] == {"count": 2, "ids": ["GPU-0", 1], "min_memory": 40 << 30, "share": 0.5}
    assert (shown["ttl"], shown["aliases"], shown["args"]) == (900, ["chat", "gpt-4o"], {"max_model_len": 8192})
    assert shown["adapters"] == {"sql": {"source": "hub/sql-lora", "aliases": ["sql-2"]}}
    assert shown["env"] == ["TOKEN_LIKE"]
    assert b"a value to hide" not in answer.body


def test_a_failure_has_class_hint_and_the_next_try(services: Services, admin: Browser) -> None:
    desk(services).put(entry(), state="failed", trouble=OOM)
    failure = admin.get(ONE).json()["failure"]
    assert (failure["class"], failure["hint"], failure["launch_id"]) == ("oom", "Give it more GPUs.", LAUNCH)
    assert failure["retry_at"] == "2027-01-15T08:00:31Z"


@pytest.mark.parametrize("name", ["org/chat", "org%2Fchat", "chat", "sql-2"])
def test_every_name_of_a_model_leads_to_it(admin: Browser, name: str) -> None:
    assert admin.get(f"/models/{name}").json()["name"] == "org/chat"
    assert admin.get(f"/models/{name}/files").json()["model"] == "org/chat"
    assert admin.post(f"/models/{name}/load").json()["name"] == "org/chat"


def test_download_and_prefetch_are_shown_with_their_model(services: Services, admin: Browser) -> None:
    desk(services).store("other")
    assert admin.post("/models/other/prefetch").status == 202
    assert admin.post(f"{ONE}/download").status == 202
    rows = {row["name"]: row for row in admin.get("/models").json()["data"]}
    assert (rows["other"]["prefetch"]["state"], rows["other"]["download"]) == ("running", None)
    assert rows["org/chat"]["download"]["repo"] == "hub/chat"
    assert admin.get(ONE).json()["download"]["state"] == "running"


# -- keys that are limited to some models ---------------------------------------------------------------------------

EACH = [
    ("GET", ""), ("DELETE", ""), ("POST", "/load"), ("POST", "/unload"), ("POST", "/check"), ("POST", "/download"),
    ("GET", "/download"), ("DELETE", "/download"), ("GET", "/files"), ("DELETE", "/files"), ("POST", "/prefetch"),
    ("GET", "/prefetch"), ("DELETE", "/prefetch"), ("GET", "/adapters"), ("DELETE", "/adapters/x"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "rest"), EACH)
def test_what_a_key_may_not_use_does_not_exist_for_it(services: Services, method: str, rest: str) -> None:
    browser = as_(services, "narrow")
    hidden, absent = (browser.call(method, f"/models/{name}{rest}") for name in ("other", "no-such-one"))
    assert (hidden.status, refusal(hidden)) == (404, GONE)
    assert hidden.body.replace(b"other", b"no-such-one") == absent.body
    assert desk(services).calls == []


def test_lists_hold_only_what_a_key_may_use(services: Services) -> None:
    assert names(as_(services, "narrow").get("/models")) == ["org/chat"]
    assert names(as_(services, "watcher").get("/models")) == ["other"]
    assert names(as_(services, "watcher").get("/v1/models")) == ["other"]


# -- entries that come and go ---------------------------------------------------------------------------------------


def test_an_entry_is_added_as_it_was_sent(services: Services, admin: Browser) -> None:
    sent = {"name": "org/new", "source": "hub/new", "ttl": "15m", "gpus": {"count": 2}}
    made = admin.post("/models", sent)
    assert (made.status, made.headers["location"], made.json()["origin"]) == (201, "/models/org/new", "runtime")
    assert desk(services).calls == [("add", sent, "admin")]
    assert (admin.post("/models", sent).status, refusal(admin.post("/models", sent))) == (409, ("conflict", "name"))


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({}, "name"),
        ({"name": "x"}, "source"),
        ({"name": "", "source": "x"}, "name"),
        ({"name": "org/load", "source": "x"}, "name"),
        ({"name": "a?b", "source": "x"}, "name"),
        ({"name": "x", "source": "y", "gpu": 1}, "gpu"),
    ],
)
def test_entries_that_are_refused(services: Services, admin: Browser, sent: dict[str, Any], param: str) -> None:
    answer = admin.post("/models", sent)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert len(desk(services).views) == 2


def test_a_limited_key_adds_only_what_it_may_use(services: Services) -> None:
    browser = as_(services, "narrow")
    assert browser.post("/models", {"name": "org/new", "source": "hub/secret"}).status == 403
    assert browser.post("/models", {"name": "org/new", "source": "hub/chat"}).status == 201


def test_only_what_was_added_can_be_removed(services: Services, admin: Browser) -> None:
    assert admin.call("DELETE", "/models/other").json()["deleted"] is True
    refused = admin.call("DELETE", ONE)
    assert (refused.status, "file" in refused.error["message"]) == (409, True)
    assert list(desk(services).views) == ["org/chat"]


# -- loading, fit ---------------------------------------------------------------------------------------------------


def test_load_answers_at_once_or_when_it_is_loaded(services: Services, admin: Browser) -> None:
    begun = admin.post(f"{ONE}/load")
    assert (begun.status, begun.json()["state"]) == (202, "loading")
    done = admin.post(f"{ONE}/load?wait=true")
    assert (done.status, done.json()["state"]) == (200, "loaded")
    assert desk(services).calls == [("load", "org/chat", False), ("load", "org/chat", True)]


def test_unload_says_whether_by_force(services: Services, admin: Browser) -> None:
    desk(services).put(entry(pin=True), state="loaded")
    assert admin.post(f"{ONE}/unload").status == 409
    assert admin.post(f"{ONE}/unload?force=true").json()["state"] == "unloaded"


def test_options_in_the_body_of_routes_that_read_none_are_refused(services: Services, admin: Browser) -> None:
    for rest in ("load", "unload", "download", "prefetch"):
        assert admin.post(f"{ONE}/{rest}", {"wait": True}).status == 400
    assert desk(services).calls == []


def test_a_check_tells_what_would_fit(services: Services, admin: Browser) -> None:
    advice = ({"field": "max_model_len", "value": 4096, "message": "max_model_len 4096 would fit."},)
    desk(services).fit = FitReport(fits=False, why="Too long.", kv_bytes=5, suggestions=advice)
    shown = as_(services, "monitor").post(f"{ONE}/check", {"gpu_count": 2, "max_model_len": 9000}).json()
    assert (shown["fits"], shown["why"], shown["kv_bytes"], shown["suggestions"]) == (
        False, "Too long.", 5, list(advice),
    )  # fmt: skip
    assert admin.post(f"{ONE}/check").status == 200
    assert desk(services).calls == [("check", "org/chat", 2, 9000), ("check", "org/chat", None, None)]
    assert refusal(admin.post(f"{ONE}/check", {"gpus": 2})) == ("unknown_field", "gpus")


def test_nothing_is_begun_while_the_daemon_goes(services: Services, admin: Browser) -> None:
    services.phase = "draining"
    for rest in ("/load", "/download", "/prefetch"):
        assert admin.post(f"{ONE}{rest}").status == 503
    assert admin.post("/models", {"name": "x", "source": "y"}).status == 503
    assert desk(services).calls == []


# -- weights --------------------------------------------------------------------------------------------------------


def test_a_download_is_begun_looked_at_and_given_up(admin: Browser) -> None:
    assert (admin.get(f"{ONE}/download").status, admin.call("DELETE", f"{ONE}/download").status) == (404, 404)
    begun = admin.post(f"{ONE}/download").json()
    assert (begun["model"], begun["owner"], begun["revision"], begun["state"]) == (
        "org/chat", "admin", "main", "running",
    )  # fmt: skip
    assert admin.post(f"{ONE}/download").json() == begun
    assert admin.get(f"{ONE}/download").json() == begun
    ended = admin.call("DELETE", f"{ONE}/download").json()
    assert (ended["state"], ended["ended_at"]) == ("cancelled", "2027-01-15T08:00:03Z")


def test_a_download_can_be_followed(services: Services, admin: Browser) -> None:
    admin.post(f"{ONE}/download")

    async def follow() -> Answer:
        desk(services).news = news = asyncio.Queue()
        now = desk(services).fetched["org/chat"]
        news.put_nowait(replace(now, bytes_done=5, bytes_total=10, rate=2.5))
        news.put_nowait(replace(now, state="completed", commit="c0ffee"))
        return await admin.exchange(
            "GET", f"{ONE}/download", headers={"accept": "text/event-stream", "last-event-id": "7"}
        )

    events = sse_events(asyncio.run(follow()).body)
    assert [event.get("id") for event in events] == ["8", "9", "10", None]
    assert events[-1]["event"] == "end"
    bodies = [json.loads(event["data"]) for event in events[:-1]]
    assert [(body["state"], body["bytes_done"], body["bytes_per_s"]) for body in bodies] == [
        ("running", 0, None), ("running", 5, 2.5), ("completed", 0, None),
    ]  # fmt: skip
    assert desk(services).closed == ["org/chat"]


def test_files_are_told_of_and_deleted(services: Services, admin: Browser) -> None:
    nothing = admin.get(f"{ONE}/files").json()
    assert (nothing["bytes"], nothing["complete"], nothing["files"]) == (0, False, [])
    desk(services).store("org/chat")
    shown = admin.get(f"{ONE}/files").json()
    assert (shown["commit"], shown["bytes"], shown["cached_bytes"]) == ("c0ffee", 8 * MIB + 400, 4 * MIB + 400)
    assert shown["files"][1] == {"path": "model.safetensors", "bytes": 8 * MIB, "cached_bytes": 4 * MIB}
    assert admin.call("DELETE", f"{ONE}/files").json()["bytes"] == 8 * MIB + 400
    desk(services).loaded("org/chat")
    assert admin.call("DELETE", f"{ONE}/files").status == 409


def test_files_are_read_ahead(services: Services, admin: Browser) -> None:
    assert (admin.get(f"{ONE}/prefetch").status, admin.post(f"{ONE}/prefetch").status) == (404, 409)
    desk(services).store("org/chat")
    begun = admin.post(f"{ONE}/prefetch")
    assert (begun.status, begun.json()["state"], begun.json()["bytes_done"]) == (202, "running", MIB)
    assert admin.get(f"{ONE}/prefetch").json() == begun.json()
    assert admin.call("DELETE", f"{ONE}/prefetch").json()["state"] == "cancelled"


# -- adapters -------------------------------------------------------------------------------------------------------


def form(*parts: tuple[str, str | None, bytes]) -> tuple[bytes, dict[str, str]]:
    found = b""
    for name, filename, data in parts:
        named = f'; filename="{filename}"' if filename is not None else ""
        found += f'--cut\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + data + b"\r\n"
    return found + b"--cut--\r\n", {"content-type": "multipart/form-data; boundary=cut"}


def bring(
    browser: Browser, name: str | None = "sql-3", content: bytes = b"an archive", query: str = "", base: str = "chat"
) -> Answer:
    file = ("file", "lora.tar.gz", content)
    parts = [file] if name is None else [("name", None, name.encode()), file]
    body, headers = form(*parts)
    return browser.call("POST", f"/models/{base}/adapters{query}", body, headers)


def test_an_adapter_is_taken_in(services: Services) -> None:
    content = b"x" * 300_000
    made = bring(as_(services, "upload"), content=content)
    assert made.status == 201
    shown = made.json()
    assert (shown["name"], shown["base"], shown["owner"], shown["bytes"], shown["rank"]) == (
        "sql-3", "org/chat", "upload", 300_000, 8,
    )  # fmt: skip
    assert "path" not in shown
    assert desk(services).archives == [content]


def test_the_query_may_name_it(services: Services) -> None:
    assert bring(as_(services, "upload"), None, query="?name=q").json()["name"] == "q"
    assert refusal(bring(as_(services, "upload"), "a", query="?name=q")) == ("bad_request", "name")


@pytest.mark.parametrize(
    ("name", "content", "status", "param"),
    [
        (None, b"x", 400, "name"),
        ("../etc", b"x", 400, "name"),
        ("ok", b"no archive", 400, "file"),
        ("ok", b"x" * (4 * MIB + 1), 413, "file"),
        ("taken", b"x", 409, "name"),
    ],
)
def test_what_is_refused_leaves_nothing(
    services: Services, name: str | None, content: bytes, status: int, param: str
) -> None:
    desk(services).uploaded["org/chat", "taken"] = AdapterView("taken", "org/chat", "bob", 1, 8, "/x", NOW)
    refused = bring(as_(services, "upload"), name, content)
    assert (refused.status, refused.error["param"]) == (status, param)
    assert (desk(services).archives, len(desk(services).uploaded)) == ([], 1)


def test_a_form_that_is_cut_or_has_no_file_is_refused(services: Services) -> None:
    whole, headers = form(("name", None, b"sql"), ("file", "lora.zip", b"an archive"))
    for body in (whole[:-10], form(("name", None, b"sql"))[0], form(("file", "x", b"y"), ("name", None, b"sql"))[0]):
        answer = as_(services, "upload").call("POST", "/models/chat/adapters", body, headers)
        assert answer.status == 400
    assert desk(services).uploaded == {}


@pytest.mark.interpreted
def test_a_key_that_ends_meanwhile_brings_nothing(services: Services) -> None:
    services.guard.is_current = lambda _caller: False  # type: ignore[method-assign]
    assert bring(as_(services, "upload")).status == 401
    assert desk(services).uploaded == {}


def test_a_limited_key_brings_adapters_only_for_and_as_what_it_may_use(services: Services) -> None:
    browser = as_(services, "narrow-upload")
    assert bring(browser, "sql-9").status == 201
    assert bring(browser, "evil").status == 403
    assert bring(browser, None, query="?name=evil").status == 403
    assert bring(browser, "sql-9", base="other").status == 404


def test_adapters_belong_to_their_keys_and_monitors_see_all(services: Services) -> None:
    bring(as_(services, "upload"), "mine")
    bring(as_(services, "bob"), "his")
    seen = {token: names(as_(services, token).get("/models/chat/adapters")) for token in ("upload", "monitor", "admin")}
    assert seen == {"upload": ["mine"], "monitor": ["his", "mine"], "admin": ["his", "mine"]}
    browser = as_(services, "upload")
    assert browser.call("DELETE", "/models/chat/adapters/his").status == 404
    assert browser.call("DELETE", "/models/chat/adapters/mine").json()["base"] == "org/chat"
    assert as_(services, "admin").call("DELETE", "/models/org/chat/adapters/his").status == 200
    assert desk(services).uploaded == {}


# -- /v1/models -----------------------------------------------------------------------------------------------------


def test_v1_lists_configured_models_beside_what_other_launches_serve(services: Services, admin: Browser) -> None:
    other = view(1)
    services.supervisor.add(other)  # type: ignore[attr-defined]
    services.gate.found.append(advert(other))  # type: ignore[attr-defined]
    desk(services).put(entry("other"), state="asleep")
    rows = {row["id"]: row for row in admin.get("/v1/models").json()["data"]}
    assert list(rows) == ["chat", "gpt-4o", "model", "org/chat", "other", "sql", "sql-2"]
    assert {name: row["status"] for name, row in rows.items() if name in {"model", "org/chat", "other"}} == {
        "model": "loaded", "org/chat": "unloaded", "other": "asleep",
    }  # fmt: skip
    assert rows["model"]["launch_ids"] == [launch_id(1)]
    assert admin.get("/v1/models/sql").json()["parent"] == "org/chat"
    assert admin.get("/v1/models/org%2Fchat").json()["max_model_len"] == 8192
