"""Helper programs of ours, run beside the daemon: a task goes in as JSON, what they say comes out line by line.

Invariant: when ``run`` has ended, however it did, the helper is dead. It dies with the daemon too (each helper asks the
kernel for that). Knows nothing of what helpers do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import vllm_bootstrap

_OPTIONS = ("-P", "-X", "utf8", "-m")
_PACKAGE_PARENT = str(Path(vllm_bootstrap.__file__).parent.parent)
_MAX_LINE_BYTES = 64 * 1024**2
_COMPLAINT_BYTES = 2000


class Ended(NamedTuple):
    """``said``: the last thing it said, empty when it said nothing. ``complaint``: how it ended, when not well."""

    said: dict[str, Any]
    complaint: str | None


async def run(
    module: str, task: Mapping[str, Any], env: Mapping[str, str], on_said: Callable[[dict[str, Any]], None]
) -> Ended:
    """Run ``python -m module`` until it ends. ``on_said`` is called in the loop with each thing it says. Cancelled: the
    helper is killed. Raises ``OSError`` when it cannot be started."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *_OPTIONS,
        module,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_MAX_LINE_BYTES,
        env={**env, "PYTHONPATH": _PACKAGE_PARENT},
    )
    try:
        said, complaint = await asyncio.gather(_talk(process, task, on_said), _tail(process))
        status = await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if status == 0:
        return Ended(said, None)
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return Ended(said, f"{how}: {complaint}" if complaint else how)


async def _talk(
    process: asyncio.subprocess.Process, task: Mapping[str, Any], on_said: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    stdin, stdout = cast("asyncio.StreamWriter", process.stdin), cast("asyncio.StreamReader", process.stdout)
    with contextlib.suppress(ConnectionError):  # it has died: its status tells more
        stdin.write(json.dumps(task).encode())
        await stdin.drain()
    stdin.close()
    said: dict[str, Any] = {}
    async for line in stdout:
        with contextlib.suppress(ValueError):  # killed in the middle of a line
            said = json.loads(line)
            on_said(said)
    return said


async def _tail(process: asyncio.subprocess.Process) -> str:
    stderr, tail = cast("asyncio.StreamReader", process.stderr), b""
    while piece := await stderr.read(_COMPLAINT_BYTES):
        tail = (tail + piece)[-_COMPLAINT_BYTES:]
    return tail.decode(errors="replace").strip().rpartition("\n")[2]
