"""The operator's engines file: what it may say, and a mistake in it named so that it can be found."""

import json
from pathlib import Path

import pytest

from vllm_bootstrap.engines import routes
from vllm_bootstrap.engines.command import CommandDefinition
from vllm_bootstrap.engines.engines_file import EnginesFileError, parse_engines, read_engines_file
from vllm_bootstrap.engines.external import ExternalDefinition
from vllm_bootstrap.serving import Endpoint, EngineRoute

EXAMPLE = Path(__file__).resolve().parents[3] / "config/example.engines.json"
COMMAND = {"kind": "command", "argv": ["serve", "--port={port}", "{model}"], "slots": 4}
EXTERNAL = {"kind": "external", "url": "http://127.0.0.1:8001", "served_names": ["m"], "slots": 32}


def one(**changes):
    entry = {**(EXTERNAL if changes.pop("base", None) == "external" else COMMAND), **changes}
    return parse_engines({"engines": {"x": {k: v for k, v in entry.items() if v is not ...}}})["x"]


def mistake(**changes):
    with pytest.raises(EnginesFileError) as caught:
        one(**changes)
    assert str(caught.value).startswith("engine 'x': ")
    return str(caught.value)


def test_the_example_is_valid():
    engines = read_engines_file(EXAMPLE)
    assert engines.keys() == {"llama", "sglang", "lab", "other-machine"}
    llama, lab, other = engines["llama"], engines["lab"], engines["other-machine"]
    assert isinstance(llama, CommandDefinition)
    assert llama.key
    assert isinstance(lab, ExternalDefinition)
    assert lab.endpoint == Endpoint(host="127.0.0.1", port=8001)
    assert other.endpoint == Endpoint(host="gpu-2.internal", port=8443, tls=True, base_path="/engine")
    assert other.priority_header


def test_defaults_of_a_command():
    made = one()
    assert made.argv == ("serve", "--port={port}", "{model}")
    assert (made.slots, made.health, made.routes) == (4, "/health", routes.COMMON)
    assert (made.has_metrics, made.key, made.env, made.env_allowed) == (False, False, {}, frozenset())
    assert made.uses == {"port", "model"}


def test_a_command_in_full():
    made = one(
        argv=["serve", "--listen", "{uds}", ["--ctx", "{max_model_len}"]],
        env={"KEY": "{internal_key}", "TOKEN": "{hf_token}"},
        env_allowed=["NCCL_DEBUG", "MY_TUNING"],
        health="/ready",
        has_metrics=True,
        routes=["POST /v1/completions", {"method": "GET", "path": "/slots", "scopes": ["monitor", "admin"]}],
    )
    assert made.argv[3] == ("--ctx", "{max_model_len}")
    assert made.key
    assert made.env_allowed == {"NCCL_DEBUG", "MY_TUNING"}
    assert made.routes[1] == EngineRoute("GET", "/slots", frozenset({"monitor", "admin"}))


def test_how_long_it_keeps_idle_connections():
    assert one().keep_alive_s is None
    assert one(keep_alive_s=65).keep_alive_s == 65
    at = Endpoint(host="h", port=80, keep_alive_s=0.5)
    assert one(base="external", url="http://h", keep_alive_s=0.5).endpoint == at
    assert one(base="external", url=..., uds="/e", keep_alive_s=5).endpoint == Endpoint(uds="/e", keep_alive_s=5)


def test_an_external_engine_on_a_socket():
    made = one(
        base="external", url=..., uds="/run/engine.sock", priority="field", allows_http_media=True, credential_env="KEY"
    )
    assert made.endpoint == Endpoint(uds="/run/engine.sock")
    assert made.priority_field
    assert not made.refuses_http_media
    assert made.credential_env == "KEY"


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://h", Endpoint(host="h", port=80)),
        ("https://h/", Endpoint(host="h", port=443, tls=True)),
        ("http://[::1]:9/a/b/", Endpoint(host="::1", port=9, base_path="/a/b")),
    ],
)
def test_addresses(url, endpoint):
    assert one(base="external", url=url).endpoint == endpoint


@pytest.mark.parametrize("content", [None, [], {}, {"engines": []}, {"engines": {}, "x": 1}])
def test_the_whole_must_be_an_object_of_engines(content):
    with pytest.raises(EnginesFileError, match="one key"):
        parse_engines(content)


def test_no_engines_at_all_are_fine():
    assert parse_engines({"engines": {}}) == {}


@pytest.mark.parametrize("name", ["vllm", "simulator", "", "A", "a b", "1a", "a" * 33, "a/b"])
def test_names(name):
    with pytest.raises(EnginesFileError, match="a name has"):
        parse_engines({"engines": {name: COMMAND}})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "docker"}, "'kind'"),
        ({"kind": ...}, "'kind'"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"url": "http://x"}, "unknown field 'url'"),
        ({"slots": 0}, "'slots'"),
        ({"slots": True}, "'slots'"),
        ({"slots": ...}, "'slots'"),
        ({"health": "health"}, "'health'"),
        ({"health": ""}, "'health'"),
        ({"has_metrics": "yes"}, "'has_metrics'"),
        ({"keep_alive_s": 0}, "'keep_alive_s'"),
        ({"keep_alive_s": True}, "'keep_alive_s'"),
        ({"keep_alive_s": "5"}, "'keep_alive_s'"),
        ({"keep_alive_s": 3601}, "'keep_alive_s' must be a number up to 3600"),
        ({"argv": []}, "'argv'"),
        ({"argv": "serve {port}"}, "'argv'"),
        ({"argv": [["a"], "{port}"]}, "'argv'"),
        ({"argv": ["{model}", "{port}"]}, "must not be a placeholder"),
        ({"argv": ["a", 1, "{port}"]}, "neither text"),
        ({"argv": ["a", [], "{port}"]}, "neither text"),
        ({"argv": ["a", "{port}", "{"]}, "stray"),
        ({"argv": ["a", "{port}", "{colour}"]}, "unknown placeholder {colour}"),
        ({"argv": ["a", "{port}", "{internal_key}"]}, "command lines can be read"),
        ({"argv": ["a"]}, "either {port} or {uds}"),
        ({"argv": ["a", "{port}", "{uds}"]}, "either {port} or {uds}"),
        ({"env": []}, "'env'"),
        ({"env": {"A B": "x"}}, "'A B' cannot be set"),
        ({"env": {"VLLM_BOOTSTRAP_HOST": "x"}}, "cannot be set"),
        ({"env": {"A": 1}}, "must be text"),
        ({"env": {"A": "\0"}}, "must be text"),
        ({"env": {"A": "{no_such}"}}, "unknown placeholder"),
        ({"env_allowed": ["LD_PRELOAD"]}, "LD_PRELOAD"),
        ({"env_allowed": "X"}, "'env_allowed'"),
        ({"routes": []}, "'routes'"),
        ({"routes": ["GET /nothing"]}, "describe it as an object"),
        ({"routes": [3]}, "neither text"),
        ({"routes": [{"method": "GET", "path": "x", "scopes": ["admin"]}]}, "not a method and a path"),
        ({"routes": [{"method": "TRACE", "path": "/x", "scopes": ["admin"]}]}, "not a method and a path"),
        ({"routes": [{"method": "GET", "path": "/a/../b", "scopes": ["admin"]}]}, "not a method and a path"),
        ({"routes": [{"method": "GET", "path": "/*/a", "scopes": ["admin"]}]}, "not a method and a path"),
        ({"routes": [{"method": "GET", "path": "/a", "scopes": []}]}, "needs scopes"),
        ({"routes": [{"method": "GET", "path": "/a", "scopes": ["root"]}]}, "needs scopes"),
        ({"routes": [{"method": "GET", "path": "/a", "scopes": ["admin"], "x": 1}]}, "unknown field 'x'"),
        ({"base": "external", "served_names": []}, "'served_names'"),
        ({"base": "external", "argv": ["a"]}, "unknown field 'argv'"),
        ({"base": "external", "url": ...}, "'url' or 'uds'"),
        ({"base": "external", "uds": "/x"}, "'url' or 'uds'"),
        ({"base": "external", "url": ..., "uds": "x"}, "absolute path"),
        ({"base": "external", "url": "ftp://h"}, "'url'"),
        ({"base": "external", "url": "http://user:pw@h"}, "'url'"),
        ({"base": "external", "url": "http://h/?q"}, "'url'"),
        ({"base": "external", "url": "http://h:99999"}, "'url'"),
        ({"base": "external", "url": "http://h/a b"}, "'url'"),
        ({"base": "external", "url": "http:///x"}, "'url'"),
        ({"base": "external", "priority": "high"}, "'priority'"),
        ({"base": "external", "credential_env": "A", "credential_file": "/b"}, "not both"),
        ({"base": "external", "credential_file": 3}, "'credential_file'"),
    ],
)
def test_mistakes_are_named(changes, says):
    assert says in mistake(**changes)


def test_an_engine_must_be_an_object():
    with pytest.raises(EnginesFileError, match="must be an object"):
        parse_engines({"engines": {"x": []}})


def test_routes_of_further_segments():
    assert one(routes=[{"method": "GET", "path": "/slots/*", "scopes": ["monitor"]}]).routes[0].path == "/slots/*"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "is not JSON"),
        (b'{"engines": {}, "engines": {}}', "twice"),
        (b"[]", "is wrong: it must be"),
        (b" " * (1024 * 1024 + 1), "larger than"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, says):
    path = tmp_path / "engines.json"
    path.write_bytes(content)
    with pytest.raises(EnginesFileError) as caught:
        read_engines_file(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(EnginesFileError, match="cannot be read: No such file"):
        read_engines_file(tmp_path / "none.json")


def test_a_file_that_is_right(tmp_path):
    path = tmp_path / "engines.json"
    path.write_text(json.dumps({"engines": {"x": EXTERNAL}}))
    assert read_engines_file(path).keys() == {"x"}
