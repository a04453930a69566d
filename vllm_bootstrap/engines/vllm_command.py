"""vLLM's command line and environment, from spec, place and what the installed version can do. Touches nothing.

Invariant: only flags that ``Capabilities`` has are emitted, secrets go into the environment, and what the daemon sets
cannot be overridden by a launch. The same inputs always give the same result: the golden tests rest on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_bootstrap.engines import arguments
from vllm_bootstrap.engines.base import EngineContext, LaunchSpec, Placement
from vllm_bootstrap.engines.capabilities import Capabilities, lifetime
from vllm_bootstrap.engines.environment import put_first_on_path
from vllm_bootstrap.engines.spec import WHOLE_MILLI, refuse_beyond_share
from vllm_bootstrap.engines.versions import show
from vllm_bootstrap.errors import BadRequest

# vLLM's own default is 256 on small GPUs and 1024 on large ones; naming it makes the number of slots a fact.
DEFAULT_SLOTS = 256
# What vLLM takes of a GPU unless told otherwise, and so what a share is a share of: two halves leave the same margin
# for CUDA contexts and fragmentation as one whole.
WHOLE_GPU_FRACTION = 0.9
# A domain that cannot exist (RFC 2606): an empty list would mean "any".
NO_MEDIA_DOMAIN = "media-disabled.invalid"
ANY_DOMAIN = "*"
# The ranks that vLLM has kernels for: another one is rounded up. Each adapter that may be in one step costs GPU memory.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LORAS_AT_ONCE = 8
_DOMAIN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?")
CPU_KV_CACHE_GIB = 2
# Our own start and stall timeouts end a start; the engine's must never be the first to fire.
ENGINE_READY_TIMEOUT_S = 86_400
# vLLM's own is shorter than many a pause between two requests, which would open a new connection each.
KEEP_ALIVE_S = 120
OWN_KEEP_ALIVE_S = 5
LONGEST_KEEP_ALIVE_S = 3600
_KEEP_ALIVE, _KEEP_ALIVE_SINCE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", (0, 9, 2)
# The stop ladder kills after the grace; the engine must be done draining before that.
SHUTDOWN_MARGIN_S = 2
QUIET_ENDPOINTS = "/health,/metrics,/v1/models,/version"
UUIDS_SINCE = (0, 26, 0)
AUTO_LENGTH_SINCE = (0, 15, 1)
BF16_SINCE = (8, 0)
RELOAD_WEIGHTS_SINCE = (0, 10, 2)

# Field of the spec, flag of vLLM; in the order in which they are written.
FIELD_FLAGS: Mapping[str, str] = {
    "max_model_len": "--max-model-len",
    "kv_cache_memory_bytes": "--kv-cache-memory-bytes",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "quantization": "--quantization",
    "kv_cache_dtype": "--kv-cache-dtype",
    "revision": "--revision",
    "tokenizer": "--tokenizer",
    "seed": "--seed",
    "enforce_eager": "--enforce-eager",
    "enable_prefix_caching": "--enable-prefix-caching",
    "trust_remote_code": "--trust-remote-code",
}


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """The operator's settings that concern vLLM. ``stop_grace_s``: seconds between SIGTERM and SIGKILL."""

    allowed_media_domains: tuple[str, ...] = ()
    stop_grace_s: float = 7.0
    hf_home: str | None = None


def check_domains(domains: Sequence[str]) -> None:
    """Refuse media domains that are no host names. Raises ``ValueError`` with a message for the operator."""
    for domain in domains:
        if domain != ANY_DOMAIN and not _DOMAIN.fullmatch(domain):
            raise ValueError(f"VLLM_BOOTSTRAP_ALLOWED_MEDIA_DOMAINS: {domain!r} is not a host name (or * for all)")


def slots(spec: LaunchSpec) -> int:
    """How many sequences the engine is told to run at once. Never more than the tokens of one step."""
    given = spec.fields.get("max_num_seqs")
    if given is not None:
        return int(given)
    return min(DEFAULT_SLOTS, int(spec.fields.get("max_num_batched_tokens", DEFAULT_SLOTS)))


def flags(
    spec: LaunchSpec, placement: Placement, can: Capabilities, options: VllmOptions, lora_rank: int | None = None
) -> list[str]:
    """Everything of the command line that does not depend on where the engine listens. ``lora_rank``: the largest rank
    of the launch's adapters, None where it is not known.

    Raises ``BadRequest`` naming the field when this version does not have what the launch asks for.
    """
    out = [*_names(spec), f"--dtype={dtype(spec, placement)}"]
    out.append(f"--max-num-seqs={slots(spec)}")
    if placement.tensor_parallel_size > 1:
        out.append(f"--tensor-parallel-size={placement.tensor_parallel_size}")
    if placement.pipeline_parallel_size > 1:
        out.append(f"--pipeline-parallel-size={placement.pipeline_parallel_size}")
    fraction = memory_fraction(spec, placement)
    if fraction is not None:
        out.append(f"--gpu-memory-utilization={fraction:g}")
    out += _fields(spec, placement, can)
    out += _lora(spec, can, lora_rank)
    out += _sleep(spec, placement, can)
    out += _daemon_flags(spec, can, options)
    for name, value in spec.extra_args.items():
        out += _rendered(f"--{name}", value, f"extra_args.{name}", can)
    return out


def _names(spec: LaunchSpec) -> list[str]:
    if not spec.aliases:
        return [f"--served-model-name={spec.served_model_name}"]
    return ["--served-model-name", spec.served_model_name, *spec.aliases]


def _lora(spec: LaunchSpec, can: Capabilities, rank: int | None) -> list[str]:
    """What makes the adapters models of their own. The launch's extra arguments win over what is chosen here."""
    if not spec.adapters:
        return []
    chosen: dict[str, Any] = {"enable-lora": True, "max-loras": min(len(spec.adapters), LORAS_AT_ONCE)}
    if len(spec.adapters) > LORAS_AT_ONCE:
        chosen["max-cpu-loras"] = len(spec.adapters)
    if rank is not None:
        chosen["max-lora-rank"] = next((known for known in LORA_RANKS if known >= rank), rank)
    out: list[str] = []
    for name, value in chosen.items():
        if name not in spec.extra_args:
            out += _rendered(f"--{name}", value, "adapters", can)
    modules = [_lora_module(name, source) for name, source in spec.adapters.items()]
    return out + _rendered("--lora-modules", modules, "adapters", can)


def sleep_levels(spec: LaunchSpec, can: Capabilities) -> tuple[int, ...]:
    """At which levels an engine of this launch can sleep. The second one needs its weights to be loadable again."""
    if not spec.sleep or not can.has("--uds") or not can.has("--enable-sleep-mode"):
        return ()
    return (1, 2) if can.basis >= RELOAD_WEIGHTS_SINCE else (1,)


def _sleep(spec: LaunchSpec, placement: Placement, can: Capabilities) -> list[str]:
    if not spec.sleep:
        return []
    if placement.kind == "cpu":
        raise BadRequest("sleep: vLLM on CPUs has no sleep mode.", param="sleep")
    if not can.has("--uds"):  # the routes that put it to sleep also run code: nobody else may reach them
        raise BadRequest(
            f"sleep: vLLM {show(can.version)} cannot listen on a Unix socket, and its sleep routes must be private.",
            param="sleep",
        )
    if "enable-sleep-mode" in spec.extra_args:
        raise BadRequest(
            "extra_args.enable-sleep-mode: use the field sleep instead.", param="extra_args.enable-sleep-mode"
        )
    if spec.sleep not in sleep_levels(spec, can):
        since = show(RELOAD_WEIGHTS_SINCE)
        raise BadRequest(
            f"sleep: level {spec.sleep} needs vLLM {since} or newer, this is {show(can.version)}.", param="sleep"
        )
    return _rendered("--enable-sleep-mode", True, "sleep", can)


def _lora_module(name: str, source: str) -> str:
    """``name=path``; as JSON where that could be read in another way."""
    if any(sign in name + source for sign in "=,") or name.startswith("{"):
        return json.dumps({"name": name, "path": source})
    return f"{name}={source}"


def dtype(spec: LaunchSpec, placement: Placement) -> str:
    """1. what was asked for  2. quantized by name → the engine's choice  3. cpu → float32  4. GPUs that all have
    bfloat16 → that, known not to → float16, unknown → the engine's choice."""
    asked = str(spec.fields.get("dtype", "auto"))
    if asked != "auto":  # 1
        return asked
    if "quantization" in spec.fields:  # 2
        return "auto"
    if placement.kind == "cpu":  # 3
        return "float32"
    known = [gpu.capability for gpu in placement.gpus if gpu.capability is not None]  # 4
    if not known or len(known) < len(placement.gpus):
        return "auto"
    return "bfloat16" if min(known) >= BF16_SINCE else "float16"


def memory_fraction(spec: LaunchSpec, placement: Placement) -> float | None:
    """The engine's part of each GPU's memory; None leaves it to the engine. Raises ``BadRequest`` when the launch
    asks for more than its share."""
    asked = spec.fields.get("gpu_memory_utilization")
    if placement.kind == "cpu" or placement.share_milli >= WHOLE_MILLI:
        return None if asked is None else float(asked)
    share = placement.share_milli / WHOLE_MILLI
    if asked is None:
        return round(share * WHOLE_GPU_FRACTION, 3)
    refuse_beyond_share(asked, placement.share_milli)  # also of orders that were stored before this was asked at once
    return float(asked)


def _fields(spec: LaunchSpec, placement: Placement, can: Capabilities) -> list[str]:
    values: dict[str, Any] = dict(spec.fields)
    if placement.kind == "cpu":
        values.setdefault("enforce_eager", True)  # compiling on a CPU needs a C++ compiler and minutes
    if values.get("max_model_len") == "auto" and can.basis < AUTO_LENGTH_SINCE:
        raise BadRequest(
            f"max_model_len 'auto' needs vLLM {show(AUTO_LENGTH_SINCE)} or newer, this is {show(can.version)}: give a "
            "number, or leave it out for the model's own maximum.",
            param="max_model_len",
        )
    out: list[str] = []
    for name, flag in FIELD_FLAGS.items():
        if name in values:
            out += _rendered(flag, values[name], name, can)
    return out


def _rendered(flag: str, value: Any, param: str, can: Capabilities) -> list[str]:
    kind = can.kind(flag)
    if kind is None:
        raise BadRequest(f"{param}: vLLM {show(can.version)} has no {flag} (it is in {lifetime(flag)}).", param=param)
    return arguments.render(flag, kind, value, param)


def _daemon_flags(spec: LaunchSpec, can: Capabilities, options: VllmOptions) -> list[str]:
    out = ["--scheduling-policy=priority"]
    if can.has("--shutdown-timeout"):
        out.append(f"--shutdown-timeout={max(0, int(options.stop_grace_s - SHUTDOWN_MARGIN_S))}")
    if can.has("--disable-access-log-for-endpoints"):
        out.append(f"--disable-access-log-for-endpoints={QUIET_ENDPOINTS}")
    else:
        out.append("--disable-uvicorn-access-log")
    # Request logs hold prompts: off, unless the launch asks for them.
    if not {"enable-log-requests", "disable-log-requests"} & spec.extra_args.keys():
        logs_requests = can.has("--enable-log-requests")
        out.append("--no-enable-log-requests" if logs_requests else "--disable-log-requests")
    if can.has("--allowed-media-domains") and ANY_DOMAIN not in options.allowed_media_domains:
        out += ["--allowed-media-domains", *(options.allowed_media_domains or (NO_MEDIA_DOMAIN,))]
    return out


def listen_flags(context: EngineContext, can: Capabilities) -> list[str]:
    """A Unix socket where this version can, else the loopback port that the context brings."""
    if can.has("--uds"):
        return [f"--uds={context.uds_path}"]
    return [f"--host={context.host}", f"--port={context.port}"]


def environment(
    spec: LaunchSpec,
    placement: Placement,
    context: EngineContext,
    can: Capabilities,
    options: VllmOptions,
    bin_dir: str | None,
) -> dict[str, str]:
    """The engine's environment, weakest first: inherited, our defaults, the launch's, what must hold."""
    env = dict(context.base_env)
    if bin_dir is not None:
        env = put_first_on_path(env, bin_dir)
    if options.hf_home is not None:
        env["HF_HOME"] = options.hf_home
    env |= _defaults(spec, placement, can)
    env |= spec.env
    env |= _forced(context, can)
    if sleep_levels(spec, can):
        env["VLLM_SERVER_DEV_MODE"] = "1"  # opens the sleep routes, and many more: the socket is the daemon's alone
    env |= _devices(placement, can)
    if not can.has("--uds"):
        env["VLLM_API_KEY"] = context.internal_key
    if context.hf_token is not None:
        env["HF_TOKEN"] = context.hf_token
    return env


def keep_alive_s(env: Mapping[str, str], can: Capabilities) -> float:
    """How long vLLM keeps an idle connection in this environment. It reads a whole number, or does not start."""
    if can.basis < _KEEP_ALIVE_SINCE:
        return OWN_KEEP_ALIVE_S
    try:
        return min(int(env[_KEEP_ALIVE]), LONGEST_KEEP_ALIVE_S)
    except (KeyError, ValueError):
        return OWN_KEEP_ALIVE_S


def _defaults(spec: LaunchSpec, placement: Placement, can: Capabilities) -> dict[str, str]:
    env: dict[str, str] = {}
    if can.basis >= _KEEP_ALIVE_SINCE:
        env[_KEEP_ALIVE] = str(KEEP_ALIVE_S)
    if can.basis >= (0, 15, 1):
        env["VLLM_ENGINE_READY_TIMEOUT_S"] = str(ENGINE_READY_TIMEOUT_S)
    # Without a size, recent CPU builds reserve nine tenths of the host's memory and refuse to start below that.
    if placement.kind == "cpu" and not {"kv_cache_memory_bytes", "gpu_memory_utilization"} & spec.fields.keys():
        env["VLLM_CPU_KVCACHE_SPACE"] = str(CPU_KV_CACHE_GIB)
    return env


def _forced(context: EngineContext, can: Capabilities) -> dict[str, str]:
    env = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        "NO_COLOR": "1",
        "TMPDIR": context.tmp_dir,
        "DO_NOT_TRACK": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for since, more in _FORCED_SINCE:
        if can.basis >= since:
            env |= more
    if can.basis >= (0, 10, 2):
        env["VLLM_PROCESS_NAME_PREFIX"] = f"VBS-{context.launch_id}"
    if can.basis >= (0, 12, 0):
        env["VLLM_RPC_BASE_PATH"] = context.tmp_dir
    return env


_FORCED_SINCE: Sequence[tuple[tuple[int, int, int], Mapping[str, str]]] = (
    ((0, 10, 2), {"VLLM_ENABLE_RESPONSES_API_STORE": "0"}),
    ((0, 12, 0), {"VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0", "VLLM_LOGGING_COLOR": "0"}),
    ((0, 15, 1), {"VLLM_DISABLE_LOG_LOGO": "1"}),
)


def _devices(placement: Placement, can: Capabilities) -> dict[str, str]:
    if placement.kind != "cuda":
        return {}
    # Older releases parse the list as numbers. NVML counts in PCI order, CUDA by default in order of speed.
    by_uuid = can.version >= UUIDS_SINCE
    visible = ",".join(gpu.uuid if by_uuid else str(gpu.index) for gpu in placement.gpus)
    return {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
