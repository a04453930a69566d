"""The control plane's part of tests/access.json against the application itself: the same routes, the same decisions."""

from __future__ import annotations

import pytest

from tests.support import access
from tests.support.control_plane import Browser, key, launch_id, make, view
from vllm_bootstrap.gateway.targets import BY_MODEL

CONTROL = [route for route in access.routes() if not route.data_plane]
LAUNCH = launch_id(1)


@pytest.fixture(scope="module")
def browser() -> Browser:
    services = make([key(scope, scope) for scope in access.SCOPES])
    services.supervisor.add(view(1))
    return Browser(services)


def test_the_table_has_exactly_the_routes_there_are(browser: Browser) -> None:
    registered = {(e.method, e.path.replace(":path", "")) for e in browser.app.state.routes.entries}
    assert {(route.method, route.path) for route in CONTROL} == registered
    by_model = {(route.method, route.path) for route in access.routes() if route.path.startswith("/v1/")}
    assert {(route.method, route.path) for route in BY_MODEL.values()} <= by_model


def decision(browser: Browser, route: access.Route, token: str | None) -> int:
    body, content_type = route.request_body()
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    if content_type:
        headers["content-type"] = content_type
    status = browser.call(route.method, route.target(LAUNCH), body, headers).status
    return status if status in {401, 403} else 0


@pytest.mark.parametrize("route", CONTROL, ids=lambda route: route.name)
def test_decisions(browser: Browser, route: access.Route) -> None:
    assert decision(browser, route, None) == (0 if route.access is None else 401)
    assert decision(browser, route, "wrong") == (0 if route.access is None else 401)
    for scope in access.SCOPES:
        allowed = route.access is None or scope in route.access
        assert decision(browser, route, scope) == (0 if allowed else 403), scope
