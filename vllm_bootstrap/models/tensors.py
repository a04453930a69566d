"""Headers of safetensors files, and what the tensors they name weigh. PURE.

Invariant: what the engine does not load is not counted (a tied output layer that is stored as well, extra layers for
speculation). Knows nothing of files: it gets bytes and gives numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

# Bytes of one element.
ELEMENT_BYTES: Mapping[str, float] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F8_E4M3": 1,
    "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1, "F4": 0.5,
}  # fmt: skip
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_VOCABULARY = re.compile(r"(?:embed_tokens|wte|word_embeddings|tok_embeddings|lm_head|embed_out|output_layer)\.weight$")
_OUTPUT = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")


@dataclass(frozen=True, slots=True)
class WeightFacts:
    """What a model's weights take where they are stored, in bytes by the dtype they are stored in (the names that
    safetensors use). ``vocabulary_bytes``: the part that online quantisation leaves alone. ``exact``: counted from
    headers, not from sizes of files."""

    by_dtype: Mapping[str, int] = field(default_factory=dict)
    vocabulary_bytes: int = 0
    exact: bool = True

    @property
    def stored_bytes(self) -> int:
        return sum(self.by_dtype.values())


def parse_header(raw: bytes) -> Mapping[str, Mapping[str, Any]]:
    """Tensor name to what the header says of it. Raises ``ValueError`` for what is no header."""
    try:
        decoded = json.loads(raw)
    except RecursionError as exc:
        raise ValueError("not a safetensors header") from exc
    if not isinstance(decoded, dict) or not all(isinstance(about, dict) for about in decoded.values()):
        raise ValueError("not a safetensors header")
    return {name: about for name, about in decoded.items() if name != "__metadata__"}


def count(headers: Iterable[Mapping[str, Mapping[str, Any]]], config: Mapping[str, Any]) -> WeightFacts:
    """What the tensors of these headers weigh together. Raises ``ValueError`` for a header that contradicts itself."""
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config
    stated = text.get("num_hidden_layers")
    layers = stated if isinstance(stated, int) and text.get("num_nextn_predict_layers") else None
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    sizes: dict[str, int] = {}
    vocabulary = 0
    for name, about in (item for header in headers for item in header.items()):
        if tied and _OUTPUT.search(name):
            continue
        if layers is not None and (found := _LAYER.search(name)) is not None and int(found[1]) >= layers:
            continue
        dtype, size = _size(name, about)
        sizes[dtype] = sizes.get(dtype, 0) + size
        if _VOCABULARY.search(name):
            vocabulary += size
    return WeightFacts(sizes, vocabulary)


def _size(name: str, about: Mapping[str, Any]) -> tuple[str, int]:
    dtype, shape, offsets = about.get("dtype"), about.get("shape"), about.get("data_offsets")
    if isinstance(offsets, list) and len(offsets) == 2 and all(isinstance(at, int) for at in offsets):
        return str(dtype), max(0, offsets[1] - offsets[0])
    if isinstance(shape, list) and dtype in ELEMENT_BYTES and all(isinstance(side, int) for side in shape):
        return str(dtype), int(prod(shape) * ELEMENT_BYTES[str(dtype)])
    raise ValueError(f"tensor {name} has no size")
