"""The environment engines get: built from an allow-list, never inherited. PURE: mappings in, mappings out.

Invariant: nothing of the daemon's own settings and no key reaches an engine, and a launch can neither change how
programs are loaded, nor where the engine looks for models, nor through which proxy it talks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import Enum, auto

# What engines need from the daemon's surroundings: paths, locale, libraries, the operator's caches and network.
INHERITED = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH", "LIBRARY_PATH", "CPATH", "CC",
        "CXX", "CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES",
        "NVIDIA_REQUIRE_CUDA", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE",
        "NCCL_SHM_DISABLE", "NCCL_CUMEM_ENABLE", "NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS",
        "MKL_NUM_THREADS", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET",
        "HF_HUB_ENABLE_HF_TRANSFER", "HF_XET_HIGH_PERFORMANCE", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT",
        "TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR", "TORCH_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE", "http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY",
        "NO_PROXY", "ALL_PROXY",
    }
)  # fmt: skip
# The daemon's own, under whatever name they are given. Not even the operator's pass-through lets them in.
_SECRETS = frozenset({"VLLM_ACCESS_KEY", "ORCHESTRATOR_TOKEN", "AUTH_KEYS_FILE", "VLLM_API_KEY", "HF_TOKEN"})
_OWN_PREFIXES = ("VLLM_BOOTSTRAP_", "VBS_")

# Tuning that a launch may set: it changes speed, precision, time limits or the amount of logging, nothing else.
HARMLESS = frozenset(
    {
        "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING",
        "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE",
        "NCCL_SHM_DISABLE", "NCCL_CUMEM_ENABLE", "NCCL_ALGO", "NCCL_PROTO", "VLLM_LOGGING_LEVEL",
        "VLLM_LOG_STATS_INTERVAL", "VLLM_LOG_BATCHSIZE_INTERVAL", "VLLM_ATTENTION_BACKEND", "VLLM_FLASH_ATTN_VERSION",
        "VLLM_KV_CACHE_LAYOUT", "VLLM_MLA_DISABLE", "VLLM_USE_V1", "VLLM_USE_V2_MODEL_RUNNER",
        "VLLM_USE_FLASHINFER_SAMPLER", "VLLM_USE_TRTLLM_ATTENTION", "VLLM_USE_DEEP_GEMM", "VLLM_MOE_USE_DEEP_GEMM",
        "VLLM_DEEP_GEMM_WARMUP", "VLLM_SKIP_DEEP_GEMM_WARMUP", "VLLM_USE_TRITON_FLASH_ATTN", "VLLM_USE_TRITON_AWQ",
        "VLLM_USE_FLASHINFER_MOE_FP16", "VLLM_USE_FLASHINFER_MOE_FP8", "VLLM_USE_FLASHINFER_MOE_FP4",
        "VLLM_USE_FLASHINFER_MOE_INT4", "VLLM_USE_FLASHINFER_MOE_MXFP4_BF16", "VLLM_USE_FLASHINFER_MOE_MXFP4_MXFP8",
        "VLLM_FLASHINFER_MOE_BACKEND", "VLLM_MARLIN_USE_ATOMIC_ADD", "VLLM_FUSED_MOE_CHUNK_SIZE",
        "VLLM_BATCH_INVARIANT", "VLLM_DISABLE_PYNCCL", "VLLM_SKIP_P2P_CHECK", "VLLM_ALLREDUCE_USE_SYMM_MEM",
        "VLLM_USE_NCCL_SYMM_MEM", "VLLM_PP_LAYER_PARTITION", "VLLM_DISABLE_COMPILE_CACHE",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN", "VLLM_MAX_N_SEQUENCES", "VLLM_SLEEP_WHEN_IDLE",
        "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_SGL_KERNEL", "VLLM_CPU_MOE_PREPACK", "VLLM_ENGINE_READY_TIMEOUT_S",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "VLLM_ENGINE_ITERATION_TIMEOUT_S", "VLLM_RPC_TIMEOUT",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "VLLM_TOOL_PARSE_REGEX_TIMEOUT_SECONDS", "VLLM_XGRAMMAR_CACHE_MB",
        "VLLM_IMAGE_FETCH_TIMEOUT", "VLLM_VIDEO_FETCH_TIMEOUT", "VLLM_AUDIO_FETCH_TIMEOUT",
        "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", "VLLM_MEDIA_LOADING_THREAD_COUNT", "VLLM_MM_INPUT_CACHE_GIB",
        "VLLM_ROCM_USE_AITER", "VLLM_ROCM_USE_SKINNY_GEMM", "VLLM_ROCM_CUSTOM_PAGED_ATTN",
    }
)  # fmt: skip
_NEVER = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "IFS", "ENV", "BASH_ENV", "TMPDIR", "TEMP", "TMP", "CDPATH",
        "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES", "VLLM_PORT", "VLLM_HOST_IP", "VLLM_RPC_BASE_PATH", "VLLM_PROCESS_NAME_PREFIX",
        "VLLM_USE_MODELSCOPE", "VLLM_MODEL_REDIRECT_PATH", "VLLM_MEDIA_URL_ALLOW_REDIRECTS",
        "VLLM_ENABLE_RESPONSES_API_STORE", "VLLM_CONFIGURE_LOGGING", "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH",
        "VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK", "DO_NOT_TRACK", "VLLM_USAGE_STATS_SERVER", "VLLM_USAGE_SOURCE",
        "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE",
    }
)  # fmt: skip
_NEVER_PREFIXES = (
    "LD_", "DYLD_", "PYTHON", "HF_", "HUGGING", "TRANSFORMERS_", "MODELSCOPE_", "SSL_", "AWS_", "S3_", "GIT_",
    "GLIBC_", "MALLOC_", "XDG_", *_OWN_PREFIXES,
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


class Verdict(Enum):
    """May a launch set a variable? ``GUARDED``: only when the operator names it."""

    HARMLESS = auto()
    GUARDED = auto()
    NEVER = auto()


def judge(name: str) -> Verdict:
    """What a launch may do with the variable ``name``. Names are compared without regard to case: some programs
    read both spellings."""
    upper = name.upper()
    if not _NAME.fullmatch(name) or upper in _NEVER or upper in _SECRETS or upper.startswith(_NEVER_PREFIXES):
        return Verdict.NEVER
    if upper.endswith("_PROXY"):
        return Verdict.NEVER
    return Verdict.HARMLESS if name in HARMLESS else Verdict.GUARDED


def base_environment(environ: Mapping[str, str], *, passthrough: Iterable[str] = ()) -> dict[str, str]:
    """What engines inherit: the allow-listed part of ``environ`` and what the operator passes through by name."""
    wanted = {name for name in environ if name in INHERITED or name.startswith("LC_")}
    wanted |= {name for name in passthrough if name in environ}
    return {name: environ[name] for name in sorted(wanted) if not is_own(name)}


def is_own(name: str) -> bool:
    """Whether a variable is the daemon's own: a setting of ours, or a secret."""
    return name in _SECRETS or name.startswith(_OWN_PREFIXES)


def put_first_on_path(env: Mapping[str, str], folder: str) -> dict[str, str]:
    """``env`` with ``folder`` searched first, so that an engine finds the tools of its own environment."""
    before = env.get("PATH", "/usr/local/bin:/usr/bin:/bin")
    return {**env, "PATH": f"{folder}:{before}"}
