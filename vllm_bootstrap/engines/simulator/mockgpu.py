"""The pretended memory of mock GPUs: a JSON file ``{"used": {uuid: bytes}}`` that several simulators share.

Invariant: each change is made under a lock and put in place whole, and leaves everything else in the file alone.
What a killed simulator had claimed stays, as it does for a moment on a real GPU: the file's owner removes it.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable
from pathlib import Path


class Memory:
    """What one simulator holds of its GPUs."""

    def __init__(self, file: Path, uuids: Iterable[str]) -> None:
        self._file, self._uuids, self._held = file, list(uuids), 0

    def hold(self, memory: int) -> None:
        """Hold so many bytes of each GPU from now on. Blocks on other writers."""
        if memory != self._held and self._uuids:
            claim(self._file, self._uuids, memory - self._held)
            self._held = memory


def claim(file: Path, uuids: Iterable[str], memory: int) -> None:
    """Add ``memory`` bytes to the use of each GPU; a negative number gives it back. Blocks on other writers."""
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = json.loads(file.read_text()) if file.exists() else {}
        used = content.setdefault("used", {})
        for uuid in uuids:
            used[uuid] = max(0, used.get(uuid, 0) + memory)
        changed = file.with_name(f"{file.name}.new")
        changed.write_text(json.dumps(content))
        changed.replace(file)
