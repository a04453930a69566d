"""Is it alive, can it serve, what is it. Public, and they tell no more than that."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from vllm_bootstrap import compiled
from vllm_bootstrap.api.answers import answer
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Api
from vllm_bootstrap.auth.types import Rule
from vllm_bootstrap.wire import Health, Version


def register(routes: Registrar) -> None:
    # Probes of load balancers add query parameters of their own.
    routes.add("GET", "/livez", live, Rule(public=True, always_public=True), answer=Health, any_query=True)
    for path in ("/healthz", "/health"):
        name = f"read_{path.strip('/')}"
        routes.add("GET", path, healthy, Rule(public=True), answer=Health, any_query=True, name=name)
    routes.add("GET", "/version", version, Rule(public=True), answer=Version, any_query=True)


async def live() -> Response:
    """200 while the process works, whatever it can do at the moment."""
    return answer(Health(status="ok"))


async def healthy(api: Api) -> Response:
    """200 when the daemon can serve; 503 while it starts and while it drains, and in one-model mode until the model
    serves."""
    error = api.outage()
    if error is not None:
        return JSONResponse({"status": api.phase, **error.body()}, error.status, error.headers())
    missing = api.not_ready()
    if missing is not None:
        return JSONResponse({"status": "starting", **missing.body()}, missing.status, missing.headers())
    return answer(Health(status="ok"))


async def version(api: Api) -> Response:
    """Version and build of the daemon."""
    settings = api.settings
    return answer(
        Version(
            version=api.version,
            build_sha=settings.build_sha,
            build_time=settings.build_time,
            data_plane="compiled" if compiled.in_use() else "interpreted",
        )
    )
