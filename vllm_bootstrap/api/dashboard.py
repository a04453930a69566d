"""The page: launches, GPUs, requests, logs. An empty page for everybody, its content for keys with ``monitor``.

Invariant: nothing of the box is in a page or a part of it that a caller without ``monitor`` gets. The page runs no
script and loads no style but our own files (Content-Security-Policy), and keys never stay in an address: ``?key=`` is
exchanged for a session cookie at once.

The page's parts are rendered here and only here: first into the page, then again and again for its script, which puts
what has changed into place.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from vllm_bootstrap.activity import ActivityFilter
from vllm_bootstrap.api import board, pages, views
from vllm_bootstrap.api.board_models import models_part
from vllm_bootstrap.api.board_traffic import RECENT_SHOWN, TrafficPart, traffic_part
from vllm_bootstrap.api.catalogue import may_see
from vllm_bootstrap.api.gpus import gpu_listing
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Api, Caller, Services
from vllm_bootstrap.auth import scopes
from vllm_bootstrap.auth.guard import PAGE_HEADER, PAGE_VALUE
from vllm_bootstrap.auth.scopes import ADMIN, LOGS, MONITOR
from vllm_bootstrap.auth.sessions import COOKIE
from vllm_bootstrap.auth.types import Principal, Rule
from vllm_bootstrap.errors import Unauthorized
from vllm_bootstrap.wire import LaunchRequest
from vllm_bootstrap.wire import Request as WireRequest

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
}
ASSET_HEADERS = {"cache-control": "public, max-age=31536000, immutable", "x-content-type-options": "nosniff"}
# Fields that the launch form offers by name, or that a line NAME=VALUE cannot say.
OWN_INPUT = {"model", "gpu_ids", "extra_args", "env", "labels", "restart", "replicas"}
TYPED_FIELDS = ",".join(sorted(set(LaunchRequest.model_fields) - OWN_INPUT))


class LogIn(WireRequest):
    """A key that becomes a session."""

    key: str = Field(min_length=1, max_length=4096, repr=False)


def register(routes: Registrar) -> None:
    public = Rule(public=True)
    for path, name in (("/", "page"), ("/dashboard", "dashboard_page")):
        routes.add("GET", path, show_page, public, in_schema=False, any_query=True, name=name)
    routes.add("GET", "/assets/{name}", show_asset, public, in_schema=False, any_query=True)
    monitor = Rule(scopes=frozenset({MONITOR}))
    routes.add("GET", "/dashboard/parts", show_parts, monitor, in_schema=False)
    routes.add("POST", "/session", open_session, public, status=204, tags=("page",))
    routes.add("DELETE", "/session", close_session, public, status=204, tags=("page",))


async def show_page(request: Request, api: Api, key: Annotated[str | None, Query(max_length=4096)] = None) -> Response:
    """The page; with ``?key=`` the way to it."""
    if key is not None:
        return _exchange(request, api, key)
    caller: Principal | None = request.state.principal
    may_look = caller is not None and scopes.allows(caller.scopes, frozenset({MONITOR}))
    parts = await _parts(request, api, caller) if caller is not None and may_look else ""
    refused = caller.name if caller is not None and not may_look else ""
    html = pages.render("dashboard.html", parts=parts, refused=refused, version=api.version, typed_fields=TYPED_FIELDS)
    return HTMLResponse(html, headers=PAGE_HEADERS)


def _exchange(request: Request, api: Services, key: str) -> Response:
    """To the same page without the key in its address. A wrong key is told by the fragment, which no server sees."""
    here = "./" if request.url.path == "/" else request.url.path.rpartition("/")[2]
    session = api.sessions.create(key)
    refused = session is None and not api.guard.open_access
    response = RedirectResponse(here + ("#refused" if refused else ""), 303, PAGE_HEADERS)
    if session is not None:
        response.headers.append("set-cookie", api.sessions.set_cookie(session, secure=_is_secure(request)))
    return response


async def show_asset(name: str) -> Response:
    """A style, script or picture of the page."""
    found = pages.asset(name)
    return Response(found.content, headers=ASSET_HEADERS, media_type=found.media_type)


async def show_parts(request: Request, api: Api, caller: Caller) -> Response:
    """The changing part of the page, as HTML."""
    return HTMLResponse(await _parts(request, api, caller), headers=PAGE_HEADERS)


async def _parts(request: Request, api: Services, caller: Principal) -> str:
    allowed = frozenset(scope for scope in (ADMIN, LOGS) if scopes.allows(caller.scopes, frozenset({scope})))
    queues = api.queues()
    launches = [
        views.status(view, api.gate.load(view.launch_id), with_lines=LOGS in allowed, queues=queues)
        for view in board.worth_showing(api.supervisor.list(include_ended=True))
    ]
    now = datetime.fromtimestamp(api.clock(), UTC)
    models = models_part([one for one in api.models.list() if may_see(caller, one)], launches, api.models.note)
    made = board.make(launches, await gpu_listing(api), now, allowed, await _traffic(api, caller), models)
    has_session = COOKIE in request.cookies and not api.guard.open_access
    return pages.render("parts.html", board=made, caller=caller.name, has_session=has_session)


async def _traffic(api: Services, caller: Principal) -> TrafficPart:
    requests = [views.request(info) for info in api.requests.list()]
    recent = [] if api.activity.off else (await api.activity.page(ActivityFilter(), limit=RECENT_SHOWN))[0]
    return traffic_part(requests, [views.finished(row) for row in recent], caller)


async def open_session(request: Request, api: Api, body: LogIn) -> Response:
    """Exchange a key for a session cookie, which is worth what the key is worth."""
    session = api.sessions.create(body.key)
    if session is None and not api.guard.open_access:
        raise Unauthorized(challenge=request.headers.get(PAGE_HEADER.decode()) != PAGE_VALUE.decode())
    response = Response(status_code=204, headers={"cache-control": "no-store"})
    if session is not None:
        response.headers.append("set-cookie", api.sessions.set_cookie(session, secure=_is_secure(request)))
    return response


async def close_session(request: Request, api: Api) -> Response:
    """End the session of the cookie. Idempotent."""
    session = request.cookies.get(COOKIE)
    if session is not None:
        api.sessions.close(session.encode("latin-1", "replace"))
    cookie = api.sessions.clear_cookie(secure=_is_secure(request))
    return Response(status_code=204, headers={"set-cookie": cookie, "cache-control": "no-store"})


def _is_secure(request: Request) -> bool:
    return request.url.scheme == "https"
