"""Exceptions of frameworks and parsers turned into the one error shape. The only place that knows both sides."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vllm_bootstrap.errors import ApiError, BadRequest, InternalError, InvalidJson, UnknownField, for_status

log = logging.getLogger(__name__)
_PLACES = ("body", "query", "path", "header")


def translate(exc: Exception) -> ApiError:
    """The error of ours that stands for ``exc``. What nobody expected becomes ``internal_error`` without details."""
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, RequestValidationError):
        return from_validation(exc.errors())
    if isinstance(exc, HTTPException):
        return for_status(exc.status_code, str(exc.detail))
    return InternalError("The daemon failed to answer this request; its log says why.")


def from_validation(problems: Sequence[Any]) -> ApiError:
    """One error out of a validator's list: an unknown field first, because it often explains the others."""
    unknown = next((p for p in problems if p["type"] == "extra_forbidden"), None)
    if unknown is not None:
        param = _param(unknown)
        return UnknownField(f"Unknown field '{param}'.", param=param)
    first = problems[0]
    if first["type"] == "json_invalid":
        return InvalidJson(f"The body is not valid JSON: {first['ctx']['error']} at position {first['loc'][-1]}.")
    param = _param(first)
    reasons = dict.fromkeys(str(p["msg"]).removeprefix("Value error, ") for p in problems if _param(p) == param)
    return BadRequest(f"{param or 'The body'}: {'; or '.join(reasons)}.", param=param or None)


def _param(problem: Any) -> str:
    """Where the problem is, as the caller wrote it: without the place and without the names of union members."""
    parts = [str(part) for part in problem["loc"]]
    if parts and parts[0] in _PLACES:
        parts = parts[1:]
    return ".".join(part for part in parts if "[" not in part and part not in {"int", "str", "RestartSpec"})


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


async def answer_error(_request: Request, exc: Exception) -> Response:
    """Exception handler for every class this module translates."""
    return error_response(translate(exc))
