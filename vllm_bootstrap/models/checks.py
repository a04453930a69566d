"""Whether a launch could be made of a model, asked of the same rules that launches pass. Starts nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from vllm_bootstrap.engines.base import Engine
from vllm_bootstrap.engines.spec import make_spec
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.models.orders import order_of
from vllm_bootstrap.models.types import ModelEntry


def checker(
    engines: Mapping[str, Engine], default_engine: str, allow_dangerous: Iterable[str] = ()
) -> Callable[[ModelEntry], None]:
    """A function that raises ``BadRequest`` (``param``: the launch's field) for a model that no launch could serve.
    What depends on the installed version of an engine, or on the GPUs, is found out at its launch."""
    allowed = tuple(allow_dangerous)

    def check(entry: ModelEntry) -> None:
        name = entry.engine or default_engine
        engine = engines.get(name)
        if engine is None:
            known = ", ".join(sorted(engines))
            raise BadRequest(f"engine {name!r} is not known: it must be one of {known}.", param="engine")
        make_spec(order_of(entry), engine, allowed)

    return check
