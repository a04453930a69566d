"""From a model of the catalogue to the launch that serves it. PURE.

Invariant: the same entry gives the same order, whoever asks; which GPUs were chosen for it does not change what the
entry is (``fingerprint``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from vllm_bootstrap.launches.types import LaunchOrder
from vllm_bootstrap.models.types import Fetched, ModelEntry

OWN_LABELS = "vllm-bootstrap."
MODEL_LABEL = OWN_LABELS + "model"
ORDER_LABEL = OWN_LABELS + "order"
# In ``args`` as in a launch's body, but not among the engine's own fields.
_PLACED = ("tensor_parallel_size", "pipeline_parallel_size")


def order_of(
    entry: ModelEntry,
    *,
    gpu_count: int | None = None,
    gpu_ids: Sequence[int | str] | None = None,
    fetched: Fetched | None = None,
) -> LaunchOrder:
    """The launch that serves ``entry``. ``gpu_count`` and ``gpu_ids`` are chosen by the caller where the entry leaves
    them open; ``fetched`` is what was downloaded of its source."""
    order = _plain(entry)
    fields = order.fields if fetched is None else {**order.fields, "revision": fetched.commit}
    return replace(
        order,
        gpu_count=order.gpu_count if gpu_count is None else gpu_count,
        gpu_ids=order.gpu_ids if gpu_ids is None else tuple(gpu_ids),
        fields=fields,
        labels={MODEL_LABEL: entry.name, ORDER_LABEL: fingerprint(entry)},
        folder=None if fetched is None else fetched.folder,
    )


def fingerprint(entry: ModelEntry) -> str:
    """What tells a launch of this entry from one that was made before it was changed."""
    text = json.dumps(asdict(_plain(entry)), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(entry: ModelEntry) -> LaunchOrder:
    fields = {name: value for name, value in entry.args.items() if name not in _PLACED}
    if entry.revision is not None:
        fields["revision"] = entry.revision
    adapters = {name: adapter.source for adapter in entry.adapters for name in (adapter.name, *adapter.aliases)}
    return LaunchOrder(
        model=entry.source,
        engine=entry.engine,
        served_model_name=entry.name,
        gpu_ids=entry.gpus.ids,
        gpu_count=entry.gpus.count,
        gpu_share=entry.gpus.share,
        tensor_parallel_size=entry.args.get("tensor_parallel_size"),
        pipeline_parallel_size=entry.args.get("pipeline_parallel_size"),
        fields=fields,
        extra_args=entry.extra_args,
        env=entry.env,
        restart_policy=entry.restart,
        replicas=entry.replicas,
        aliases=entry.aliases,
        adapters=adapters,
        max_parallel=entry.max_parallel,
        sleep=entry.sleep,
    )
