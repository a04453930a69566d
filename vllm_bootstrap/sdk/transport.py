"""What both clients share at the edge to httpx: how it is set up, and how answers and failures are read.

Invariant: redirects are never followed, so a key never reaches another host than the one it was meant for. On this
machine proxies of the environment are not asked: they could not reach it, and would see the key.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from typing import Any, TypeVar

import httpx
from pydantic import ValidationError

from vllm_bootstrap import __version__
from vllm_bootstrap.errors import ApiError, from_response
from vllm_bootstrap.sdk.calls import Call, base_headers
from vllm_bootstrap.sdk.discovery import Target
from vllm_bootstrap.sdk.failures import DaemonUnreachable, UnexpectedAnswer

T = TypeVar("T")
Verify = ssl.SSLContext | bool

CONNECT_TIMEOUT_S = 5.0
STREAM_SILENCE_S = 45.0  # the daemon sends a comment every 15 s: three missed ones mean that nobody is there any more


def options(target: Target, timeout_s: float) -> dict[str, Any]:
    """Arguments of both httpx clients but the transport."""
    return {
        "base_url": target.url,
        "headers": base_headers(target.key, __version__),
        "timeout": httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
        "follow_redirects": False,
    }


def request_options(call: Call[Any]) -> dict[str, Any]:
    """Arguments of one request."""
    made: dict[str, Any] = {"params": call.params, "headers": call.headers}
    if call.body is not None:
        made["json"] = call.body
    if call.form is not None:
        # The fields first: whoever takes the file in knows by then what it is for.
        made["data"] = dict(call.form.fields)
        made["files"] = {"file": (call.form.filename, call.form.source, "application/octet-stream")}
    if call.timeout_s is not None:
        made["timeout"] = httpx.Timeout(call.timeout_s, connect=CONNECT_TIMEOUT_S)
    return made


def stream_options(headers: Mapping[str, str], params: Mapping[str, str | int], body: Any) -> dict[str, Any]:
    """Arguments of one streamed request."""
    silence = httpx.Timeout(STREAM_SILENCE_S if body is None else None, connect=CONNECT_TIMEOUT_S)
    made: dict[str, Any] = {"params": params, "headers": headers, "timeout": silence}
    return made if body is None else {**made, "json": body}


def download_options(headers: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of one request whose answer is a stream of bytes, as they are."""
    silence = httpx.Timeout(STREAM_SILENCE_S, connect=CONNECT_TIMEOUT_S)
    return {"headers": {"accept-encoding": "identity", **headers}, "timeout": silence}


def read_answer(call: Call[T], response: httpx.Response) -> T:
    """The result of a call. Raises the daemon's own error, or ``UnexpectedAnswer``."""
    check(response, response.content)
    try:
        return call.read(response.content)
    except ValidationError as exc:
        where = f"{response.request.method} {response.request.url}"
        raise UnexpectedAnswer(f"{where} was not answered as vllm-bootstrap does: is something else there?") from exc


def check(response: httpx.Response, content: bytes) -> None:
    """Raise the error that a response carries, if it carries one."""
    if response.is_success:
        return
    if response.is_redirect:
        there = response.headers.get("location", "nowhere")
        raise UnexpectedAnswer(
            f"{response.request.url} redirects to {there}. Redirects are not followed, because the key would go along: "
            "give the final address."
        )
    raise api_error(response.status_code, content, response.headers)


def api_error(status: int, content: bytes, headers: Mapping[str, str]) -> ApiError:
    """The class of ``errors.py`` for an error answer, with the request's id as a note."""
    try:
        body: Any = json.loads(content)
    except ValueError:
        body = None
    error = from_response(status, body, headers)
    if headers.get("x-request-id"):
        error.add_note(f"request id: {headers['x-request-id']}")
    return error


def unreachable(target: Target, exc: httpx.TransportError) -> DaemonUnreachable:
    """Why nothing came back, in words."""
    said = str(exc) or type(exc).__name__
    if isinstance(exc, httpx.ConnectTimeout):
        return DaemonUnreachable(target.url, "connecting took too long", never_met=True)
    if isinstance(exc, httpx.ConnectError):
        return DaemonUnreachable(target.url, "connection refused" if _was_refused(exc) else said, never_met=True)
    if isinstance(exc, httpx.TimeoutException):
        return DaemonUnreachable(target.url, "it did not answer in time")
    return DaemonUnreachable(target.url, f"the connection broke ({said})")


def _was_refused(exc: BaseException | None) -> bool:
    """Whether the operating system's refusal lies below ``exc``; only the innermost error says so plainly."""
    while exc is not None:
        if isinstance(exc, ConnectionRefusedError) or "refused" in str(exc):
            return True
        exc = exc.__cause__ or exc.__context__
    return False
