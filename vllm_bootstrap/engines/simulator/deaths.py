"""The ways an engine dies while starting, as a table: what it prints, when, and its exit code. Values only.

Wordings are those of vLLM and of the libraries below it, because classifying them is what they are for. Each entry
names the failure class it must be recognised as; a test holds both sides together.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Stage = Literal["arguments", "bind", "config", "load", "memory"]
_INIT_FAILED = (
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"
)


@dataclass(frozen=True, slots=True)
class Death:
    """``text`` (lines) comes from the engine process when ``in_core``, followed by the server's own complaint.
    ``signal``: die by it instead of exiting with ``exit_code``."""

    failure_class: str
    stage: Stage
    text: str
    in_core: bool = False
    exit_code: int = 1
    signal: int | None = None

    @property
    def last_line(self) -> str | None:
        """What the server prints at the very end when its engine process could not start."""
        return _INIT_FAILED if self.in_core else None


DEATHS: Mapping[str, Death] = {
    "gpu_out_of_memory": Death(
        "gpu_out_of_memory",
        "load",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB. GPU 0 has a total capacity of 23.53 "
        "GiB of which 845.38 MiB is free. Including non-PyTorch memory, this process has 22.69 GiB memory in use.",
        in_core=True,
    ),
    "gpu_memory_taken": Death(
        "gpu_out_of_memory",
        "config",
        "ValueError: Free memory on device cuda:0 (3.14/23.53 GiB) on startup is less than desired GPU memory "
        "utilization (0.9, 21.18 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        in_core=True,
    ),
    "kv_cache_too_small": Death(
        "kv_cache_too_small",
        "memory",
        "ValueError: To serve at least one request with the model's max seq len (131072), (16.0 GiB KV cache is "
        "needed, which is larger than the available KV cache memory (4.27 GiB). Based on the available memory, the "
        "estimated maximum model length is 34960. Try increasing `gpu_memory_utilization` or decreasing "
        "`max_model_len` when initializing the engine.",
        in_core=True,
    ),
    "kv_cache_none": Death(
        "kv_cache_too_small",
        "memory",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
        "initializing the engine.",
        in_core=True,
    ),
    "bad_flag": Death(
        "bad_flag",
        "arguments",
        "usage: api_server.py [-h] [--headless] [--api-server-count API_SERVER_COUNT]\n"
        "api_server.py: error: unrecognized arguments: --no-such-flag",
        exit_code=2,
    ),
    "model_not_found": Death(
        "model_not_found",
        "config",
        "huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error.\n"
        "OSError: no/such-model is not a local folder and is not a valid model identifier listed on "
        "'https://huggingface.co/models'",
    ),
    "model_path_bad": Death(
        "model_not_found",
        "config",
        "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or "
        "'namespace/repo_name': '/no/such/model'. Use `repo_type` argument if needed.\n"
        "OSError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/no/such/model'.",
    ),
    "gated_repository": Death(
        "gated_repository",
        "config",
        "huggingface_hub.errors.GatedRepoError: 401 Client Error.\n"
        "OSError: You are trying to access a gated repo.\n"
        "Access to model some/gated-model is restricted. You must have access to it and be authenticated to access "
        "it. Please log in.",
    ),
    "incompatible_library": Death(
        "incompatible_library",
        "config",
        "AttributeError: Qwen2Tokenizer has no attribute all_special_tokens_extended",
    ),
    "incompatible_tqdm": Death(
        "incompatible_library",
        "load",
        "TypeError: tqdm.asyncio.tqdm_asyncio.__init__() got multiple values for keyword argument 'disable'",
        in_core=True,
    ),
    "address_in_use": Death("address_in_use", "bind", "OSError: [Errno 98] Address already in use"),
    "too_few_gpus": Death(
        "too_few_gpus",
        "config",
        "ValueError: World size (8) is larger than the number of available GPUs (2) in this node. If this is "
        "intentional and you are using:\n"
        "- ray, set '--distributed-executor-backend ray'.\n"
        "- multiprocessing, set '--nnodes' appropriately.",
    ),
    "start_timeout": Death(
        "start_timeout",
        "memory",
        "TimeoutError: Timed out waiting for engine core processes to start. This is often caused by slow weight "
        "loading for large models. Waited 600s (configured by VLLM_ENGINE_READY_TIMEOUT_S).",
    ),
    "engine_died": Death("engine_died", "load", "RuntimeError: CUDA error: unspecified launch failure", in_core=True),
    "killed_by_signal": Death("killed_by_signal", "load", "", signal=signal.SIGKILL),
}
