"""``python -m vllm_bootstrap.engines.simulator``: parse, start, serve, stop. Exit codes are vLLM's."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from vllm_bootstrap.engines.simulator import mockgpu
from vllm_bootstrap.engines.simulator.boot import Boot, Died, Interrupted
from vllm_bootstrap.engines.simulator.knobs import Options, parse
from vllm_bootstrap.engines.simulator.tree import EngineProcess

INTERRUPTED = 130
CORE_GRACE_S = 3.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one simulator until it is stopped. Returns the exit code."""
    options = parse(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent that ignores it must not keep us from waiting
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN if options.ignore_sigterm else _interrupt)
    boot = Boot(options, os.environ)
    memory = _memory(options)
    try:
        memory.hold(options.mock_memory_bytes)
        return _serve(options, boot.run(), boot.core, memory)
    except Died as exc:
        return exc.code
    except Interrupted:
        return INTERRUPTED
    finally:
        _stop(options, boot.core, memory)


def _stop(options: Options, core: EngineProcess | None, memory: mockgpu.Memory) -> None:
    time.sleep(options.slow_stop)
    if core is not None:
        core.stop(CORE_GRACE_S)
    memory.hold(0)


def _memory(options: Options) -> mockgpu.Memory:
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if options.mock_memory_file else []
    return mockgpu.Memory(Path(options.mock_memory_file or ""), filter(None, devices))


def _serve(options: Options, sock: socket.socket, core: EngineProcess | None, memory: mockgpu.Memory) -> int:
    # Only now: until here the start is small, and children are forked without an event loop in them.
    import asyncio  # noqa: PLC0415 - imported late on purpose

    from vllm_bootstrap.engines.simulator.server import serve  # noqa: PLC0415 - imported late on purpose

    assert core is not None  # noqa: S101
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        code: int = runner.run(serve(options, os.environ, sock, core, memory))
    return code


def _loop_factory() -> Any:
    try:
        import uvloop  # noqa: PLC0415 - imported late on purpose
    except ImportError:
        return None
    return uvloop.new_event_loop


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    # A second signal must not break off the end: the children would be left.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise Interrupted


if __name__ == "__main__":
    sys.exit(main())
