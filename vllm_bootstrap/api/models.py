"""Served models in OpenAI's form, filtered by what the key may use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from starlette.responses import Response

from vllm_bootstrap.api.answers import answer
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Api, Caller, Services
from vllm_bootstrap.auth.scopes import INFERENCE, MONITOR
from vllm_bootstrap.auth.types import Principal, Rule
from vllm_bootstrap.errors import ModelNotFound
from vllm_bootstrap.launches.types import LaunchView
from vllm_bootstrap.serving import Advert
from vllm_bootstrap.wire import ModelInfo, ModelListing

ModelStatus = Literal["loaded", "loading", "unresponsive", "unloading"]
_BEST_FIRST: tuple[ModelStatus, ...] = ("loaded", "loading", "unresponsive", "unloading")


def register(routes: Registrar) -> None:
    rule = Rule(scopes=INFERENCE | {MONITOR})
    tags = ("data plane",)
    routes.add("GET", "/v1/models", list_models, rule, answer=ModelListing, tags=tags, any_query=True)
    routes.add("GET", "/v1/models/{model:path}", read_model, rule, answer=ModelInfo, tags=tags, any_query=True)


async def list_models(api: Api, caller: Caller) -> Response:
    """Models that active launches serve and this key may use."""
    return answer(ModelListing(data=list(_visible(api, caller).values())))


async def read_model(api: Api, caller: Caller, model: str) -> Response:
    """One of them."""
    found = _visible(api, caller).get(model)
    if found is None:
        raise ModelNotFound(f"The model '{model[:200]}' does not exist or this key may not use it.", param="model")
    return answer(found)


def _visible(api: Services, caller: Principal) -> dict[str, ModelInfo]:
    launches = {view.launch_id: view for view in api.supervisor.list(include_ended=False)}
    return models(api.gate.adverts(), launches, caller)


def models(adverts: Iterable[Advert], launches: Mapping[str, LaunchView], caller: Principal) -> dict[str, ModelInfo]:
    """Served names with what is known of them. Several launches of one name are one model in the best of their
    states; ended launches serve nothing."""
    found: dict[str, ModelInfo] = {}
    for advert in adverts:
        view = launches.get(advert.launch_id)
        if view is None:
            continue
        for name in advert.served_names:
            if caller.may_use(name, advert.base_model):
                found[name] = _merged(found.get(name), _model(name, advert, view))
    return dict(sorted(found.items()))


def _model(name: str, advert: Advert, view: LaunchView) -> ModelInfo:
    return ModelInfo(
        id=name,
        created=int(view.created_at),
        root=advert.base_model,
        status=_status(advert),
        launch_ids=[advert.launch_id],
    )


def _status(advert: Advert) -> ModelStatus:
    if advert.instance is not None:
        return "loaded"
    if advert.state == "ready":
        return "unresponsive"
    return "loading" if advert.state == "bootstrapping" else "unloading"


def _merged(known: ModelInfo | None, other: ModelInfo) -> ModelInfo:
    if known is None:
        return other
    best = min(known, other, key=lambda model: _BEST_FIRST.index(model.status))
    ids = sorted([*known.launch_ids, *other.launch_ids])
    return best.model_copy(update={"created": min(known.created, other.created), "launch_ids": ids})
