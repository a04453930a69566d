"""A server that already runs somewhere: ours are only the proxy, the keys and the scheduler in front of it.

Invariant: no process, no GPU claim, nothing is ever stopped. Where it is, and with which key, is the operator's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_bootstrap.engines import failures
from vllm_bootstrap.engines.base import (
    EngineCommand,
    EngineContext,
    ExitFacts,
    Failure,
    LaunchSpec,
    Placement,
    Progress,
    Traits,
)
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.serving import Endpoint, EngineRoute

MAX_CREDENTIAL_BYTES = 8192


@dataclass(frozen=True, slots=True)
class ExternalDefinition:
    """One engine of kind ``external`` from the engines file, checked. ``endpoint`` is without its credential, which
    comes from a variable or a file and is read anew for each launch."""

    endpoint: Endpoint
    served_names: frozenset[str]
    slots: int
    health: str
    routes: tuple[EngineRoute, ...]
    has_metrics: bool = False
    priority_header: bool = False
    priority_field: bool = False
    refuses_http_media: bool = True
    credential_env: str | None = None
    credential_file: Path | None = None


class ExternalEngine:
    """See ``engines.base.Engine``."""

    external = True

    def __init__(self, name: str, definition: ExternalDefinition, environ: Mapping[str, str]) -> None:
        self.name = name
        self._definition = definition
        self._environ = environ

    async def check(self, spec: LaunchSpec, placement: Placement) -> None:  # noqa: ARG002 - it has no place
        """Raises ``BadRequest``: a name it does not serve, options it cannot be given, an unreadable key."""
        names = self._definition.served_names
        if spec.served_model_name not in names:
            param = "model" if spec.served_model_name == spec.model else "served_model_name"
            raise BadRequest(
                f"The engine {self.name!r} serves {', '.join(sorted(names))}, not {spec.served_model_name!r}.",
                param=param,
            )
        for kind, given in (("", spec.fields), ("extra_args.", spec.extra_args), ("env.", spec.env)):
            for name in given:
                raise BadRequest(
                    f"The engine {self.name!r} already runs: {name} cannot be set by a launch.", param=f"{kind}{name}"
                )
        self._credential()

    def needs_port(self, spec: LaunchSpec) -> bool:  # noqa: ARG002 - the same for every launch
        return False

    def command(self, spec: LaunchSpec, placement: Placement, context: EngineContext) -> EngineCommand:  # noqa: ARG002
        credential = self._credential()
        endpoint = replace(self._definition.endpoint, credential=credential)
        return EngineCommand(None, {}, endpoint, (credential,) if credential else ())

    def traits(self, spec: LaunchSpec) -> Traits:  # noqa: ARG002 - the same for every launch
        definition = self._definition
        return Traits(
            routes=definition.routes,
            slots=definition.slots,
            priority_header=definition.priority_header,
            priority_field=definition.priority_field,
            refuses_http_media=definition.refuses_http_media,
            has_metrics=definition.has_metrics,
            health_path=definition.health,
        )

    def attention_heads(self, spec: LaunchSpec) -> int | None:  # noqa: ARG002 - it has no GPUs of ours
        return None

    def progress(self, line: str) -> Progress | None:  # noqa: ARG002 - its log is not ours
        return None

    def explain(self, facts: ExitFacts, log_tail: Sequence[str]) -> Failure:
        return failures.explain(facts, log_tail)

    def _credential(self) -> str | None:
        definition = self._definition
        if definition.credential_env is not None:
            value = self._environ.get(definition.credential_env, "")
            source = f"the variable {definition.credential_env}"
        elif definition.credential_file is not None:
            value = _read(definition.credential_file)
            source = str(definition.credential_file)
        else:
            return None
        if not value or not value.isascii() or not value.isprintable():
            raise BadRequest(f"The key of the engine {self.name!r} cannot be used: look at {source}.", param="engine")
        return value


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_CREDENTIAL_BYTES).strip()
    except (OSError, ValueError):
        return ""
