"""The catalogue over HTTP: its models and their states, entries that come and go, loading and unloading, fit.

Invariant: a key that is limited to some models is answered about others exactly as about ones that do not exist. What
an entry may hold is the desk's to judge; here only its name is looked at, because paths must be able to hold it.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query
from starlette.responses import Response

from vllm_bootstrap.api import model_views
from vllm_bootstrap.api.answers import answer
from vllm_bootstrap.api.control import Limit, refuse_body
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Api, Caller, Services
from vllm_bootstrap.auth.scopes import ADMIN, MONITOR
from vllm_bootstrap.auth.types import Principal, Rule
from vllm_bootstrap.errors import BadRequest, Forbidden, ModelNotFound
from vllm_bootstrap.models import names
from vllm_bootstrap.models.types import ModelView
from vllm_bootstrap.wire_models import (
    CheckWish,
    FitInfo,
    ModelRemoved,
    ModelState,
    ModelStatus,
    ModelStatuses,
    NewModel,
)

TAGS = ("models",)
ADMINS, WATCHERS = Rule(scopes=frozenset({ADMIN})), Rule(scopes=frozenset({MONITOR}))
ONE = "/models/{name:path}"
OfState = Annotated[ModelState | None, Query(description="Only models in this state")]
AfterName = Annotated[str | None, Query(max_length=512, description="The last_id of the page before")]


def register(routes: Registrar) -> None:
    """All but the routes that end in a name, which come last: see ``register_last``."""
    bare = [Depends(refuse_body)]
    routes.add("GET", "/models", list_models, WATCHERS, answer=ModelStatuses, tags=TAGS, name="list_catalogue")
    routes.add("POST", "/models", add_model, ADMINS, answer=ModelStatus, status=201, tags=TAGS)
    for word, function in (("load", load_model), ("unload", unload_model)):
        routes.add("POST", f"{ONE}/{word}", function, ADMINS, answer=ModelStatus, tags=TAGS, dependencies=bare)
    routes.add("POST", f"{ONE}/check", check_model, WATCHERS, answer=FitInfo, tags=TAGS)


def register_last(routes: Registrar) -> None:
    """The routes that take whatever stands behind ``/models/``, so that the longer ones must have been tried."""
    routes.add("GET", ONE, read_model, WATCHERS, answer=ModelStatus, tags=TAGS, name="read_catalogue_model")
    routes.add("DELETE", ONE, remove_model, ADMINS, answer=ModelRemoved, tags=TAGS, dependencies=[Depends(refuse_body)])


def may_see(caller: Principal, view: ModelView) -> bool:
    return caller.may_use(view.entry.name, view.entry.source)


def find(api: Services, caller: Principal, name: str) -> ModelView:
    """The model that ``name`` stands for. Raises ``ModelNotFound``, also for one that the key may not see."""
    try:
        view = api.models.get(name)
    except ModelNotFound:
        view = None
    if view is None or not may_see(caller, view):
        raise ModelNotFound(f"The model '{name[:200]}' does not exist or this key may not use it.", param="model")
    return view


def shown(api: Services, view: ModelView) -> ModelStatus:
    """A model with all that is known of it at this moment."""
    name = view.entry.name
    download = next((one for one in api.models.downloads() if one.model == name), None)
    prefetch = next((one for one in api.models.prefetches() if one.model == name), None)
    return model_views.model(view, download, prefetch)


async def list_models(
    api: Api, caller: Caller, *, state: OfState = None, after: AfterName = None, limit: Limit = 1000
) -> Response:
    """All models of the catalogue, by name, with their states. Cheap: answered from memory."""
    downloads = {one.model: one for one in api.models.downloads()}
    prefetches = {one.model: one for one in api.models.prefetches()}
    found = [view for view in api.models.list() if may_see(caller, view) and state in {None, view.state}]
    rows = sorted((view for view in found if after is None or view.entry.name > after), key=lambda v: v.entry.name)
    page = [
        model_views.model(view, downloads.get(view.entry.name), prefetches.get(view.entry.name))
        for view in rows[:limit]
    ]
    last_id = page[-1].name if page else None
    more = len(rows) > limit
    return answer(ModelStatuses(data=page, has_more=more, last_id=last_id, note=api.models.note))


async def read_model(api: Api, caller: Caller, name: str) -> Response:
    """One model, by its name, an alias or the name of an adapter."""
    return answer(shown(api, find(api, caller, name)))


async def add_model(api: Api, caller: Caller, body: NewModel) -> Response:
    """Add a model until it is removed again, also across restarts. The body is an entry of the catalogue, with its
    ``name``; it may not have a name that is taken."""
    api.refuse_in_outage()
    problem = names.problem(body.name)
    if problem is not None:
        raise BadRequest(f"The name {problem}.", param="name")
    if not caller.may_use(body.name, body.source):
        raise Forbidden(f"The key '{caller.name}' is limited to other models.", param="name")
    view = await api.models.add(body.model_dump(exclude_unset=True), caller.name)
    return answer(shown(api, view), 201, {"location": f"/models/{view.entry.name}"})


async def remove_model(api: Api, caller: Caller, name: str) -> Response:
    """Forget a model that was added. Its files stay; what is loaded of it is put away."""
    found = find(api, caller, name).entry.name
    await api.models.remove(found)
    return answer(ModelRemoved(name=found))


async def load_model(
    api: Api,
    caller: Caller,
    name: str,
    *,
    wait: Annotated[bool, Query(description="Answer when it is loaded, or why it cannot be")] = False,
) -> Response:
    """Load a model, making room for it as for a request. Idempotent; tries again what has failed."""
    api.refuse_in_outage()
    view = await api.models.load(find(api, caller, name).entry.name, wait=wait)
    return answer(shown(api, view), 200 if wait else 202)


async def unload_model(
    api: Api,
    caller: Caller,
    name: str,
    *,
    force: Annotated[bool, Query(description="At once, without letting requests finish; a pinned one too")] = False,
) -> Response:
    """Put a model away when what runs there has ended. It is loaded again as soon as somebody asks for it.
    Idempotent."""
    return answer(shown(api, await api.models.unload(find(api, caller, name).entry.name, force=force)))


async def check_model(api: Api, caller: Caller, name: str, body: CheckWish | None = None) -> Response:
    """Whether a model fits into this machine's GPUs, as its entry says or as the body says instead, and what would."""
    wish = body or CheckWish()
    entry = find(api, caller, name).entry
    report = await api.models.check(entry.name, gpu_count=wish.gpu_count, max_model_len=wish.max_model_len)
    return answer(model_views.fit(report))
