"""Waiting, in tests that are not asyncio, for what will become true."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(condition: Callable[[], T], timeout_s: float = 10.0, tick_s: float = 0.02, what: object = "") -> T:
    """Ask until the answer is true and return it; fail the test when that takes longer than ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not true within {timeout_s:g} s {what}"
        pause.wait(tick_s)
    return answer
