"""Builds the control plane: envelope, registrar, all routes, one error shape.

Invariant: an application with a route that has no rule is never handed out.
"""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from vllm_bootstrap.api import (
    adapters,
    batches,
    catalogue,
    control,
    dashboard,
    docs,
    files,
    gpus,
    health,
    items,
    logs,
    metrics_route,
    models,
    openapi,
    requests,
    weights,
)
from vllm_bootstrap.api.envelope import Envelope
from vllm_bootstrap.api.errors import answer_error
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Services
from vllm_bootstrap.errors import ApiError


def build_api(services: Services) -> FastAPI:
    """The ASGI application of everything but the data plane. Raises ``MissingRuleError`` for a route without a rule."""
    app = FastAPI(title="vllm-bootstrap", openapi_url=None, docs_url=None, redoc_url=None)
    app.state.services = services
    app.add_middleware(Envelope, metrics=services.metrics)
    for kind in (ApiError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer_error)
    routes = Registrar(app, services.guard)
    for module in (health, control, requests, files, batches, items, logs, gpus, models, metrics_route, dashboard):
        module.register(routes)
    for module in (catalogue, weights, adapters):
        module.register(routes)
    catalogue.register_last(routes)
    docs.register(routes, lambda: openapi.describe(app, routes.entries))
    app.state.routes = routes
    routes.check()
    return app
