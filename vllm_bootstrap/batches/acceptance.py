"""What makes a batch out of a request: its row, and its input under a name of its own on disk.

Must not know: lines, engines, which batches there are.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from vllm_bootstrap import ids
from vllm_bootstrap.batches.jobs import VALIDATING, State
from vllm_bootstrap.batches.types import BatchRow, NewBatch
from vllm_bootstrap.errors import NotFound, StorageFailed, StorageFull

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMLINK})


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


class Inputs:
    """Gives inputs a second name. After the disk has failed once nothing is accepted any more: nobody can know what of
    the earlier names it holds."""

    def __init__(self) -> None:
        self._failed: StorageFailed | None = None

    def link(self, source: Path, target: Path) -> None:
        """A second name for a file, on disk when this returns. Blocks. Raises ``StorageFull``, ``StorageFailed``, and
        ``NotFound`` where the file is gone."""
        if self._failed is not None:
            raise StorageFailed(self._failed.message)
        try:
            os.link(source, target)
            folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except FileNotFoundError:
            raise NotFound("The input file was deleted just now.", param="input_file_id") from None
        except OSError as exc:
            if exc.errno in _NO_ROOM:
                raise StorageFull(f"The batch cannot be stored: {exc.strerror}") from exc
            self._failed = StorageFailed(f"The batch cannot be stored: {exc.strerror}")
            raise self._failed from exc
