"""What holds for every answer, and the rule that no route exists without a rule."""

import asyncio
import re

import pytest
from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from tests.support.control_plane import Browser, key, launch_id, make, one_key_each, view
from vllm_bootstrap.api.app import build_api
from vllm_bootstrap.api.registrar import MissingRuleError, Registrar, may_see
from vllm_bootstrap.auth.types import Rule

PUBLIC = Rule(public=True)


async def fine() -> Response:
    return Response("fine")


@pytest.fixture
def services():
    return make(one_key_each())


def test_every_answer_has_a_request_id_and_the_version(services):
    browser = Browser(services, "monitor")
    for path in ("/livez", "/launches", "/nope", "/launch?x=1"):
        answer = browser.get(path)
        assert answer.headers["x-api-version"] == "v1"
        assert re.fullmatch(r"req-[0-9a-f]{24}", answer.headers["x-request-id"])
    assert browser.get("/nope", x_request_id="mine-1").headers["x-request-id"] == "mine-1"
    assert browser.get("/nope", x_request_id="not\tmine").headers["x-request-id"].startswith("req-")


def test_another_api_version_is_refused(services):
    browser = Browser(services)
    assert browser.get("/livez", x_api_version="v1").status == 200
    answer = browser.get("/livez", x_api_version="v2")
    assert (answer.status, answer.error["param"]) == (400, "x-api-version")


def test_unknown_routes_are_told_only_to_those_with_a_key(services):
    spelled = ["/launches/", "//launches", "/launches%2f", "/Launches", "/x/../launches", "/status/a%2Fb"]
    later = ["/requests/x", "/v1/batch", "/evals"]
    for method, path in [("POST", "/nope"), *(("GET", path) for path in ["/nope", *spelled, *later])]:
        assert Browser(services).call(method, path).status == 401, path
        answer = Browser(services, "upload").call(method, path)
        assert (answer.status, answer.error["code"]) == (404, "not_found"), path


def test_other_methods_are_told_only_to_those_with_a_key(services):
    assert Browser(services).call("PUT", "/launch").status == 401
    answer = Browser(services, "eval").call("PUT", "/launch")
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS, POST"
    assert Browser(services).call("POST", "/livez").status == 405


def test_options_lists_methods_and_never_speaks_cors(services):
    preflight = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    assert Browser(services).call("OPTIONS", "/launch", headers=preflight).status == 401
    answer = Browser(services, "eval").call("OPTIONS", "/launch", headers=preflight)
    assert (answer.status, answer.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_head_is_get_without_a_body(services):
    answer = Browser(services, "monitor").call("HEAD", "/launches")
    assert (answer.status, answer.body) == (200, b"")
    assert int(answer.headers["content-length"]) > 0
    assert Browser(services).call("HEAD", "/launches").status == 401


@pytest.mark.parametrize("host", ["a/#@b", "", "evil.example"])
def test_a_strange_host_changes_no_decision_and_reaches_no_route(services, host):
    for token in (None, "admin"):
        for path in ("/livez", "/launches", "/nope"):
            assert Browser(services, token, host=host).get(path).status in {400, 421}


def test_a_foreign_page_can_do_nothing_to_an_open_daemon():
    services = make()
    services.supervisor.add(view(1))
    browser = Browser(services, origin="http://evil.example")
    for method, path in (
        ("POST", f"/stop/{launch_id(1)}"),
        ("DELETE", f"/launches/{launch_id(1)}"),
        ("POST", "/launch"),
    ):
        answer = browser.call(method, path)
        assert (answer.status, answer.error["code"]) == (403, "forbidden_origin")
    assert services.supervisor.calls == []


def test_protect_all_leaves_livez_alone():
    browser = Browser(make([key("k", "logs")], protect_all=True))
    assert browser.get("/livez").status == 200
    for path in ("/healthz", "/health", "/version"):
        assert browser.get(path).status == 401
        assert browser.get(path, authorization="Bearer k").status == 200


def test_an_unexpected_failure_is_logged_and_tells_nothing(services, caplog):
    services.supervisor.views = None
    answer = Browser(services, "monitor").get("/launches")
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert answer.headers["x-request-id"] in caplog.text
    assert "Traceback" in caplog.text
    assert "NoneType" not in answer.body.decode()


def test_a_failure_after_the_answer_has_begun_breaks_the_connection(services):
    async def scenario():
        app = build_api(services)
        routes = Registrar(app, services.guard)

        async def half() -> Response:
            class Half(Response):
                async def __call__(self, scope, receive, send):
                    await send({"type": "http.response.start", "status": 200, "headers": []})
                    raise RuntimeError("in the middle")

            return Half()

        routes.add("GET", "/half", half, PUBLIC)
        browser = Browser(services)
        browser.app = app
        await browser.exchange("GET", "/half")

    with pytest.raises(RuntimeError, match="in the middle"):
        asyncio.run(scenario())


def test_a_client_that_leaves_during_its_request_is_no_failure(services, caplog):
    async def scenario():
        app = build_api(services)

        async def leave() -> Response:
            raise ClientDisconnect

        Registrar(app, services.guard).add("GET", "/leave", leave, PUBLIC)
        browser = Browser(services)
        browser.app = app
        with pytest.raises(KeyError):  # no answer was sent
            await browser.exchange("GET", "/leave")

    asyncio.run(scenario())
    assert caplog.text == ""
    assert services.metrics.http_requests.labels("/leave", "GET", "499")._value.get() == 1


def test_websockets_and_lifespan_have_nothing_here(services):
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "lifespan.startup"} if not sent else {"type": "lifespan.shutdown"}

    async def scenario():
        app = build_api(services)
        await app({"type": "websocket", "path": "/x", "headers": []}, receive, send)
        assert sent.pop()["type"] == "websocket.close"
        await app({"type": "lifespan", "state": {}}, receive, send)

    asyncio.run(scenario())
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


# -- the registrar --------------------------------------------------------------------------------------------------


def test_a_route_without_a_rule_cannot_be_added(services):
    app = FastAPI(openapi_url=None)
    routes = Registrar(app, services.guard)
    with pytest.raises(MissingRuleError, match="/sneaky"):
        app.get("/sneaky")(fine)
    for sneaky in (Route("/sneaky", fine), Mount("/sneaky", app=fine)):
        app.router.routes.append(sneaky)
        with pytest.raises(MissingRuleError, match="/sneaky"):
            routes.check()
        app.router.routes.remove(sneaky)
    routes.check()


def test_a_route_is_registered_once(services):
    routes = Registrar(FastAPI(openapi_url=None), services.guard)
    routes.add("GET", "/x", fine, PUBLIC)
    routes.add("POST", "/x", fine, PUBLIC)
    with pytest.raises(ValueError, match="twice"):
        routes.add("GET", "/x", fine, PUBLIC)


def test_an_undeclared_detail_is_a_programming_error(services):
    route = next(route for route in build_api(services).routes if route.path == "/gpus")
    principal = services.keys.lookup(b"admin")
    request = Request({"type": "http", "route": route, "state": {"principal": principal}})
    with pytest.raises(KeyError):
        may_see(request, "failure.lines")
