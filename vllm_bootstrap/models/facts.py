"""What is known of a model's configuration and weights: from its folder, the Hugging Face cache, or the hub.

Locally, only ``config.json``, the index and the headers of safetensors files are read (bounded), never a weight; a
folder that lacks files says so. The hub is asked only when told to, with two small requests and short timeouts. Nothing
is written, no answer is a guess: what is missing is said in ``why``.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from vllm_bootstrap.engines import model_config
from vllm_bootstrap.models import tensors
from vllm_bootstrap.models.tensors import ELEMENT_BYTES, WeightFacts

if TYPE_CHECKING:
    import httpx

MAX_HEADER_BYTES = 32 * 1024 * 1024
MAX_HEADERS_BYTES = 256 * 1024 * 1024
MAX_INDEX_BYTES = 64 * 1024 * 1024
MAX_ANSWER_BYTES = 32 * 1024 * 1024
HUB = "https://huggingface.co"
HUB_TIMEOUT_S = 10.0

_STORED_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Weights of the same model in its vendor's own format, beside the usual ones.
_SECOND_COPIES = ("consolidated", "original/")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "adapter_", "scaler")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """``why``: what is missing and for what reason, None when both are there."""

    config: Mapping[str, Any] | None
    weights: WeightFacts | None
    why: str | None = None


def read_local(source: str, hf_home: Path | None, revision: str | None = None) -> ModelFacts:
    """What lies on this machine. Blocks for as long as the disk takes for some small files; never raises."""
    folder = model_config.local_folder(source, hf_home, revision)
    config = model_config.read_config(source, hf_home, revision)
    if folder is None or config is None:
        return ModelFacts(None, None, f"{source} is not on this machine, or has no config.json")
    try:
        return ModelFacts(config, _weights_in(folder, config))
    except (OSError, ValueError) as exc:
        return ModelFacts(config, None, f"the weights in {folder} cannot be judged: {exc}")


def stamp(source: str, hf_home: Path | None, revision: str | None = None) -> tuple[str, int, int] | None:
    """Changes when the model's folder does, None when there is none. Blocks for two looks at the disk."""
    folder = model_config.local_folder(source, hf_home, revision)
    if folder is None:
        return None
    try:
        return str(folder), folder.stat().st_mtime_ns, (folder / "config.json").stat().st_mtime_ns
    except OSError:
        return None


def _weights_in(folder: Path, config: Mapping[str, Any]) -> WeightFacts:
    """1. the files that the index names, all of them  2. those that are there. Raises ``ValueError`` for none."""
    files = {str(path.relative_to(folder)): path for path in folder.iterdir() if path.is_file()}
    index = next((json.loads(_start(files[name], MAX_INDEX_BYTES)) for name in _INDEXES if name in files), None)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if isinstance(named, dict) and named:  # 1
        wanted = sorted({str(name) for name in named.values()})
        if absent := [name for name in wanted if name not in files]:
            raise ValueError(f"{len(absent)} of {len(wanted)} files are missing")
    else:
        wanted = weight_files(files)  # 2
    if not wanted:
        raise ValueError("there are none")
    if all(name.endswith(".safetensors") for name in wanted):
        return tensors.count(_headers([files[name] for name in wanted]), config)
    return _of_sizes({name: files[name].stat().st_size for name in wanted}, config)


def weight_files(names: Sequence[str] | Mapping[str, object]) -> list[str]:
    """Those of ``names`` that an engine loads: safetensors where there are any, else the older kinds."""
    plain = sorted(name for name in names if not name.startswith(_NO_WEIGHTS))
    first = [name for name in plain if not name.startswith(_SECOND_COPIES) and "/" not in name]
    for ending in (".safetensors", ".bin", ".pt"):
        if found := [name for name in first if name.endswith(ending)]:
            return found
    return [name for name in plain if name.startswith("consolidated") and name.endswith(".safetensors")]


def _headers(paths: Sequence[Path]) -> list[Mapping[str, Mapping[str, Any]]]:
    found, left = [], MAX_HEADERS_BYTES
    for path in paths:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, left):
                raise ValueError(f"{path.name} has no header that could be read")
            raw = file.read(length)
        header = tensors.parse_header(raw)
        if path.stat().st_size < 8 + length + _end(header):
            raise ValueError(f"{path.name} is not complete")
        left -= length
        found.append(header)
    return found


def _end(header: Mapping[str, Mapping[str, Any]]) -> int:
    ends = (about.get("data_offsets") for about in header.values())
    return max((at[1] for at in ends if isinstance(at, list) and len(at) == 2 and isinstance(at[1], int)), default=0)


def _start(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        return file.read(most)


def _of_sizes(sizes: Mapping[str, int], config: Mapping[str, Any]) -> WeightFacts:
    """Files whose content cannot be seen: all in the dtype that the configuration names, or in four bytes."""
    inner = config.get("text_config")
    named = config.get("dtype") or config.get("torch_dtype")
    if named is None and isinstance(inner, Mapping):
        named = inner.get("dtype") or inner.get("torch_dtype")
    stored = _STORED_AS.get(str(named).removeprefix("torch."), "F32")
    return WeightFacts({stored: sum(sizes.values())}, exact=False)


# The hub


async def read_remote(
    source: str, revision: str | None = None, *, token: str | None = None, endpoint: str | None = None
) -> ModelFacts:
    """What the hub says of a repository. Takes ``HUB_TIMEOUT_S`` a request at most; never raises."""
    if source.startswith("/"):
        return ModelFacts(None, None, f"{source} is not on this machine")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        return ModelFacts(None, None, "HF_HUB_OFFLINE is set")
    base = (endpoint or os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    where, at = quote(source), quote(revision or "main", safe="")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    httpx = await asyncio.to_thread(importlib.import_module, "httpx")  # a daemon that never asks the hub needs none
    try:
        async with httpx.AsyncClient(timeout=HUB_TIMEOUT_S, follow_redirects=True, headers=headers) as client:
            about = await _json(client, f"{base}/api/models/{where}/revision/{at}?blobs=true")
            config = await _json(client, f"{base}/{where}/resolve/{at}/config.json")
    except httpx.HTTPStatusError as exc:
        return ModelFacts(None, None, _refused(source, exc.response.status_code))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as exc:
        return ModelFacts(None, None, f"the hub does not answer: {exc or type(exc).__name__}")
    return _of_answers(about, config)


async def _json(client: httpx.AsyncClient, url: str) -> dict[str, Any]:
    """The object at ``url``. Raises ``httpx.HTTPError``, ``ValueError``."""
    async with client.stream("GET", url) as answer:
        answer.raise_for_status()
        body = bytearray()
        async for chunk in answer.aiter_bytes():
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise ValueError("an answer is too long")
    decoded = json.loads(body)
    if not isinstance(decoded, dict):
        raise ValueError("an answer is no object")
    return decoded


def _refused(source: str, status: int) -> str:
    if status in {401, 403}:
        return f"the hub does not show {source} (HTTP {status}): it is gated, private or not there; set HF_TOKEN"
    if status == 404:
        return f"the hub has no {source} of this revision, or it has no config.json"
    return f"the hub answers with HTTP {status}"


def _of_answers(about: Mapping[str, Any], config: Mapping[str, Any]) -> ModelFacts:
    """1. parameters by dtype, as the hub counted them  2. the files' sizes."""
    counted = about.get("safetensors")
    parameters = counted.get("parameters") if isinstance(counted, dict) else None
    if isinstance(parameters, dict) and parameters and all(name in ELEMENT_BYTES for name in parameters):  # 1
        by_dtype = {name: int(number * ELEMENT_BYTES[name]) for name, number in parameters.items()}
        return ModelFacts(config, WeightFacts(by_dtype, exact=False))
    siblings = about.get("siblings")
    listed = [one for one in siblings if isinstance(one, dict)] if isinstance(siblings, list) else []
    sizes = {str(one.get("rfilename")): one["size"] for one in listed if isinstance(one.get("size"), int)}
    wanted = weight_files(sizes)
    if not wanted:
        return ModelFacts(config, None, "the hub names no weights of a known kind")
    return ModelFacts(config, _of_sizes({name: sizes[name] for name in wanted}, config))
