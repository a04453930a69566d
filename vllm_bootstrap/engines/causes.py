"""Known causes of a failed start, as patterns over vLLM's log lines with message and advice. PURE data.

Order matters: the first cause that any line shows wins, so what is specific comes before what it also looks like.
``tests/fixtures/engine_logs`` says which of them were captured from a real engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_bootstrap.engines.base import FailureClass

Text = str | Callable[[re.Match[str]], str]


@dataclass(frozen=True, slots=True)
class Cause:
    """``permanent``: trying again cannot help. ``any_time``: also kills an engine that is already serving."""

    name: str
    failure_class: FailureClass
    pattern: re.Pattern[str]
    message: Text
    hint: Text
    permanent: bool = True
    any_time: bool = False


def _shorter(match: re.Match[str]) -> str:
    longest = match["longest"]
    if longest is None or int(longest) < 1:
        return "Give the launch more memory (gpu_memory_utilization or gpu_share), or lower max_model_len."
    return (
        f"Launch with max_model_len {longest} or less, or give it more memory (gpu_memory_utilization, gpu_share; on "
        "a CPU the variable VLLM_CPU_KVCACHE_SPACE)."
    )


def _too_long(match: re.Match[str]) -> str:
    largest = re.search(r"=(\d+)", match["derived"])
    limit = f" {largest[1]} or less" if largest else " a smaller one"
    return f"Launch with max_model_len{limit}, or leave it out for the model's own maximum."


_NO_KV_ROOM = "The memory left for the key-value cache does not hold one request of the full length."
_NO_GPU_ROOM = "The GPU had not enough free memory."
_MODEL_HINT = (
    "Check the spelling of the repository id, or that the path exists and is readable by the engine, and revision if "
    "you gave one."
)
_NOT_CACHED = "The model is not in the local cache, and "
_OUTDATED = (
    "The engine's libraries do not fit together. Install the versions that this vLLM release asks for (pip check in "
    "the engine's environment), or use another release."
)

CAUSES: Sequence[Cause] = (
    Cause(
        "bad flag",
        FailureClass.BAD_FLAG,
        re.compile(r"[\w.-]+: error: (?P<what>(?:unrecognized arguments|argument |ambiguous option|the following).*)"),
        lambda match: f"The engine does not understand its command line: {match['what'][:300]}",
        "Check extra_args against this vLLM version (vllm serve --help=all).",
    ),
    Cause(
        "KV cache too small",
        FailureClass.KV_CACHE_TOO_SMALL,
        re.compile(
            r"To serve at least one request with the model(?:'s|s's)? max seq len \(\d+\)"
            r"(?:.*estimated maximum model length is (?P<longest>\d+))?"
        ),
        _NO_KV_ROOM,
        _shorter,
    ),
    Cause(
        "KV cache too small, old wording",
        FailureClass.KV_CACHE_TOO_SMALL,
        re.compile(
            r"max seq len \(\d+\) is larger than the maximum number of tokens that can be stored in KV cache "
            r"\((?P<longest>\d+)\)"
        ),
        _NO_KV_ROOM,
        _shorter,
    ),
    Cause(
        "no KV cache",
        FailureClass.KV_CACHE_TOO_SMALL,
        re.compile(r"No available memory for the cache blocks"),
        "No memory is left for the key-value cache once the model is loaded.",
        "Give the launch more memory (gpu_memory_utilization or gpu_share), use more GPUs or a smaller or quantized "
        "model; on a CPU raise VLLM_CPU_KVCACHE_SPACE.",
    ),
    Cause(
        "GPU already in use",
        FailureClass.GPU_OUT_OF_MEMORY,
        re.compile(
            r"Free memory on device .*?\((?P<free>[\d.]+)/(?P<all>[\d.]+) GiB\).* is less than desired GPU memory "
            r"utilization"
        ),
        lambda match: f"Only {match['free']} of {match['all']} GiB of the GPU were free at start.",
        "Something else uses this GPU (GET /gpus). Wait for it, choose another GPU, or lower gpu_memory_utilization.",
        permanent=False,
    ),
    Cause(
        "host memory too small",
        FailureClass.GPU_OUT_OF_MEMORY,
        re.compile(r"Available memory on node \d+ \((?P<free>[\d.]+)/(?P<all>[\d.]+) GiB\) on .* is less than"),
        lambda match: f"Only {match['free']} of {match['all']} GiB of the host's memory were free at start.",
        "Lower VLLM_CPU_KVCACHE_SPACE, kv_cache_memory_bytes or gpu_memory_utilization, or free host memory.",
        permanent=False,
    ),
    Cause(
        "GPU out of memory",
        FailureClass.GPU_OUT_OF_MEMORY,
        re.compile(r"torch\.(?:cuda\.)?OutOfMemoryError|(?:CUDA|HIP) out of memory|CUDA error: out of memory"),
        "The GPU ran out of memory.",
        "Lower gpu_memory_utilization, max_num_seqs or max_model_len, use more GPUs or a smaller or quantized model.",
        permanent=False,
        any_time=True,
    ),
    Cause(
        "memory changed while measuring",
        FailureClass.GPU_OUT_OF_MEMORY,
        re.compile(r"Error in memory profiling\. Initial free memory"),
        "Another process took or gave back memory of this GPU while the engine was measuring it.",
        "Start again when nothing else uses the GPU.",
        permanent=False,
    ),
    Cause(
        "too few GPUs",
        FailureClass.TOO_FEW_GPUS,
        re.compile(r"World size \((?P<want>\d+)\) is larger than the number of available GPUs \((?P<have>\d+)\)"),
        lambda match: f"The launch needs {match['want']} GPUs, the engine sees {match['have']}.",
        "Lower tensor_parallel_size or pipeline_parallel_size, or check that the engine's CUDA sees all GPUs.",
    ),
    Cause(
        "gated repository",
        FailureClass.GATED_REPOSITORY,
        re.compile(
            r"GatedRepoError|Cannot access gated repo|You are trying to access a gated repo|"
            r"Access to model .* is restricted"
        ),
        "The model's repository is gated.",
        "Accept the model's licence on its page and set HF_TOKEN of the daemon to a token that may read it.",
    ),
    Cause(
        "model not found",
        FailureClass.MODEL_NOT_FOUND,
        re.compile(
            r"RepositoryNotFoundError|RevisionNotFoundError|HFValidationError: Repo id must be|"
            r"OSError: Repo id must be|is not a local folder and is not a valid model identifier|"
            r"Invalid repository ID or local directory specified|does not appear to have a file named config\.json"
        ),
        "There is no such model: neither a folder with a model in it nor a repository that can be read.",
        _MODEL_HINT + " A private repository needs HF_TOKEN.",
    ),
    Cause(
        "downloads turned off",
        FailureClass.MODEL_NOT_FOUND,
        re.compile(r"outgoing traffic has been disabled|OfflineModeIsEnabled"),
        _NOT_CACHED + "downloads are turned off.",
        "Unset HF_HUB_OFFLINE, or download the model first. " + _MODEL_HINT,
    ),
    Cause(
        "hub unreachable",
        FailureClass.MODEL_NOT_FOUND,
        re.compile(r"We couldn't connect to 'https?://[^']*' to load the files|ConnectError: |MaxRetryError"),
        _NOT_CACHED + "the hub could not be reached.",
        "Check the network of this machine (proxy, DNS), or set HF_HUB_OFFLINE=1 and download the model elsewhere.",
        permanent=False,
    ),
    Cause(
        "model not downloaded",
        FailureClass.MODEL_NOT_FOUND,
        re.compile(r"LocalEntryNotFoundError"),
        _NOT_CACHED + "it could not be downloaded.",
        "Download the model first. " + _MODEL_HINT,
    ),
    Cause(
        "token refused",
        FailureClass.GATED_REPOSITORY,
        re.compile(r"40[13] Client Error|Invalid user token|Invalid credentials in Authorization header"),
        "The hub refused the token, or wants one.",
        "Set HF_TOKEN of the daemon to a valid token that may read this model.",
    ),
    Cause(
        "incomplete model",
        FailureClass.MODEL_NOT_FOUND,
        re.compile(r"Cannot find any model weights with|Couldn't instantiate the backend tokenizer"),
        "The model's folder is incomplete: weights or tokenizer are missing.",
        "Download the model again, or name a folder that has config, tokenizer and weights.",
    ),
    Cause(
        "damaged weights",
        FailureClass.MODEL_NOT_FOUND,
        re.compile(r"SafetensorError: Error while deserializing|PytorchStreamReader failed"),
        "A weight file of the model is damaged or incomplete.",
        "Delete the file and download the model again.",
    ),
    Cause(
        "tokenizer library",
        FailureClass.INCOMPATIBLE_LIBRARY,
        re.compile(r"has no attribute '?all_special_tokens_extended"),
        "This vLLM and the installed transformers do not fit together (all_special_tokens_extended is gone).",
        "Install transformers below 5 in the engine's environment, or a newer vLLM.",
    ),
    Cause(
        "tqdm library",
        FailureClass.INCOMPATIBLE_LIBRARY,
        re.compile(r"tqdm_asyncio.*'disable'|multiple values for keyword argument 'disable'"),
        "This vLLM and the installed huggingface_hub do not fit together (tqdm's 'disable' is given twice).",
        "Install the huggingface_hub that this vLLM release asks for, or a newer vLLM.",
    ),
    Cause(
        "unknown architecture",
        FailureClass.INCOMPATIBLE_LIBRARY,
        re.compile(r"does not recognize this architecture|Model architectures? .* (?:are|is) not supported"),
        "The engine does not know this model's architecture.",
        "Use a newer vLLM, or upgrade transformers in the engine's environment if that vLLM allows it.",
    ),
    Cause(
        "driver too old",
        FailureClass.INCOMPATIBLE_LIBRARY,
        re.compile(
            r"NVIDIA driver on your system is too old|CUDA driver version is insufficient|"
            r"no kernel image is available for execution"
        ),
        "GPU, driver and the engine's CUDA do not fit together.",
        "Update the NVIDIA driver, or install a vLLM build for the CUDA version that the driver supports.",
    ),
    Cause(
        "not the vllm distribution",
        FailureClass.INCOMPATIBLE_LIBRARY,
        re.compile(r"PackageNotFoundError: No package metadata was found for vllm"),
        "The vllm program only works in the distribution called vllm, this environment has another build of it.",
        "Set VLLM_BOOTSTRAP_ENGINE_PYTHON instead of a command, so that the module form is used.",
    ),
    Cause(
        "broken import",
        FailureClass.INCOMPATIBLE_LIBRARY,
        re.compile(r"^(?:ImportError|ModuleNotFoundError): |undefined symbol: "),
        "A library of the engine is missing or does not fit.",
        _OUTDATED,
    ),
    Cause(
        "address in use",
        FailureClass.ADDRESS_IN_USE,
        re.compile(r"OSError: \[Errno 98\]|Address already in use"),
        "The engine's port or socket is taken.",
        "Another program took it in between; launching again chooses anew. Move VLLM_LAUNCH_PORT_START/_END away "
        "from ports that others use.",
        permanent=False,
    ),
    Cause(
        "engine too slow",
        FailureClass.START_TIMEOUT,
        re.compile(r"Timed out waiting for engine core processes to start"),
        "The engine gave up waiting for its own processes.",
        "Set VLLM_ENGINE_READY_TIMEOUT_S in env to more seconds.",
        permanent=False,
    ),
    Cause(
        "disk full",
        FailureClass.ENGINE_DIED,
        re.compile(r"\[Errno 28\]|No space left on device"),
        "The engine found no space on disk or in /dev/shm.",
        "Free space where HF_HOME and temporary files lie; in a container give /dev/shm more (--shm-size).",
        permanent=False,
    ),
    Cause(
        "max_model_len too large",
        FailureClass.BAD_FLAG,
        re.compile(
            r"User-specified max_model_len \((?P<asked>\d+)\) is greater than the derived max_model_len "
            r"\((?P<derived>[^)]*)\)"
        ),
        lambda match: f"max_model_len {match['asked']} is more than the model was made for.",
        _too_long,
    ),
    Cause(
        "heads not divisible",
        FailureClass.BAD_FLAG,
        re.compile(
            r"number of attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size \((?P<size>\d+)\)"
        ),
        lambda match: f"{match['size']} GPUs do not divide the model's {match['heads']} attention heads.",
        lambda match: f"Choose a tensor_parallel_size that divides {match['heads']}.",
    ),
    Cause(
        "bad configuration",
        FailureClass.BAD_FLAG,
        re.compile(r"^\s*Value error, (?P<what>.*?)(?: \[type=value_error.*)?$"),
        lambda match: f"The engine refused its configuration: {match['what'][:300]}",
        "Change the field or extra argument it names; the model may not support it.",
    ),
)
