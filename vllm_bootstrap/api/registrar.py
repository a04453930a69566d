"""Default deny: the only way to a route is through ``Registrar.add``, and that takes a rule.

Invariant: a request reaches a route function only after the guard admitted it under the rule of the route that was
matched. What no route claims is answered only to those who hold a key at all. Knows nothing of what routes do.

Details that need more than their route (a failure's log lines) are declared with the route and asked for through
``may_see``; an undeclared detail is a programming error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm_bootstrap import strictjson
from vllm_bootstrap.api.errors import error_response
from vllm_bootstrap.auth import scopes
from vllm_bootstrap.auth.guard import ANY_KEY, Guard
from vllm_bootstrap.auth.types import RequestHead, Rule
from vllm_bootstrap.errors import MethodNotAllowed, NotFound, UnknownField
from vllm_bootstrap.wire import ErrorBody

MAX_BODY_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Registered:
    """What one (method, path) needs. ``details``: part of the answer to the scopes that may see it."""

    method: str
    path: str
    rule: Rule
    details: Mapping[str, frozenset[str]] = field(default_factory=dict)


class MissingRuleError(TypeError):
    """Somebody tried to add a route past the registrar."""


class UnruledRoute(APIRoute):
    """Stands where FastAPI would put a route that was added with its own decorators."""

    def __init__(self, path: str, *_args: Any, **_kwargs: Any) -> None:
        raise MissingRuleError(f"{path}: routes are added through Registrar.add, which takes a rule")


class StrictRequest(Request):
    """Reads a JSON body of bounded size, strictly."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            chunks, size = [], 0
            async for chunk in self.stream():
                size += len(chunk)
                if size > MAX_BODY_BYTES:
                    raise HTTPException(413, f"The body is longer than {MAX_BODY_BYTES} bytes.")
                chunks.append(chunk)
            self._body = b"".join(chunks)
        return self._body

    async def json(self) -> Any:
        return strictjson.loads(await self.body())


class GuardedRoute(APIRoute):
    """A route that asks the guard first. Answers ``HEAD`` like ``GET`` (the envelope drops the body) and ``OPTIONS``
    with the methods there are; no CORS headers, ever."""

    def __init__(
        self,
        path: str,
        endpoint: Callable[..., Any],
        *,
        guard: Guard,
        entry: Registered,
        any_query: bool,
        siblings: list[Registered],
        **options: Any,
    ) -> None:
        self.guard, self.entry, self._siblings = guard, entry, siblings
        super().__init__(path, endpoint, methods=[entry.method], **options)
        known = {name for param in self.dependant.query_params for name in (param.alias, param.name)}
        self._query_names = None if any_query else frozenset(known)

    def get_route_handler(self) -> Callable[[Request], Any]:
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await inner(StrictRequest(request.scope, request.receive))

        return handle

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == self.entry.method:
            self._admit(scope, self.entry.rule)
            self._check_query(scope)
            await self.app(scope, receive, send)
            return
        self._admit(scope, self.entry.rule if self.entry.rule.public else ANY_KEY)
        allow = self._allow()
        if scope["method"] == "OPTIONS":
            response = Response(status_code=204)
        else:
            response = error_response(MethodNotAllowed(f"This path takes {allow}."))
        response.headers["allow"] = allow
        await response(scope, receive, send)

    def _admit(self, scope: Scope, rule: Rule) -> None:
        scope.setdefault("state", {})["principal"] = self.guard.admit(head_of(scope), rule)

    def _allow(self) -> str:
        methods = {entry.method for entry in self._siblings if entry.path == self.path}
        return ", ".join(sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))

    def _check_query(self, scope: Scope) -> None:
        if self._query_names is None or not scope["query_string"]:
            return
        for name in Request(scope).query_params:
            if name not in self._query_names:
                raise UnknownField(f"Unknown query parameter '{name[:64]}'.", param=name[:64])


class Registrar:
    """Collects routes with their rules. ``check`` is called once, when all are in."""

    def __init__(self, app: FastAPI, guard: Guard) -> None:
        self._app, self._guard = app, guard
        self.entries: list[Registered] = []
        app.router.route_class = UnruledRoute
        app.router.redirect_slashes = False
        app.router.default = self._no_such_route

    def add(
        self,
        method: str,
        path: str,
        endpoint: Callable[..., Any],
        rule: Rule,
        *,
        answer: Any = None,
        status: int = 200,
        details: Mapping[str, Iterable[str]] | None = None,
        tags: Iterable[str] = ("control plane",),
        in_schema: bool = True,
        any_query: bool = False,
        **options: Any,
    ) -> None:
        """Register one route. ``answer`` is the wire type, for the docs (route functions return responses themselves,
        which costs no second validation). ``any_query``: do not refuse query parameters the function does not name.
        ``options`` go to FastAPI. Raises ``ValueError`` for a (method, path) that is there already."""
        if any((entry.method, entry.path) == (method, path) for entry in self.entries):
            raise ValueError(f"{method} {path} is registered twice")
        entry = Registered(method, path, rule, {k: frozenset(v) for k, v in (details or {}).items()})
        self.entries.append(entry)
        refusal = {"default": {"model": ErrorBody, "description": "Refusal or failure"}}
        options["responses"] = {**refusal, **options.get("responses", {})}
        route = GuardedRoute(
            path,
            endpoint,
            guard=self._guard,
            entry=entry,
            any_query=any_query,
            siblings=self.entries,
            response_model=answer,
            status_code=status,
            tags=list(tags),
            include_in_schema=in_schema,
            **options,
        )
        self._app.router.routes.append(route)

    def check(self) -> None:
        """Raise ``MissingRuleError`` when any route of the application came past the registrar."""
        for route in self._app.router.routes:
            if not isinstance(route, GuardedRoute):
                raise MissingRuleError(f"{getattr(route, 'path', route)!r} has no rule")

    async def _no_such_route(self, scope: Scope, _receive: Receive, _send: Send) -> None:
        self._guard.admit(head_of(scope), ANY_KEY)
        raise NotFound("There is no such route; GET /docs lists all of them.")


def head_of(scope: Scope) -> RequestHead:
    """The part of an ASGI scope that the guard looks at."""
    return RequestHead(scope["method"], scope["path"], tuple(scope["headers"]), scope["query_string"])


def may_see(request: Request, detail: str) -> bool:
    """Whether the caller may see a detail that the matched route declared."""
    route, principal = request.scope["route"], request.state.principal
    return principal is not None and scopes.allows(principal.scopes, route.entry.details[detail])
