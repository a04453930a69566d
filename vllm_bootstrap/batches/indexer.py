"""Indexing as the daemon sees it: a helper process, watched from the event loop.

Invariant: when ``index`` has ended, however it did, its helper is dead, and what is left on disk is the whole database
or nothing. The helper does not outlive the daemon. How many run at once is the caller's affair.

Must not know: the life of a batch, what the lines ask for.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import vllm_bootstrap
from vllm_bootstrap.batches.indexing import Outcome, Task, leftovers
from vllm_bootstrap.batches.types import LineError
from vllm_bootstrap.errors import StorageFull

__all__ = ["IndexingFailed", "Outcome", "Task", "index"]

PROGRAM = (sys.executable, "-S", "-P", "-X", "utf8", "-m", "vllm_bootstrap.batches.indexing")
PASSED_ON = ("PATH", "LD_LIBRARY_PATH")
_PACKAGE_PARENT = str(Path(vllm_bootstrap.__file__).parent.parent)
_MAX_LINE_BYTES = 16 * 1024**2
_SAID_BYTES = 2000

OnProgress = Callable[[int, int], None]


class IndexingFailed(Exception):
    """The helper did not get to an end; the input may be as good as any. May be tried again."""


async def index(task: Task, on_progress: OnProgress | None = None, *, program: Sequence[str] = PROGRAM) -> Outcome:
    """Judge an input and make the database of its lines. ``on_progress`` is told of bytes and lines, a few times
    a second. Cancelled: the helper is killed, and what it had written is removed.

    Raises ``IndexingFailed``, or ``StorageFull`` when there is no room for the database.
    """
    try:
        helper = await asyncio.create_subprocess_exec(
            *program,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
            env={name: os.environ[name] for name in PASSED_ON if name in os.environ} | {"PYTHONPATH": _PACKAGE_PARENT},
        )
    except OSError as exc:
        raise IndexingFailed(f"The helper that checks the input could not be started: {exc}") from exc
    try:
        said, complaint = await asyncio.gather(_talk(helper, task, on_progress), _tail(helper))
        status = await helper.wait()
    finally:
        await _clear(helper, task)
    return _outcome(said, status, complaint)


async def _talk(helper: asyncio.subprocess.Process, task: Task, on_progress: OnProgress | None) -> dict[str, Any]:
    """Hand the task over; returns the last thing that was said."""
    stdin, stdout = cast("asyncio.StreamWriter", helper.stdin), cast("asyncio.StreamReader", helper.stdout)
    order = dataclasses.replace(task, parent=os.getpid())
    with contextlib.suppress(ConnectionError):  # it has died: its status tells more
        stdin.write(json.dumps(dataclasses.asdict(order)).encode())
        await stdin.drain()
    stdin.close()
    said: dict[str, Any] = {}
    async for line in stdout:
        with contextlib.suppress(ValueError):  # killed in the middle of a line
            said = json.loads(line)
            if on_progress is not None and "bytes" in said:
                on_progress(said["bytes"], said["lines"])
    return said


async def _tail(helper: asyncio.subprocess.Process) -> str:
    stderr, tail = cast("asyncio.StreamReader", helper.stderr), b""
    while piece := await stderr.read(_SAID_BYTES):
        tail = (tail + piece)[-_SAID_BYTES:]
    return tail.decode(errors="replace").strip().rpartition("\n")[2]


async def _clear(helper: asyncio.subprocess.Process, task: Task) -> None:
    if helper.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            helper.kill()
        await helper.wait()
    for path in leftovers(Path(task.database)):
        await asyncio.to_thread(path.unlink, missing_ok=True)


def _outcome(said: dict[str, Any], status: int, complaint: str) -> Outcome:
    if said.get("full"):
        raise StorageFull(f"The disk of the state directory is full: the input cannot be indexed ({said['failure']}).")
    if status != 0 or "error_count" not in said:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        why = said.get("failure") or complaint
        raise IndexingFailed(f"The helper that checks the input {how}" + (f": {why}" if why else ""))
    errors = [LineError(**error) for error in said["errors"]]
    return Outcome(said["lines"], Counter(said["models"]), errors, said["error_count"])
