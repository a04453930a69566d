"""Running coroutines in plain tests, and waiting for what will become true."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
TICK_S = 0.005


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run one coroutine in a fresh event loop."""
    return asyncio.run(coroutine)


async def eventually(predicate: Callable[[], object], timeout: float = 10.0) -> None:
    """Let the loop run until ``predicate()`` is true; fail the test when that takes longer than ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < deadline, f"not true within {timeout:g} s"
        await asyncio.sleep(TICK_S)
