"""Any OpenAI-compatible server that the operator described: an argv template, an environment, a health path.

Invariant: only the operator's engines file defines what is executed; a launch fills in values, each inside its own
argument. Secrets may stand in the environment's placeholders, never in those of the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_bootstrap.engines import failures, model_config, phases, template
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
from vllm_bootstrap.engines.environment import is_own
from vllm_bootstrap.engines.spec import FIELDS
from vllm_bootstrap.engines.template import Element
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.serving import Endpoint, EngineRoute

# What a template may use besides the launch's typed fields.
PLACED = frozenset(
    {
        "model", "served_model_name", "uds", "host", "port", "launch_id", "gpu_ids", "gpu_uuids", "gpu_count",
        "gpu_share", "tensor_parallel_size", "pipeline_parallel_size", "tmp_dir",
    }
)  # fmt: skip
SECRET = frozenset({"internal_key", "hf_token"})
_GPU_NUMBERS = frozenset({"tensor_parallel_size", "gpu_ids", "gpu_uuids", "gpu_count"})
ARGV_NAMES = PLACED | FIELDS.keys()
ENV_NAMES = ARGV_NAMES | SECRET


@dataclass(frozen=True, slots=True)
class CommandDefinition:
    """One engine of kind ``command`` from the engines file, checked. ``key``: the engine is told ``internal_key`` and
    wants it as a bearer token. ``env_allowed``: variables a launch may set."""

    argv: tuple[Element, ...]
    env: Mapping[str, str]
    slots: int
    health: str
    routes: tuple[EngineRoute, ...]
    has_metrics: bool = False
    env_allowed: frozenset[str] = frozenset()
    keep_alive_s: float | None = None
    uses: frozenset[str] = field(default=frozenset())

    @property
    def key(self) -> bool:
        return "internal_key" in self.uses


class CommandEngine:
    """See ``engines.base.Engine``."""

    def __init__(self, name: str, definition: CommandDefinition, *, hf_home: Path | None) -> None:
        self.name = name
        self._definition = definition
        self._hf_home = hf_home

    async def check(self, spec: LaunchSpec, placement: Placement) -> None:
        """Raises ``BadRequest`` for anything of the launch that the template has no place for."""
        self._refuse_what_has_no_place(spec, placement)
        values = _values(spec, placement) | dict.fromkeys(("uds", "host", "port", "launch_id", "tmp_dir"), "-")
        template.build(self._definition.argv, values)

    def needs_port(self, spec: LaunchSpec) -> bool:  # noqa: ARG002 - the same for every launch
        return "uds" not in self._definition.uses

    def command(self, spec: LaunchSpec, placement: Placement, context: EngineContext) -> EngineCommand:
        definition = self._definition
        values = _values(spec, placement) | _context_values(context)
        argv = template.build(definition.argv, values)
        secrets = {"internal_key": context.internal_key, "hf_token": context.hf_token or ""}
        env = {name: value for name, value in context.base_env.items() if not is_own(name)}
        env |= {"TMPDIR": context.tmp_dir, "PYTHONUNBUFFERED": "1", **_devices(placement)}
        env |= {name: template.fill(text, _texts(values) | secrets) for name, text in definition.env.items()}
        env |= spec.env
        masked = tuple(secret for secret in secrets.values() if secret)
        return EngineCommand(tuple(argv), env, self._endpoint(context), masked, cwd=context.tmp_dir)

    def traits(self, spec: LaunchSpec) -> Traits:
        definition = self._definition
        given = spec.fields.get("max_num_seqs") if "max_num_seqs" in definition.uses else None
        return Traits(
            routes=definition.routes,
            slots=definition.slots if given is None else int(given),
            refuses_http_media=True,
            has_metrics=definition.has_metrics,
            health_path=definition.health,
        )

    def attention_heads(self, spec: LaunchSpec) -> int | None:
        if "tensor_parallel_size" not in self._definition.uses:
            return None
        return model_config.attention_heads(spec.model, self._hf_home, spec.fields.get("revision"))

    def progress(self, line: str) -> Progress | None:
        return phases.parse_progress(line)

    def explain(self, facts: ExitFacts, log_tail: Sequence[str]) -> Failure:
        return failures.explain(facts, log_tail)

    def _endpoint(self, context: EngineContext) -> Endpoint:
        credential = context.internal_key if self._definition.key else None
        keep_alive_s = self._definition.keep_alive_s
        if "uds" in self._definition.uses:
            return Endpoint(uds=context.uds_path, credential=credential, keep_alive_s=keep_alive_s)
        return Endpoint(host=context.host, port=context.port, credential=credential, keep_alive_s=keep_alive_s)

    def _refuse_what_has_no_place(self, spec: LaunchSpec, placement: Placement) -> None:
        uses = self._definition.uses
        for name in spec.fields:
            if name not in uses:
                raise BadRequest(f"The engine {self.name!r} has no place for {name}.", param=name)
        for name in spec.extra_args:
            raise BadRequest(f"The engine {self.name!r} takes no extra arguments.", param=f"extra_args.{name}")
        for name in spec.env:
            if name not in self._definition.env_allowed:
                raise BadRequest(f"The engine {self.name!r} does not let a launch set {name}.", param=f"env.{name}")
        if placement.tensor_parallel_size > 1 and not uses & {
            "tensor_parallel_size",
            "gpu_ids",
            "gpu_uuids",
            "gpu_count",
        }:
            raise BadRequest(
                f"The engine {self.name!r} is not told how many GPUs it has: give it one with gpu_count 1, or use "
                "{gpu_count} or {tensor_parallel_size} in its template.",
                param="gpu_count",
            )


def _values(spec: LaunchSpec, placement: Placement) -> dict[str, str]:
    values: dict[str, Any] = {
        "model": spec.model,
        "served_model_name": spec.served_model_name,
        "gpu_count": len(placement.gpus),
        "gpu_share": f"{placement.share_milli / 1000:g}",
        "tensor_parallel_size": placement.tensor_parallel_size,
        "pipeline_parallel_size": placement.pipeline_parallel_size,
        "gpu_ids": ",".join(str(gpu.index) for gpu in placement.gpus),
        "gpu_uuids": ",".join(gpu.uuid for gpu in placement.gpus),
        **spec.fields,
    }
    return {name: _text(value) for name, value in values.items()}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _context_values(context: EngineContext) -> dict[str, str]:
    values = {
        "uds": context.uds_path,
        "host": context.host,
        "launch_id": context.launch_id,
        "tmp_dir": context.tmp_dir,
    }
    return values if context.port is None else {**values, "port": str(context.port)}


def _texts(values: Mapping[str, str]) -> dict[str, str]:
    """Every placeholder of an environment has a text: an absent field is an empty one."""
    return {name: values.get(name, "") for name in ARGV_NAMES}


def _devices(placement: Placement) -> dict[str, str]:
    if placement.kind != "cuda":
        return {}
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in placement.gpus),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
