"""The launch that serves a model, and what tells it from that of a changed one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllm_bootstrap import wire
from vllm_bootstrap.models import orders
from vllm_bootstrap.models.orders import MODEL_LABEL, ORDER_LABEL, fingerprint, order_of
from vllm_bootstrap.models.types import AdapterEntry, Fetched, GpuNeed, ModelEntry

ENTRY = ModelEntry(
    "q", "org/q", revision="v1", aliases=("chat",), engine="vllm", gpus=GpuNeed(count=2, share=0.5),
    args={"dtype": "half", "tensor_parallel_size": 2, "pipeline_parallel_size": 1}, extra_args={"x": 1},
    env={"X": "1"}, replicas=2, restart="never", max_parallel=4, sleep=1,
    adapters=(AdapterEntry("l", "/l", ("l2",)), AdapterEntry("m", "org/m")),
)  # fmt: skip


def test_an_entry_becomes_an_order():
    order = order_of(ENTRY)
    assert (order.model, order.served_model_name, order.engine) == ("org/q", "q", "vllm")
    assert order.fields == {"dtype": "half", "revision": "v1"}
    assert (order.tensor_parallel_size, order.pipeline_parallel_size) == (2, 1)
    assert (order.gpu_count, order.gpu_ids, order.gpu_share) == (2, None, 0.5)
    assert (order.extra_args, order.env) == ({"x": 1}, {"X": "1"})
    assert (order.aliases, order.max_parallel, order.replicas, order.sleep) == (("chat",), 4, 2, 1)
    assert order.adapters == {"l": "/l", "l2": "/l", "m": "org/m"}
    assert order.restart_policy == "never"
    assert order.labels == {MODEL_LABEL: "q", ORDER_LABEL: fingerprint(ENTRY)}


def test_without_more_it_is_restarted_on_failure():
    order = order_of(ModelEntry("q", "q"))
    assert (order.restart_policy, order.fields, order.tensor_parallel_size) == ("on-failure", {}, None)


def test_what_was_chosen_or_downloaded_changes_the_order_but_not_its_fingerprint():
    entry = ModelEntry("q", "q")
    chosen = order_of(entry, gpu_count=2, gpu_ids=[0, 1], fetched=Fetched("abc", "/hub/q"))
    assert (chosen.gpu_count, chosen.gpu_ids, chosen.fields) == (2, (0, 1), {"revision": "abc"})
    assert chosen.labels == order_of(entry).labels
    assert (chosen.model, chosen.folder, order_of(entry).folder) == ("q", "/hub/q", None)


@pytest.mark.parametrize(
    "change",
    [{"source": "other"}, {"revision": "v2"}, {"aliases": ()}, {"args": {}}, {"gpus": GpuNeed(count=1)}, {"env": {}},
     {"adapters": ()}, {"max_parallel": None}, {"replicas": 1}],
)  # fmt: skip
def test_a_change_of_what_is_launched_changes_the_fingerprint(change):
    assert fingerprint(replace(ENTRY, **change)) != fingerprint(ENTRY)


@pytest.mark.parametrize(
    "change", [{"ttl_s": 5}, {"pin": True}, {"priority": 3}, {"description": "x"}, {"origin": "runtime"}]
)
def test_a_change_of_what_is_not_launched_does_not(change):
    assert fingerprint(replace(ENTRY, **change)) == fingerprint(ENTRY)


def test_users_cannot_set_these_labels():
    assert orders.OWN_LABELS == wire.OWN_LABELS
    with pytest.raises(ValueError, match="the daemon's own"):
        wire.LaunchRequest(model="q", labels={MODEL_LABEL: "q"})
    assert wire.LaunchRequest(model="q", labels={"team": "x"}).labels == {"team": "x"}
