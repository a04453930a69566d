"""How a route answers: a wire model becomes bytes once, without a second validation on the way out."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel
from starlette.responses import Response


def answer(model: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """``model`` as a JSON response."""
    return Response(model.model_dump_json(by_alias=True), status, headers, "application/json")
