"""Errors as vocabulary: one table from code to status, type and retry advice, shared by server and client. PURE.

Invariant: every error that leaves the daemon is one of these classes, and the client raises the same class again
from the body it received. Nothing here knows HTTP frameworks, sockets or logging.

The tree::

    ApiError
    ├── BadRequest 400 bad_request          ├── Conflict 409 conflict
    │   ├── InvalidJson   invalid_json      │   ├── GpuConflict     gpu_conflict
    │   ├── UnknownField  unknown_field     │   ├── LaunchNotReady  launch_not_ready
    │   ├── DoesNotFit    does_not_fit      │   ├── SleepFailed, WakeFailed sleep_failed, wake_failed
    │   └── AdapterRefused adapter_refused  │   ├── NotEnoughMemory not_enough_memory
    │                                       │   └── Cancelled       cancelled
    ├── Unauthorized 401 invalid_api_key    ├── OffsetOutOfRange 416 offset_out_of_range
    ├── Forbidden 403 insufficient_scope    ├── TooManyRequests 429 rate_limit_exceeded
    │   └── ForbiddenOrigin forbidden_origin│   ├── ConcurrencyLimit concurrency_limit
    ├── NotFound 404 not_found              │   └── QueueFull        queue_full
    │   └── ModelNotFound model_not_found   ├── Unavailable 503 overloaded
    ├── MethodNotAllowed 405                │   ├── ModelLoading  model_loading
    ├── RequestTimeout 408                  │   ├── ModelFailed   model_failed
    │                                       │   ├── Draining      draining
    ├── PayloadTooLarge 413                 │   ├── GpuUnknown    gpu_unknown
    ├── UnsupportedMediaType 415            │   ├── NoFreePort    no_free_port
    ├── HeadersTooLarge 431                 │   └── StorageFailed storage_failed
    │                                       ├── UpstreamError 502 upstream_error
    │                                       ├── UpstreamTimeout 504 upstream_timeout
    └── InternalError 500                   └── StorageFull 507 storage_full
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

SOURCE = "vllm-bootstrap"
RETRY_AFTER_MIN, RETRY_AFTER_MAX = 1, 60


class ApiError(Exception):
    """Base of all errors of the public surface.

    ``message`` says what is wrong and what to do; ``param`` names the offending field. ``retry_after`` is in
    seconds and is clamped to 1..60, because stock SDKs ignore longer waits. ``should_retry`` overrides the
    SDK's own rule through the ``x-should-retry`` header. ``details`` is merged into the error object.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"
    should_retry: bool | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = None if retry_after is None else clamp_retry_after(retry_after)
        if should_retry is not None:
            self.should_retry = should_retry
        self.details = dict(details or {})

    def body(self) -> dict[str, Any]:
        """The one error shape of the public surface, ready for JSON."""
        param = None if self.param is None else _sendable(self.param)
        error = {"message": _sendable(self.message), "type": self.type, "param": param, "code": self.code}
        return {"error": {**self.details, **error}, "src": SOURCE}

    def headers(self) -> dict[str, str]:
        """Headers that belong to this error: retry advice, authentication challenge."""
        out: dict[str, str] = {}
        if self.retry_after is not None:
            out["retry-after"] = str(self.retry_after)
        if self.should_retry is not None:
            out["x-should-retry"] = "true" if self.should_retry else "false"
        return out


def _sendable(text: str) -> str:
    """``text`` as UTF-8 can carry it: JSON's escapes can name half of a surrogate pair, which no answer can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def clamp_retry_after(seconds: float) -> int:
    """Whole seconds between 1 and 60, rounded up (SDKs retry only within their own cap)."""
    whole = int(seconds) if seconds == int(seconds) else int(seconds) + 1
    return max(RETRY_AFTER_MIN, min(RETRY_AFTER_MAX, whole))


class BadRequest(ApiError):
    status, code, type = 400, "bad_request", "invalid_request_error"


class InvalidJson(BadRequest):
    code = "invalid_json"


class UnknownField(BadRequest):
    code = "unknown_field"


class DoesNotFit(BadRequest):
    """The model needs more memory than the launch may use, whatever the estimate's error. ``details``: ``fit`` (the
    figures) and ``suggestions`` (what would fit). ``retry_after``: it would fit if others did not use so much."""

    code = "does_not_fit"


class AdapterRefused(BadRequest):
    """An uploaded adapter that cannot be served, or that would be dangerous to load."""

    code = "adapter_refused"


class Unauthorized(ApiError):
    """Missing, wrong, expired and disabled keys all get this same body."""

    status, code, type = 401, "invalid_api_key", "authentication_error"

    def __init__(self, *, challenge: bool = True) -> None:
        super().__init__("Missing or invalid key. Send it as 'Authorization: Bearer KEY', Basic or 'x-api-key'.")
        self.challenge = challenge

    def headers(self) -> dict[str, str]:
        out = super().headers()
        if self.challenge:
            out["www-authenticate"] = 'Basic realm="vllm-bootstrap"'
        return out


class Forbidden(ApiError):
    status, code, type = 403, "insufficient_scope", "permission_error"


class ForbiddenOrigin(Forbidden):
    code = "forbidden_origin"


class NotFound(ApiError):
    status, code, type = 404, "not_found", "invalid_request_error"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(ApiError):
    status, code, type = 405, "method_not_allowed", "invalid_request_error"


class RequestTimeout(ApiError):
    status, code, type = 408, "request_timeout", "invalid_request_error"


class Conflict(ApiError):
    """OpenAI's SDK retries 409 by itself; ours never helps by retrying unless said so."""

    status, code, type = 409, "conflict", "conflict_error"
    should_retry = False


class GpuConflict(Conflict):
    code = "gpu_conflict"


class LaunchNotReady(Conflict):
    code = "launch_not_ready"


class SleepFailed(Conflict):
    """The launch did not fall asleep, or may not: it serves as before. To have its GPUs, stop it."""

    code = "sleep_failed"


class WakeFailed(Conflict):
    """The launch did not wake: it has failed and ends, or its GPUs are locked and it sleeps on."""

    code = "wake_failed"


class NotEnoughMemory(Conflict):
    """A prefetch of files that are larger than the memory that may be used for them. ``details`` has the numbers."""

    code = "not_enough_memory"


class Cancelled(Conflict):
    """Somebody else ended this request: an operator, or a call with the same key."""

    code = "cancelled"


class PayloadTooLarge(ApiError):
    status, code, type = 413, "request_too_large", "invalid_request_error"


class UnsupportedMediaType(ApiError):
    status, code, type = 415, "unsupported_media_type", "invalid_request_error"


class OffsetOutOfRange(ApiError):
    status, code, type = 416, "offset_out_of_range", "invalid_request_error"


class MisdirectedRequest(ApiError):
    """The ``Host`` header names a host this daemon does not answer for (DNS rebinding guard)."""

    status, code, type = 421, "unknown_host", "invalid_request_error"


class HeadersTooLarge(ApiError):
    status, code, type = 431, "headers_too_large", "invalid_request_error"


class TooManyRequests(ApiError):
    status, code, type = 429, "rate_limit_exceeded", "rate_limit_error"


class ConcurrencyLimit(TooManyRequests):
    code = "concurrency_limit"


class QueueFull(TooManyRequests):
    code = "queue_full"


class InternalError(ApiError):
    pass


class UpstreamError(ApiError):
    status, code = 502, "upstream_error"


class UpstreamTimeout(ApiError):
    status, code = 504, "upstream_timeout"


class Unavailable(ApiError):
    status, code = 503, "overloaded"


class ModelLoading(Unavailable):
    code = "model_loading"


class ModelFailed(Unavailable):
    """A model that was to be loaded for a request could not be: ``details["failure"]`` has its class and hint."""

    code = "model_failed"


class Draining(Unavailable):
    code = "draining"


class GpuUnknown(Unavailable):
    """NVML cannot answer: no GPU is known to be free, so none is given out."""

    code = "gpu_unknown"


class NoFreePort(Unavailable):
    code = "no_free_port"


class StorageFull(ApiError):
    """The disk is full: this change was refused, nothing accepted earlier is lost, it works again with room."""

    status, code = 507, "storage_full"


class StorageFailed(Unavailable):
    """The disk failed (an I/O error, a failed sync): nothing more is written until the daemon is restarted."""

    code = "storage_failed"
    should_retry = False


def _tree(root: type[ApiError]) -> list[type[ApiError]]:
    found = [root]
    for child in root.__subclasses__():
        found.extend(_tree(child))
    return found


# InternalError stands for the base class: both have code internal_error, the later wins.
BY_CODE: Mapping[str, type[ApiError]] = {cls.code: cls for cls in _tree(ApiError)}

_BY_STATUS: Mapping[int, type[ApiError]] = {
    400: BadRequest, 401: Unauthorized, 403: Forbidden, 404: NotFound, 405: MethodNotAllowed, 408: RequestTimeout,
    409: Conflict, 413: PayloadTooLarge, 415: UnsupportedMediaType, 416: OffsetOutOfRange, 421: MisdirectedRequest,
    429: TooManyRequests, 431: HeadersTooLarge, 502: UpstreamError, 503: Unavailable, 504: UpstreamTimeout,
    507: StorageFull,
}  # fmt: skip


def for_status(status: int, message: str) -> ApiError:
    """The class that stands for a bare HTTP status, for errors that come from a framework or a foreign server."""
    cls = _BY_STATUS.get(status, BadRequest if 400 <= status < 500 else InternalError)
    return Unauthorized() if cls is Unauthorized else cls(message)


def from_response(status: int, body: Any, headers: Mapping[str, str] | None = None) -> ApiError:
    """Rebuild the error a response carries: ours by ``code``, an engine's or a stranger's by status.

    ``body`` is the decoded JSON or anything else; ``headers`` are looked up in lower case.
    """
    error = body.get("error") if isinstance(body, dict) else None
    fields = error if isinstance(error, dict) else {}
    message = str(fields.get("message") or (error if isinstance(error, str) else "") or f"HTTP {status}")
    cls = BY_CODE.get(str(fields.get("code")))
    if cls is None or cls.status != status:
        cls = type(for_status(status, message))
    exc = cls.__new__(cls)
    known = {"message", "type", "param", "code"}
    ApiError.__init__(
        exc,
        message,
        param=fields.get("param"),
        retry_after=_seconds((headers or {}).get("retry-after")),
        details={k: v for k, v in fields.items() if k not in known},
    )
    if isinstance(exc, Unauthorized):
        exc.challenge = "www-authenticate" in (headers or {})
    return exc


def _seconds(value: str | None) -> float | None:
    return float(value) if value is not None and value.isdigit() else None
