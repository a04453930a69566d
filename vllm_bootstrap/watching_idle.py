"""What tells whether the box is idle, put together: who owns GPUs, who runs, what waits.

Invariant: whatever may cost or bring money counts as work; see ``models.idle_sense``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from vllm_bootstrap.batches.desk import BatchDepartment
from vllm_bootstrap.batches.files import FileStore
from vllm_bootstrap.db import Database
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.gpus.inventory import Inventory
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.ids import RANDOM_BYTES
from vllm_bootstrap.launches.supervisor import Supervisor
from vllm_bootstrap.metrics import Metrics
from vllm_bootstrap.models.department import ModelDepartment
from vllm_bootstrap.models.idle_box import IdleBox
from vllm_bootstrap.models.idle_hook import Action
from vllm_bootstrap.models.idle_sense import Sense
from vllm_bootstrap.scheduler.gate import Gate

DEVICES_AGE_S = 60.0


def make_idle_box(
    db: Database,
    inventory: Inventory,
    ledger: Ledger,
    supervisor: Supervisor,
    gate: Gate,
    gateway: Gateway,
    batches: BatchDepartment,
    files: FileStore,
    models: ModelDepartment,
    metrics: Metrics,
    actions: Sequence[Action],
    *,
    after_s: float,
    node_id: str,
) -> IdleBox:
    """See ``IdleBox``."""
    sense = Sense(
        ledger,
        supervisor,
        gate,
        gateway.inflight,
        batches.batches,
        batches.items,
        served=lambda: metrics.traffic.served,
        reachable=lambda: batches.dispatcher.reachable(models.may_come),
        others=[lambda: "files are uploaded" if files.arriving else None, models.busy],
    )

    async def devices() -> dict[str, int]:
        return {one.gpu.uuid: one.gpu.index for one in (await inventory.snapshot(DEVICES_AGE_S)).gpus}

    return IdleBox(
        db,
        sense.look,
        devices,
        actions,
        after_s=after_s,
        node_id=node_id,
        count=metrics.models.idle_hook,
        entropy=lambda: os.urandom(RANDOM_BYTES),
    )
