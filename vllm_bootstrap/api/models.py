"""Models in OpenAI's form, filtered by what the key may use: those of the catalogue, and whatever launches serve.

Invariant: answered from memory. A name is one model, whatever stands for it, in the best of its states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from starlette.responses import Response

from vllm_bootstrap.api.answers import answer
from vllm_bootstrap.api.registrar import Registrar
from vllm_bootstrap.api.services import Api, Caller, Services
from vllm_bootstrap.auth.scopes import INFERENCE, MONITOR
from vllm_bootstrap.auth.types import Principal, Rule
from vllm_bootstrap.errors import ModelNotFound
from vllm_bootstrap.launches.types import LaunchView
from vllm_bootstrap.models.types import ModelState, ModelView
from vllm_bootstrap.serving import Advert
from vllm_bootstrap.wire import ModelInfo, ModelListing

ModelStatus = Literal["loaded", "loading", "unresponsive", "unloading", "asleep", "failed", "unloaded"]
_BEST_FIRST: tuple[ModelStatus, ...] = (
    "loaded", "loading", "unresponsive", "unloading", "asleep", "failed", "unloaded",
)  # fmt: skip
_STATUS: Mapping[ModelState, ModelStatus] = {
    "loaded": "loaded", "loading": "loading", "waking": "loading", "unresponsive": "unresponsive",
    "unloading": "unloading", "falling_asleep": "unloading", "asleep": "asleep", "failed": "failed",
    "unloaded": "unloaded",
}  # fmt: skip
_LAUNCH_STATUS: Mapping[str, ModelStatus] = {
    "ready": "unresponsive", "bootstrapping": "loading", "asleep": "asleep", "waking": "loading",
}  # fmt: skip


def register(routes: Registrar) -> None:
    rule = Rule(scopes=INFERENCE | {MONITOR})
    tags = ("data plane",)
    routes.add("GET", "/v1/models", list_models, rule, answer=ModelListing, tags=tags, any_query=True)
    routes.add("GET", "/v1/models/{model:path}", read_model, rule, answer=ModelInfo, tags=tags, any_query=True)


async def list_models(api: Api, caller: Caller) -> Response:
    """Models that this key may use: those of the catalogue, loaded or not, and those that other launches serve."""
    return answer(ModelListing(data=list(_visible(api, caller).values())))


async def read_model(api: Api, caller: Caller, model: str) -> Response:
    """One of them."""
    found = _visible(api, caller).get(model)
    if found is None:
        raise ModelNotFound(f"The model '{model[:200]}' does not exist or this key may not use it.", param="model")
    return answer(found)


def _visible(api: Services, caller: Principal) -> dict[str, ModelInfo]:
    launches = {view.launch_id: view for view in api.supervisor.list(include_ended=False)}
    configured = catalogued(api.models.list(), caller, created=api.started_at)
    return merged(configured, models(api.gate.adverts(), launches, caller))


def catalogued(views: Iterable[ModelView], caller: Principal, *, created: float) -> dict[str, ModelInfo]:
    """The names that the catalogue's models can be asked for under. ``created`` (unix seconds): what is said of those
    that are not loaded."""
    found: dict[str, ModelInfo] = {}
    for view in views:
        length = view.entry.args.get("max_model_len")
        own = ModelInfo(
            id=view.entry.name,
            created=int(view.loaded_at or created),
            root=view.entry.source,
            status=_STATUS[view.state],
            launch_ids=sorted(launch.launch_id for launch in view.launches),
            max_model_len=length if isinstance(length, int) else None,
            description=view.entry.description,
        )
        for info in _names(own, view):
            if caller.may_use(info.id, view.entry.source):
                found[info.id] = info
    return found


def _names(own: ModelInfo, view: ModelView) -> Iterator[ModelInfo]:
    yield own
    for alias in view.entry.aliases:
        yield own.model_copy(update={"id": alias, "alias_of": own.id})
    for adapter in view.entry.adapters:
        lora = {"id": adapter.name, "parent": own.id, "root": adapter.source, "description": None}
        yield own.model_copy(update=lora)
        for alias in adapter.aliases:
            yield own.model_copy(update={**lora, "id": alias, "alias_of": adapter.name})


def models(adverts: Iterable[Advert], launches: Mapping[str, LaunchView], caller: Principal) -> dict[str, ModelInfo]:
    """Names that launches serve, with what is known of them; ended launches serve nothing."""
    found: dict[str, ModelInfo] = {}
    for advert in adverts:
        view = launches.get(advert.launch_id)
        if view is None:
            continue
        for name in advert.served_names:
            if caller.may_use(name, advert.base_model):
                _put(found, _model(name, advert, view))
    return dict(sorted(found.items()))


def merged(configured: Mapping[str, ModelInfo], served: Mapping[str, ModelInfo]) -> dict[str, ModelInfo]:
    """Both, by name. What the catalogue says of a name stays."""
    found = dict(configured)
    for info in served.values():
        _put(found, info)
    return dict(sorted(found.items()))


def _model(name: str, advert: Advert, view: LaunchView) -> ModelInfo:
    return ModelInfo(
        id=name,
        created=int(view.created_at),
        root=advert.base_model,
        status="loaded" if advert.instance is not None else _LAUNCH_STATUS.get(advert.state, "unloading"),
        launch_ids=[advert.launch_id],
    )


def _put(found: dict[str, ModelInfo], other: ModelInfo) -> None:
    """Several launches of one name are one model in the best of their states."""
    known = found.get(other.id)
    if known is None:
        found[other.id] = other
        return
    status = min(known.status, other.status, key=_BEST_FIRST.index)
    created = min(known.created, other.created) if known.launch_ids else other.created
    ids = sorted({*known.launch_ids, *other.launch_ids})
    found[other.id] = known.model_copy(update={"status": status, "created": created, "launch_ids": ids})
