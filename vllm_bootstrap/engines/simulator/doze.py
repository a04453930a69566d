"""Sleep mode: the pretended engine gives up its GPU memory and takes it again, as vLLM does on its development routes.

Invariant: asleep, nothing is computed: requests wait, however long. The memory shown on the mock GPUs is what the
engine holds right now. After a sleep of level 2 the weights are garbage until they were reloaded, and so are answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_bootstrap.engines.simulator.mockgpu import Memory

if TYPE_CHECKING:
    from vllm_bootstrap.engines.simulator.app import App

ASLEEP = "asleep"
GARBAGE = "!"


class Doze:
    """``level`` 0: awake. ``garbled``: the weights are not what they were."""

    def __init__(self, app: App, memory: Memory | None) -> None:
        self._app, self._memory = app, memory
        self.level = 0
        self.garbled = False

    @property
    def possible(self) -> bool:
        return self._app.options.enable_sleep_mode

    def fall_asleep(self, level: int) -> None:
        if self.level:
            return
        self.level = level
        self.garbled = self.garbled or level == 2
        self._app.batch.freeze(ASLEEP)
        if self._memory is not None:
            options = self._app.options
            self._memory.hold(round(options.mock_memory_bytes * (1 - options.sleep_frees)))

    def wake(self, *, computing: bool) -> None:
        if self._memory is not None:
            self._memory.hold(self._app.options.mock_memory_bytes)
        if computing:
            self.level = 0
            self._app.batch.thaw(ASLEEP)

    def reload(self) -> None:
        self.garbled = self._app.options.wake_fails == "garbled"
