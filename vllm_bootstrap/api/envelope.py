"""What every control-plane answer has, whatever the route: ids, version, one error shape, a count. Plain ASGI.

Invariant: no exception leaves it as anything but an error of ours, unless the answer has already begun; then the
connection breaks, which is the only honest end. Knows nothing of rules and routes.
"""

from __future__ import annotations

import logging
import secrets
import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_bootstrap.api.errors import error_response, translate
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.gateway.headers import valid_request_id
from vllm_bootstrap.metrics import Metrics
from vllm_bootstrap.wire import API_VERSION

log = logging.getLogger(__name__)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
HEAD_FLAG = "vllm_bootstrap.head"


class Envelope:
    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no such route"})
        elif scope["type"] == "http":
            await _Exchange(self._app, self._metrics, scope, send).run(receive)
        else:
            await self._app(scope, receive, send)


class _Exchange:
    """One request and its answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics, scope: Scope, send: Send) -> None:
        self._app, self._metrics, self._send = app, metrics, send
        self._method = str(scope["method"])
        self._head = self._method == "HEAD"
        self._scope = {**scope, "method": "GET", HEAD_FLAG: True} if self._head else scope
        self._request_id = _request_id(scope)
        self._status = 0
        self._streams = False
        self._began = time.perf_counter()

    async def run(self, receive: Receive) -> None:
        try:
            _check_version(self._scope)
            await self._app(self._scope, receive, self.send)
        except ClientDisconnect:
            self._status = self._status or 499
        except Exception as exc:
            error = translate(exc)
            if error is not exc:
                log.exception("request %s failed", self._request_id.decode())
            if self._status:
                raise
            await error_response(error)(self._scope, receive, self.send)
        finally:
            self._count()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = [*message["headers"], (b"x-request-id", self._request_id)]
            headers.append((b"x-api-version", API_VERSION.encode()))
            self._streams = any(k == b"content-type" and v.startswith(b"text/event-stream") for k, v in headers)
            message = {**message, "headers": headers}
        elif self._head:
            message = {**message, "body": b""}
        await self._send(message)

    def _count(self) -> None:
        route = str(getattr(self._scope.get("route"), "path", "none"))
        method = self._method if self._method in _METHODS else "other"
        self._metrics.http_requests.labels(route, method, str(self._status)).inc()
        if not self._streams:
            self._metrics.http_seconds.labels(route).observe(time.perf_counter() - self._began)


def _request_id(scope: Scope) -> bytes:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
    return (valid_request_id(given) or f"req-{secrets.token_hex(12)}").encode()


def _check_version(scope: Scope) -> None:
    for name, value in scope["headers"]:
        if name == b"x-api-version" and value.strip() != API_VERSION.encode():
            raise BadRequest(f"This daemon speaks API version {API_VERSION}.", param="x-api-version")
