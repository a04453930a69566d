"""A place to try real shims in: a process host with its own folders, orders for it, and engines that behave badly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import coverage

from tests.support import orphans
from tests.support.aio import eventually
from vllm_bootstrap.launches.logs import LogReader
from vllm_bootstrap.launches.process import ProcessHost, Shim, ShimLost
from vllm_bootstrap.launches.types import StartOrder

# Of this test run only, so that several may run on one machine; a daemon that a test starts inherits it.
LAUNCH = os.environ.setdefault("VBS_TEST_LAUNCH", f"l{uuid.uuid4().hex[:20]}")
SHIM_FOLDER = Path(__file__).resolve().parents[2] / "vllm_bootstrap" / "launches" / "shim"

# A tree like an engine's: the main process, a child, and a grandchild that left session and parents behind. Says
# "tree PIDS" when it stands. The first argument names what it does to SIGTERM, the second what it does then.
TREE = r"""
import json, os, signal, sys, time
on_term, then = sys.argv[1:3]
def put(text):
    os.write(1, text.encode() + b"\n")
if on_term == "ignore":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
r, w = os.pipe()
child = os.fork()
if child == 0:
    signal.signal(signal.SIGTERM, lambda *_: put("the child got SIGTERM"))
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(3, r)
            os.write(w, b"%d" % os.getpid())
            while True: time.sleep(60)
        os._exit(0)
    os.wait()
    while True: time.sleep(60)
grandchild = int(os.read(r, 20))
if on_term == "tidy":
    def tidy(*_):
        put("tidying up")
        os.kill(child, 9); os.kill(grandchild, 9)
        os._exit(3)
    signal.signal(signal.SIGTERM, tidy)
put("tree " + json.dumps([os.getpid(), child, grandchild]))
if then == "exit":
    os._exit(0)
while True: time.sleep(60)
"""


def python(code: str, *arguments: str) -> tuple[str, ...]:
    """A command line for a small program."""
    return (sys.executable, "-I", "-S", "-c", code, *arguments)


def interpreter(scratch: Path) -> list[str] | None:
    """How shims are to be run: measured when this test run is measured, else as in production (None)."""
    measuring = coverage.Coverage.current()
    if measuring is None:
        return None
    settings = scratch / "shim-coverage.ini"
    settings.write_text(
        "[run]\nbranch = true\nparallel = true\npatch = _exit, fork, execv\n"
        f"data_file = {Path(measuring.config.data_file).resolve()}\ninclude = {SHIM_FOLDER}/*\n"
    )
    return [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}"]


class Box:
    """One daemon's worth of folders. ``host`` makes shims in it."""

    def __init__(self, folder: Path, *, python: Sequence[str] | None = None, answer_s: float = 10.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.state_id = folder, f"t{uuid.uuid4().hex[:10]}"
        self.runtime_dir, self.log_base, self.locks = folder / "run", folder / "logs", folder / "locks"
        self.python, self.answer_s = python or interpreter(folder), answer_s
        self.host = self.new_host()

    def new_host(self, **options: Any) -> ProcessHost:
        """Another daemon on the same state, as after a restart."""
        return ProcessHost(
            self.runtime_dir, self.state_id, **{"python": self.python, "answer_s": self.answer_s, **options}
        )

    def order(self, argv: Sequence[str], attempt: int = 1, **changes: Any) -> StartOrder:
        order = StartOrder(
            argv=tuple(argv),
            env={"PATH": os.environ["PATH"]},
            cwd="/",
            log_dir=str(self.log_base / str(attempt)),
            log_segment_bytes=1 << 20,
            log_max_bytes=4 << 20,
            tmp_dir=str(self.host.run_dir(LAUNCH, attempt) / "tmp"),
        )
        return replace(order, **changes)

    def log(self, attempt: int = 1) -> LogReader:
        return LogReader(self.log_base / str(attempt))

    def text(self, attempt: int = 1) -> str:
        return self.log(attempt).tail(100_000).content

    @asynccontextmanager
    async def shim(self, attempt: int = 1) -> AsyncIterator[Shim]:
        """A shim that has not been told to go yet. Whatever the test did, nothing of it lives afterwards."""
        shim = await self.host.spawn(LAUNCH, attempt)
        try:
            yield shim
        finally:
            with contextlib.suppress(ShimLost):
                await shim.stop(0, force=True)
                await within(5, shim.wait())
            await self.host.kill_marked(LAUNCH, attempt)
            shim.close()
            self.host.cleanup(LAUNCH, attempt)

    async def tree(self, shim: Shim, on_term: str = "die", then: str = "stay", attempt: int = 1) -> list[int]:
        """Start ``TREE`` and wait until it stands; the pids of its three processes."""
        await shim.go(self.order(python(TREE, on_term, then), attempt))
        await self.says("tree [", attempt)
        line = next(line for line in self.text(attempt).splitlines() if line.startswith("tree "))
        return list(json.loads(line.removeprefix("tree ")))

    async def says(self, text: str, attempt: int = 1) -> None:
        """Wait until the engine's log holds ``text``."""
        await eventually(lambda: text in self.text(attempt))

    def left(self) -> list[str]:
        return orphans.everything_left(self.folder, self.state_id, self.locks)


async def all_dead(pids: Sequence[int]) -> None:
    await eventually(lambda: all(orphans.is_dead(pid) for pid in pids))


async def within(seconds: float, awaitable: Any) -> Any:
    """A promise about time: fails when it is not kept."""
    async with asyncio.timeout(seconds):
        return await awaitable
