"""What there is of a batch's output while it is being made, and after.

Invariant: at most one chunk of it is in memory; what cannot be read now is an error, never an empty answer. Must not
know: who may read it, how lines are run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from vllm_bootstrap.batches import output
from vllm_bootstrap.batches.files import FileStore
from vllm_bootstrap.batches.jobs import TERMINAL, State
from vllm_bootstrap.batches.linestore import LineStore
from vllm_bootstrap.batches.run_deps import RunDeps
from vllm_bootstrap.batches.types import BatchRow
from vllm_bootstrap.db import CannotOpen
from vllm_bootstrap.errors import Unavailable

CHUNK = 256 * 1024


async def so_far(deps: RunDeps, row: BatchRow, *, failed: bool) -> AsyncGenerator[bytes, None]:
    """The records there are, as lines of the output file (``failed``: of the error file). Raises ``Unavailable``."""
    try:
        lines = await asyncio.to_thread(LineStore.open, deps.lines(row.id), deps.input(row.id))
    except CannotOpen as exc:
        if row.phase.state not in (*TERMINAL, State.VALIDATING, State.CANCELLING):
            raise Unavailable(f"What is finished cannot be read now: {exc}", retry_after=5) from exc
        file_id = row.error_file_id if failed else row.output_file_id
        if row.phase.state in TERMINAL and file_id is not None:
            async for piece in _file(deps.files, file_id):
                yield piece
        return
    try:
        async for piece in output.pieces(lines, ok=not failed):
            yield piece
    finally:
        await asyncio.to_thread(lines.close)


async def _file(files: FileStore, file_id: str) -> AsyncGenerator[bytes, None]:
    _, path = await files.open(file_id, None)
    with await asyncio.to_thread(path.open, "rb") as file:
        while piece := await asyncio.to_thread(file.read, CHUNK):
            yield piece
