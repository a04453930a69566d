"""Whether a launch could be made of a model, asked of the same rules that launches pass. Starts nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from vllm_bootstrap.engines.base import Engine
from vllm_bootstrap.engines.spec import make_spec
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.gpus.placement import PlacementWish
from vllm_bootstrap.gpus.replicas import refuse_contradictions
from vllm_bootstrap.launches.types import LaunchOrder
from vllm_bootstrap.models.orders import order_of
from vllm_bootstrap.models.types import ModelEntry


def checker(
    engines: Mapping[str, Engine],
    default_engine: str,
    allow_dangerous: Iterable[str] = (),
    *,
    replicas_max: int | None = None,
) -> Callable[[ModelEntry], None]:
    """A function that raises ``BadRequest`` (``param``: the launch's field) for a model that no launch could serve.
    What depends on the installed version of an engine, or on the GPUs that are here, is found out later."""
    allowed = tuple(allow_dangerous)

    def check(entry: ModelEntry) -> None:
        name = entry.engine or default_engine
        engine = engines.get(name)
        if engine is None:
            known = ", ".join(sorted(engines))
            raise BadRequest(f"engine {name!r} is not known: it must be one of {known}.", param="engine")
        order = order_of(entry)
        make_spec(order, engine, allowed)
        if not getattr(engine, "external", False):  # that one has no place here
            refuse_contradictions(_wish(order), order.replicas, most=replicas_max)

    return check


def _wish(order: LaunchOrder) -> PlacementWish:
    return PlacementWish(
        gpu_ids=order.gpu_ids,
        gpu_count=order.gpu_count,
        gpu_share=order.gpu_share,
        tensor_parallel_size=order.tensor_parallel_size,
        pipeline_parallel_size=order.pipeline_parallel_size,
    )
