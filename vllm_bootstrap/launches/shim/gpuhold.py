"""The GPUs' lock files of one shim: taken before its engine starts, given up while that sleeps, taken again.

Invariant: all wanted GPUs are held or none. Standard library only.
"""

from __future__ import annotations

import os

from . import gpulocks
from .order import Order, Refused


class GpuHold:
    """What ``take`` was asked for is remembered for ``take_again``."""

    def __init__(self, launch: str) -> None:
        self._launch = launch
        self._held: list[int] = []
        self._folder = self._owner = ""
        self._uuids: list[str] = []
        self._shared = False

    @property
    def is_held(self) -> bool:
        return bool(self._held)

    def take(self, order: Order) -> None:
        """Lock what ``order`` names, if it names anything. Blocks up to ``GATE_WAIT_S``. Raises ``Refused``."""
        self._folder, self._uuids = order.lock_dir, order.gpu_locks
        self._owner, self._shared = order.lock_owner, order.shared
        self._take(gpulocks.GATE_WAIT_S, when_busy="gpu_locked")

    def give_up(self) -> None:
        """Idempotent."""
        for fd in self._held:
            os.close(fd)
        self._held = []

    def take_again(self) -> None:
        """Lock them once more, without waiting for anybody: the shim has an engine to look after by now. Idempotent.
        Raises ``Refused``, with the kind ``busy`` where another try in a moment may work."""
        if not self._held:
            self._take(0.0, when_busy="busy")

    def _take(self, gate_wait_s: float, when_busy: str) -> None:
        if not self._folder or not self._uuids:
            return
        try:
            self._held = gpulocks.take(
                self._folder, self._uuids,
                owner=self._owner, launch=self._launch, shared=self._shared, gate_wait_s=gate_wait_s,
            )  # fmt: skip
        except gpulocks.GateBusy as exc:
            raise Refused(when_busy, str(exc)) from None
        except gpulocks.GpuLocked as exc:
            raise Refused("gpu_locked", str(exc)) from None
        except (OSError, ValueError) as exc:
            raise Refused("spawn_failed", str(exc)) from None
