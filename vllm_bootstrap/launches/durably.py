"""Writing down what has already happened: on a full or busy disk, again and again until it works.

For facts that cannot be refused any more (a process died, GPUs are free). What can be refused is refused with
``StorageFull`` instead. A failed disk (``StorageFailed``) is passed on: the daemon must stop rather than lie.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from vllm_bootstrap.errors import StorageFailed, StorageFull, Unavailable

log = logging.getLogger(__name__)
T = TypeVar("T")
RETRY_S = 1.0


async def durably(what: str, write: Callable[[], Awaitable[T]]) -> T:
    """Await ``write()`` until it succeeds. ``what`` names the fact in the daemon's log. Cancellable."""
    complained = False
    while True:
        try:
            return await write()
        except StorageFailed:
            raise
        except (StorageFull, Unavailable) as exc:
            if not complained:
                log.error("%s cannot be written down, trying until it can: %s", what, exc.message)
            complained = True
            await asyncio.sleep(RETRY_S)
