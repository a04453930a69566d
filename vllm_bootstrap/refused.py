"""What no client may put into a request's body, whichever way it comes in: through the gateway, or in a batch. PURE.

Refused fields run code, read other people's data, or bind scheduling to a client's wish: see ``REFUSED``. Knows only
decoded values and counts of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_bootstrap.errors import BadRequest, PayloadTooLarge

REFUSED: Mapping[str, str] = {
    "kv_transfer_params": "moves key-value caches between engines",
    "mm_processor_kwargs": "changes how the engine preprocesses media",
    "media_io_kwargs": "changes how the engine reads media",
    "chat_template": "runs a template of the client's in the engine",
    "vllm_xargs": "reaches internals of the engine",
    "prompt_embeds": "is deserialised by the engine as a tensor",
    "logits_processors": "names code to run in the engine",
}
"""Top-level fields that no client may set, with the reason. ``chat_template_kwargs`` may not smuggle one of them in."""

_REFUSED_NAMES = frozenset(REFUSED)

MAX_CONTAINERS, MAX_SEPARATORS = 500_000, 2_000_000


def refuse_fields(fields: Mapping[str, Any]) -> None:
    """Raise ``BadRequest`` naming the first field a client may not set."""
    if not _REFUSED_NAMES.isdisjoint(fields):
        for name, reason in REFUSED.items():
            if fields.get(name) is not None:
                raise BadRequest(f"The field {name!r} may not be set: it {reason}", param=name)
    nested = fields.get("chat_template_kwargs")
    if isinstance(nested, dict):
        for name in REFUSED:
            if nested.get(name) is not None:
                raise BadRequest(f"{name!r} may not be set: it {REFUSED[name]}", param=f"chat_template_kwargs.{name}")


def refuse_too_fine(raw: bytes) -> None:
    """Raise ``PayloadTooLarge`` for JSON that would become too many objects. To be asked before parsing, so it counts
    text inside strings too: a few bytes each would otherwise become an object each, and nobody else is served while a
    million of them are made."""
    large = len(raw) > MAX_CONTAINERS
    if large and (raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS or raw.count(b",") > MAX_SEPARATORS):
        raise PayloadTooLarge(
            f"The body is too finely structured: at most {MAX_CONTAINERS} brackets and {MAX_SEPARATORS} commas. "
            "Send it as several requests."
        )
