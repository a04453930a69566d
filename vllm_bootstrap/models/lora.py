"""What an uploaded LoRA adapter must be: which files it may have, and what must be in them. PURE.

Invariant: what passes has nothing in it that runs when it is loaded (no pickles, no code) and no name that leads out of
its folder. Problems are sentences for the person who uploads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

from vllm_bootstrap.models.tensors import ELEMENT_BYTES, parse_header

CONFIG = "adapter_config.json"
MAX_JSON_BYTES = 16 * 1024**2
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_FILES = 200
_WEIGHTS = ".safetensors"
_ALLOWED = (".json", ".txt", ".md", ".jinja", ".model", ".tiktoken", _WEIGHTS)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".h5", ".msgpack")
_CODE = (".py", ".so", ".sh", ".ipynb")
_PLAIN = frozenset({"LICENSE", "NOTICE", "README"})
_SILENT = frozenset({".DS_Store", "Thumbs.db", ".gitattributes", ".gitignore"})
_NOT_IN_VLLM = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")


class NotAnAdapter(ValueError):
    """What was uploaded cannot be taken; the message says why and what to do."""


def place(name: str) -> tuple[str, ...] | None:
    """The parts of a path in an archive, None for what is silently left out (folders' and desktops' own files).

    Raises ``NotAnAdapter`` for a path that leads elsewhere.
    """
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in parts or (parts and ":" in parts[0]):
        raise NotAnAdapter(f"The archive has a path that leads out of its folder: {name[:200]!r}.")
    if not name.isprintable() or len(name.encode("utf-8", "replace")) > 1000:
        raise NotAnAdapter(f"The archive has a name that cannot be a file's: {name[:200]!r}.")
    if not parts or "__MACOSX" in parts or parts[-1] in _SILENT or parts[-1].startswith("._"):
        return None
    return tuple(parts)


def check_name(name: str) -> None:
    """Raises ``NotAnAdapter`` for a file that an adapter may not have."""
    lower = name.lower()
    if lower.endswith(_PICKLES):
        raise NotAnAdapter(
            f"{name} is not taken: it can run code when it is loaded. Save the adapter as safetensors "
            "(save_pretrained does that by default) and leave files of the training out."
        )
    if lower.endswith(_CODE):
        raise NotAnAdapter(f"{name} is not taken: an adapter consists of data only. Leave it out.")
    if name.startswith(".") or not (lower.endswith(_ALLOWED) or name in _PLAIN):
        allowed = ", ".join(_ALLOWED)
        raise NotAnAdapter(f"{name} is not taken: an adapter may have files that end in {allowed}. Leave it out.")


def common_folder(paths: list[tuple[str, ...]]) -> int:
    """How many leading folders all files share: they are dropped. Raises ``NotAnAdapter`` when the files still lie in
    several folders then, or two have the same name."""
    if not paths:
        raise NotAnAdapter("The archive is empty.")
    depth = min(len(path) for path in paths) - 1
    shared = 0
    while shared < depth and len({path[shared] for path in paths}) == 1:
        shared += 1
    deeper = [path for path in paths if len(path) > shared + 1]
    if deeper:
        raise NotAnAdapter(
            f"An adapter's files lie in one folder, {'/'.join(deeper[0])} lies in another. Pack one adapter alone."
        )
    if len({path[-1] for path in paths}) != len(paths):
        raise NotAnAdapter("The archive has two files of the same name.")
    return shared


def check_config(raw: bytes) -> int:
    """Judge ``adapter_config.json``; returns the rank. Raises ``NotAnAdapter``."""
    config = _decoded(raw)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise NotAnAdapter(f"{CONFIG}: peft_type is {str(kind)[:50]!r}, only LORA is served.")
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= 4096:
        raise NotAnAdapter(f"{CONFIG}: r must be the rank, a whole number from 1.")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise NotAnAdapter(f"{CONFIG}: lora_alpha must be a number.")
    if not isinstance(config.get("target_modules"), list | str):
        raise NotAnAdapter(f"{CONFIG}: target_modules must say which modules were trained.")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise NotAnAdapter(f"{CONFIG}: base_model_name_or_path must name the model it was trained on.")
    for name in _NOT_IN_VLLM:
        if config.get(name):
            raise NotAnAdapter(f"{CONFIG}: vLLM does not serve adapters with {name}.")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGING_INITS):
        raise NotAnAdapter(
            f"{CONFIG}: init_lora_weights {init!r} changes the base model's weights. Convert the adapter with PEFT's "
            "path_initial_model_for_weight_conversion."
        )
    return _largest(config, rank)


def _largest(config: Mapping[str, Any], rank: int) -> int:
    """The largest rank any module has: what an engine must make room for."""
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise NotAnAdapter(f"{CONFIG}: rank_pattern must be an object.")
    ranks = [value for value in pattern.values() if isinstance(value, int)]
    if len(ranks) != len(pattern) or any(not 1 <= value <= 4096 for value in ranks):
        raise NotAnAdapter(f"{CONFIG}: rank_pattern must hold whole numbers from 1.")
    return max([rank, *ranks])


def _decoded(raw: bytes) -> Mapping[str, Any]:
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError):
        raise NotAnAdapter(f"{CONFIG} is not JSON.") from None
    if not isinstance(config, dict):
        raise NotAnAdapter(f"{CONFIG} must be an object.")
    return config


def header_length(name: str, first: bytes, size: int) -> int:
    """Bytes of the header of a safetensors file, from its first eight. ``size``: of the whole file."""
    length = int.from_bytes(first, "little")
    if len(first) != 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise NotAnAdapter(f"{name} is not a safetensors file.")
    return length


def check_header(name: str, raw: bytes, data_bytes: int) -> None:
    """Judge the header of a safetensors file that has ``data_bytes`` behind it: every tensor has the size that its type
    and shape say, and together they are all there is. Raises ``NotAnAdapter``."""
    try:
        tensors = parse_header(raw)
    except ValueError:
        raise NotAnAdapter(f"{name} has a header that cannot be read.") from None
    if not tensors:
        raise NotAnAdapter(f"{name} has no tensors.")
    end = 0
    for start, stop in sorted(_extent(name, tensor, about) for tensor, about in tensors.items()):
        if start != end:
            raise NotAnAdapter(f"{name} has tensors that overlap, or a gap between them.")
        end = stop
    if end != data_bytes:
        raise NotAnAdapter(f"{name} is cut off or has something behind its tensors.")


def _extent(name: str, tensor: str, about: Mapping[str, Any]) -> tuple[int, int]:
    dtype, shape, offsets = about.get("dtype"), _counts(about.get("shape")), _counts(about.get("data_offsets"))
    element = ELEMENT_BYTES.get(dtype) if isinstance(dtype, str) else None
    if shape is None or offsets is None or len(offsets) != 2 or element is None:
        raise NotAnAdapter(f"{name}: the tensor {tensor[:100]!r} is described in a way that cannot be read.")
    if offsets[1] - offsets[0] != int(prod(shape) * element):
        raise NotAnAdapter(f"{name}: the tensor {tensor[:100]!r} is not as large as it says.")
    return offsets[0], offsets[1]


def _counts(value: object) -> list[int] | None:
    """A list of whole numbers from 0, None for anything else."""
    if isinstance(value, list) and all(isinstance(item, int) and item >= 0 for item in value):
        return value
    return None
