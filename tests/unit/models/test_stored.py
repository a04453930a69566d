"""Models as JSON and back, those of an earlier version too."""

from __future__ import annotations

import json

from vllm_bootstrap.models.stored import from_json, to_json
from vllm_bootstrap.models.types import AdapterEntry, GpuNeed, ModelEntry, Rewrite

FULL = ModelEntry(
    "q", "org/q", origin="runtime", revision="v1", aliases=("a",), engine="vllm", args={"dtype": "half"},
    extra_args={"x": [1]}, env={"X": "1"}, gpus=GpuNeed(2, (0, "GPU-1"), 1024, 0.5), replicas="per_gpu",
    restart="never", ttl_s=900, pin=True, preload=True, priority=-3, max_parallel=4, sleep=2, show_loading=True,
    rewrite=Rewrite({"n": 1}, frozenset({"seed", "user"})), adapters=(AdapterEntry("l", "/l", ("l2",)),),
    description="text",
)  # fmt: skip


def test_nothing_is_lost():
    for entry in (FULL, ModelEntry("q", "q", origin="runtime")):
        assert from_json(json.loads(json.dumps(to_json(entry)))) == entry


def test_fields_that_are_missing_or_gone_do_no_harm():
    assert from_json({"name": "q", "source": "s", "origin": "runtime", "frobnicate": 1}) == ModelEntry(
        "q", "s", origin="runtime"
    )
