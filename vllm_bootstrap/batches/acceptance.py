"""What makes a batch out of a request: its row, and its input under a name of its own on disk.

Must not know: lines, engines, which batches there are.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from vllm_bootstrap import ids
from vllm_bootstrap.batches.blobs import Folder
from vllm_bootstrap.batches.jobs import VALIDATING, State
from vllm_bootstrap.batches.types import BatchRow, NewBatch
from vllm_bootstrap.errors import NotFound


def row_of(new: NewBatch, now: float) -> BatchRow:
    """A batch that is accepted now."""
    return BatchRow(
        id=ids.new_id(ids.BATCH_PREFIX, int(now * 1000), os.urandom(ids.RANDOM_BYTES)),
        owner=new.owner,
        endpoint=new.endpoint,
        input_file_id=new.input_file_id,
        completion_window=new.completion_window,
        created_at=now,
        expires_at=now + new.window_s,
        phase=VALIDATING,
        priority=new.priority,
        launch_id=new.launch_id,
        metadata=new.metadata,
        webhook=new.webhook,
        output_expires_after_s=new.output_expires_after_s,
        stamps={State.VALIDATING.value: now},
    )


def fingerprint(new: NewBatch) -> str:
    """Tells one request from another."""
    fields = asdict(replace(new, idempotency_key=None))
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def take(folder: Folder, source: Path, target: Path) -> None:
    """Give an input a name of the batch's own. Durable when this returns; blocks. Raises what ``Folder.link`` does, and
    ``NotFound`` where the file is gone."""
    try:
        folder.link(source, target)
    except FileNotFoundError:
        raise NotFound("The input file was deleted just now.", param="input_file_id") from None
