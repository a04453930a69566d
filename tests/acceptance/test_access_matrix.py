"""Who may do what, walked over raw HTTP against a running daemon: every route of tests/access.json with no key, wrong,
expired and disabled keys, and a key of each scope."""

from __future__ import annotations

import base64
import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import access
from tests.support.access import Route
from tests.support.daemon import Answer, DaemonProcess
from tests.support.waiting import wait_for

UPGRADE = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def token(name: str) -> str:
    return f"token-of-{name}-for-these-tests"


def entry(name: str, *scopes: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "token": token(name), "scopes": list(scopes), **fields}


def key_entries() -> list[dict[str, Any]]:
    return [
        *(entry(scope, scope) for scope in access.SCOPES),
        entry("expired", "admin", expires_at="2020-01-01T00:00:00Z"),
        entry("disabled", "admin", disabled=True),
        entry("watcher-and-reader", "monitor", "logs"),
        entry("elsewhere", "realtime", "monitor", models=["another/*"]),
    ]


class Box:
    """A daemon with named keys, a ready launch, one that may be stopped, and a failed one."""

    def __init__(self, daemon: DaemonProcess, keys: Path) -> None:
        self.daemon, self.keys = daemon, keys
        failing = daemon.launch("failing", knobs={"die_at_boot": "bad_flag"})
        self.failed = daemon.wait_state(failing, "failed")
        self.ready = daemon.ready("sim")["launch_id"]
        self.victim = daemon.ready("victim")["launch_id"]

    def ask(self, route: Route, name: str | None, **headers: str) -> Answer:
        """One request under the key of that name."""
        ends = route.path.startswith(("/stop/", "/launches/"))
        target = route.target(self.victim if ends else self.ready)
        body, content_type = route.request_body()
        sent = {} if content_type is None else {"content-type": content_type}
        if route.entry.get("websocket"):
            target, sent = f"{target}?model=no-such-model", UPGRADE
        used = token(name) if name else ""
        return self.daemon.request(route.method, target, body or None, {**sent, **headers}, key=used)

    def write_keys(self, entries: list[dict[str, Any]]) -> None:
        fresh = self.keys.with_suffix(".new")
        fresh.write_text(json.dumps({"keys": entries}))
        fresh.replace(self.keys)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps({"keys": key_entries()}))
    keys.chmod(0o600)
    with DaemonProcess(auth_keys_file=keys, key=token("admin")) as daemon:
        yield Box(daemon, keys)


def is_let_in(answer: Answer) -> bool:
    """Whether the route itself answered, for better or worse."""
    return answer.status not in {401, 403} and answer.status < 500


def by_name(route: Route) -> str:
    return route.name


@pytest.mark.parametrize("route", access.routes(), ids=by_name)
def test_no_valid_key_gets_in_and_all_get_the_same_answer(box: Box, route: Route) -> None:
    answers = [box.ask(route, name) for name in (None, "wrong", "expired", "disabled")]
    if route.access is None:
        assert {is_let_in(answer) for answer in answers} == {True}
        return
    assert {answer.status for answer in answers} == {401}
    assert len({answer.body for answer in answers}) == 1
    assert {answer.headers["www-authenticate"] for answer in answers} == {'Basic realm="vllm-bootstrap"'}
    assert answers[0].error["code"] == "invalid_api_key"


@pytest.mark.parametrize("route", access.routes(), ids=by_name)
def test_a_key_opens_what_its_scope_allows_and_nothing_else(box: Box, route: Route) -> None:
    for scope in access.SCOPES:
        answer = box.ask(route, scope)
        if route.access is None or scope in route.access:
            assert is_let_in(answer), (scope, answer.body)
        else:
            assert (answer.status, answer.error["code"]) == (403, "insufficient_scope"), (scope, answer.body)
            assert set(answer.error["needed_scopes"]) <= route.access


@pytest.mark.parametrize("route", access.nowhere(), ids=by_name)
def test_what_no_route_claims_is_told_only_to_those_with_a_key(box: Box, route: Route) -> None:
    assert box.ask(route, None).status == 401
    assert box.ask(route, "wrong").status == 401
    for scope in access.SCOPES:
        assert box.ask(route, scope).status in ({204, 405} if route.method == "OPTIONS" else {404, 405}), scope


def test_the_description_and_the_table_name_the_same_routes(box: Box) -> None:
    paths = box.daemon.request("GET", "/openapi.json").json()["paths"]
    described = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    expected = {(r.method, r.path) for r in access.routes() if r.entry.get("in_schema", True)}
    proxy = "/proxy/{launch_id}/{upstream_path}"
    assert described - {("GET", proxy), ("POST", proxy)} == {
        one for one in expected if not one[1].startswith("/proxy/")
    }


@pytest.mark.parametrize("route", access.details(), ids=by_name)
def test_details_that_need_more_than_their_route(box: Box, route: Route) -> None:
    lines = box.failed["failure"]["lines"]
    assert lines
    target = route.target(box.failed["launch_id"]) + ("" if "{" in route.path else "?all=true")
    for name, scopes in (("monitor", {"monitor"}), ("watcher-and-reader", {"monitor", "logs"}), ("admin", {"admin"})):
        answer = box.daemon.request(route.method, target, key=token(name))
        assert answer.status == 200
        shown = json.loads(answer.body)
        launches = shown.get("data", [shown])
        failure = next(one for one in launches if one["launch_id"] == box.failed["launch_id"])["failure"]
        assert route.access is not None
        assert failure["lines"] == (lines if scopes & route.access else None)
        assert failure["class"] == "bad_flag"


def test_every_way_to_send_a_key_opens_the_same_door(box: Box) -> None:
    key = token("monitor")
    basic = "Basic " + base64.b64encode(f"anybody:{key}".encode()).decode()
    same = [{"authorization": f"Bearer {key}"}, {"authorization": basic}, {"x-api-key": key},
            {"x-api-key": key, "authorization": basic}]  # fmt: skip
    for headers in same:
        assert box.daemon.request("GET", "/launches", headers=headers, key="").status == 200
    for path in ("/launches", "/v1/models", f"/proxy/{box.ready}/metrics"):
        differing = {"x-api-key": key, "authorization": f"Bearer {token('admin')}"}
        assert box.daemon.request("GET", path, headers=differing, key="").status == 401
        assert box.daemon.request("GET", f"{path}?key={key}", key="").status == 401


def test_strange_keys_are_wrong_keys(box: Box) -> None:
    look_alike = token("admin").replace("o", "\N{CYRILLIC SMALL LETTER O}").encode()
    for value in (b"' OR 1=1 --", look_alike, b"\xff\xfe", b"x" * 50_000, token("admin").encode() + b"x"):
        sent = b"GET /launches HTTP/1.1\r\nHost: localhost\r\nx-api-key: " + value + b"\r\nConnection: close\r\n\r\n"
        assert box.daemon.raw(sent).startswith(b"HTTP/1.1 401 "), value[:20]
    huge = b"GET /launches HTTP/1.1\r\nHost: localhost\r\nx-api-key: " + b"x" * 1_000_000 + b"\r\n\r\n"
    with contextlib.suppress(ConnectionError):  # cut off while sending, the answer may get lost
        assert box.daemon.raw(huge).startswith(b"HTTP/1.1 431 ")
    assert box.daemon.request("GET", "/livez").status == 200


FOREIGN = [{"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}]


@pytest.mark.parametrize("headers", FOREIGN)
def test_pages_of_other_sites_can_do_nothing(box: Box, headers: dict[str, str]) -> None:
    for route in access.routes():
        if route.method not in {"GET", "HEAD", "OPTIONS"} or route.entry.get("websocket"):
            answer = box.ask(route, "admin", **headers)
            assert (answer.status, answer.error["code"]) == (403, "forbidden_origin"), route.name


def test_a_key_for_other_models_sees_and_uses_none_of_these(box: Box) -> None:
    key = token("elsewhere")
    assert box.daemon.request("GET", "/v1/models", key=key).json()["data"] == []
    chat = {"model": "sim", "messages": [{"role": "user", "content": "hi"}]}
    for path in ("/v1/chat/completions", f"/proxy/{box.ready}/v1/chat/completions"):
        assert box.daemon.request("POST", path, chat, key=key).status in {403, 404}, path
        assert box.daemon.request("POST", path, chat, key=token("realtime")).status == 200, path


def test_keys_stand_in_no_log_argv_or_environment(box: Box) -> None:
    status = box.daemon.status(box.ready)
    seen = [box.daemon.log, box.daemon.request("GET", f"/logs/{box.ready}").body.decode()]
    for pid in (status["pid"], status["shim_pid"]):
        seen += [Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace") for name in ("cmdline", "environ")]
    for name in ("admin", "monitor", "realtime"):
        assert not [text for text in seen if token(name) in text]


def test_a_revoked_key_stops_and_a_broken_edit_changes_nothing(box: Box) -> None:
    def monitor_status() -> int:
        return box.daemon.request("GET", "/launches", key=token("monitor")).status

    try:
        box.write_keys([entry for entry in key_entries() if entry["name"] != "monitor"])
        wait_for(lambda: monitor_status() == 401, 5, 0.1, "the file to be looked at")
        box.write_keys(key_entries())
        box.daemon.send_signal(signal.SIGHUP)
        wait_for(lambda: monitor_status() == 200, 5, 0.02, "SIGHUP to be heard")
        box.keys.write_text("{")
        box.daemon.send_signal(signal.SIGHUP)
        wait_for(lambda: "stay in force" in box.daemon.log, 5, 0.05, "the complaint")
        assert monitor_status() == 200
        metrics = box.daemon.request("GET", "/metrics", key=token("monitor")).body.decode()
        assert "vllm_bootstrap_key_file_broken 1.0" in metrics
    finally:
        box.write_keys(key_entries())


def test_what_happened_here_was_counted(box: Box) -> None:
    chat = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert box.daemon.request("POST", "/v1/chat/completions", chat, key=token("batch")).status == 200
    text = box.daemon.request("GET", "/metrics").body.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for name in (
        'launch_transitions_total{state="ready"}',
        'launch_failures_total{failure="bad_flag"}',
        "launch_start_seconds_count",
        'proxy_requests_total{class="batch",code="200"}',
        'queue_wait_seconds_count{class="batch"}',
        'http_requests_total{code="201",method="POST",route="/launch"}',
    ):
        assert float(values[f"vllm_bootstrap_{name}"]) >= 1, name
