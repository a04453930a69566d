"""The engine ``simulator``: our own runnable engine without a model, started like any other.

Invariant: it is treated as a real engine everywhere: a process tree, a Unix socket, an internal key, vLLM's routes and
log lines. It takes vLLM's typed fields, so that a launch meant for vLLM can be tried here, and its knobs (delays,
failures, speeds) through ``extra_args``. Nothing of the simulator but its table of knobs is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

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
from vllm_bootstrap.engines.failures import explain
from vllm_bootstrap.engines.phases import parse_progress
from vllm_bootstrap.engines.routes import vllm_routes
from vllm_bootstrap.engines.simulator import knobs
from vllm_bootstrap.engines.vllm_command import KEEP_ALIVE_S, LONGEST_KEEP_ALIVE_S, memory_fraction
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.serving import Endpoint

MODULE = "vllm_bootstrap.engines.simulator"
DEFAULT_SLOTS = 32
# The stop ladder kills after the grace; draining must be over before that.
SHUTDOWN_MARGIN_S = 2
_KEEP_ALIVE = "--keep-alive-timeout="
# Without a model there is no code to trust; the memory fraction depends on the share and is set apart.
_NOT_PASSED = {"trust_remote_code", "gpu_memory_utilization"}


class SimulatorEngine:
    """See the module. ``mock_memory_file``: where launches with the knob ``mock-memory-bytes`` show their use.
    ``stop_grace_s``: seconds between SIGTERM and SIGKILL. ``hf_home``: where pretended downloads go."""

    name = "simulator"
    serves_more_names = True
    can_sleep = True

    def __init__(
        self,
        *,
        stop_grace_s: float = 7.0,
        hf_home: str | None = None,
        mock_memory_file: str | None = None,
        python: str = sys.executable,
    ) -> None:
        self._shutdown_timeout_s = max(0, int(stop_grace_s - SHUTDOWN_MARGIN_S))
        self._hf_home = hf_home
        self._mock_memory_file = mock_memory_file
        self._python = python

    async def check(self, spec: LaunchSpec, placement: Placement) -> None:
        """Refuse knobs that do not exist or have the wrong type. Raises ``BadRequest`` naming the field."""
        self._arguments(spec)
        if spec.sleep and placement.kind == "cpu":
            raise BadRequest("sleep: there is no GPU memory to give up on a CPU.", param="sleep")
        if spec.extra_args.get("mock-memory-bytes") and self._mock_memory_file is None:
            raise BadRequest(
                "mock-memory-bytes needs VLLM_BOOTSTRAP_MOCK_GPU_FILE.", param="extra_args.mock-memory-bytes"
            )

    def needs_port(self, spec: LaunchSpec) -> bool:  # noqa: ARG002
        return False

    def command(self, spec: LaunchSpec, placement: Placement, context: EngineContext) -> EngineCommand:
        """Command line and environment; the internal key and the hub token only in the latter."""
        arguments = (f"{_KEEP_ALIVE}{KEEP_ALIVE_S}", *self._arguments(spec))  # of two of a kind the last one counts
        kept_s = [float(one.removeprefix(_KEEP_ALIVE)) for one in arguments if one.startswith(_KEEP_ALIVE)][-1]
        argv = [
            self._python,
            "-m",
            MODULE,
            f"--model={spec.model}",
            *(f"--served-model-name={name}" for name in spec.served_names),
            f"--uds={context.uds_path}",
            f"--tensor-parallel-size={placement.tensor_parallel_size}",
            f"--pipeline-parallel-size={placement.pipeline_parallel_size}",
            f"--shutdown-timeout={self._shutdown_timeout_s}",
            *arguments,
            *(["--enable-sleep-mode"] if spec.sleep else []),
        ]
        fraction = memory_fraction(spec, placement)
        if fraction is not None:
            argv.append(f"--gpu-memory-utilization={fraction:g}")
        if self._mock_memory_file is not None and spec.extra_args.get("mock-memory-bytes"):
            argv.append(f"--mock-memory-file={self._mock_memory_file}")
        return EngineCommand(
            argv=tuple(argv),
            env=self._environment(spec, placement, context),
            endpoint=Endpoint(
                uds=context.uds_path, credential=context.internal_key, keep_alive_s=min(kept_s, LONGEST_KEEP_ALIVE_S)
            ),
            secrets=tuple(filter(None, (context.internal_key, context.hf_token))),
        )

    def traits(self, spec: LaunchSpec) -> Traits:
        slots = spec.fields.get("max_num_seqs") or DEFAULT_SLOTS
        levels = (1, 2) if spec.sleep else ()
        return Traits(routes=vllm_routes(), slots=int(slots), priority_header=True, sleep_levels=levels)

    def attention_heads(self, spec: LaunchSpec) -> int | None:  # noqa: ARG002 - there is no model
        return None

    def progress(self, line: str) -> Progress | None:
        return parse_progress(line)

    def explain(self, facts: ExitFacts, log_tail: Sequence[str]) -> Failure:
        return explain(facts, log_tail)

    def _arguments(self, spec: LaunchSpec) -> tuple[str, ...]:
        fields: Mapping[str, Any] = {k: v for k, v in spec.fields.items() if k not in _NOT_PASSED}
        return (*knobs.field_arguments(fields), *knobs.launch_arguments(spec.extra_args))

    def _environment(self, spec: LaunchSpec, placement: Placement, context: EngineContext) -> dict[str, str]:
        env = {
            **context.base_env,
            **({} if self._hf_home is None else {"HF_HOME": self._hf_home}),
            **spec.env,
            "TMPDIR": context.tmp_dir,
            "VLLM_API_KEY": context.internal_key,
            "VLLM_PROCESS_NAME_PREFIX": f"VBS-{context.launch_id}",
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",
            # The simulator reads devices by UUID, whatever their order.
            "CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in placement.gpus),
        }
        if context.hf_token is not None:
            env["HF_TOKEN"] = context.hf_token
        return env
