"""How an attempt ended, and what that means for the operator. PURE: facts in, ``Failure`` or None out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_bootstrap.engines.base import Engine, ExitFacts, Failure, FailureClass
from vllm_bootstrap.launches.lifecycle import Why
from vllm_bootstrap.launches.types import ExitRecord


@dataclass(frozen=True, slots=True)
class Outcome:
    """Facts about an attempt that is over: its tree is dead and its GPUs have settled or were given up.

    ``record`` is None when the shim left none. ``trouble`` is set when the attempt never got an engine running, or
    lost it in a way no exit code tells (``FailureClass`` value and sentence). ``ran_s``: seconds since it was ready.
    ``asleep``: it slept, or was not awake again yet.
    """

    record: ExitRecord | None
    forced: bool
    unsettled: tuple[str, ...] = ()
    trouble: tuple[FailureClass, str] | None = None
    was_ready: bool = False
    ran_s: float = 0.0
    asleep: bool = False


_HINTS = {
    FailureClass.GPU_LOCKED: "Another daemon on this host owns this GPU. Stop its launch, or give each daemon its own "
    "GPUs with VLLM_BOOTSTRAP_GPUS.",
    FailureClass.SPAWN_FAILED: "See the daemon's own log; check that the engine's interpreter exists and can be run.",
    FailureClass.SHIM_LOST: "The supervising process was killed from outside; what was left of the engine was ended. "
    "Look for the kernel's out-of-memory killer (dmesg) and launch again.",
    FailureClass.WAKE_FAILED: "The engine was ended. Launch again; if it happens again, launch this model without "
    "sleep.",
    FailureClass.HOST_REBOOTED: "The machine was restarted. Launch again, or use a restart policy to have it done.",
}


def explain_end(why: Why, outcome: Outcome, engine: Engine, log_tail: Sequence[str]) -> Failure | None:
    """Why a launch failed, or None when the operator wished it to stop.

    1. operator → None  2. boot timeout  3. unhealthy  4. trouble of ours, or it did not wake  5. no exit record → shim
    lost  6. else the engine's own reading of exit code, signal and log.
    """
    if why is Why.OPERATOR:  # 1
        return None
    lines = tuple(log_tail[-20:])
    if why is Why.BOOT_TIMEOUT:  # 2
        message = "The engine did not become ready in time and showed no progress."
        hint = (
            "See the log for what it was doing. Raise VLLM_BOOTSTRAP_START_TIMEOUT_S or "
            "VLLM_BOOTSTRAP_START_STALL_TIMEOUT_S if it only needs longer."
        )
        return Failure(FailureClass.START_TIMEOUT, message, hint, permanent=False, lines=lines)
    if why is Why.UNHEALTHY:  # 3
        message = "The engine was alive but did no work: its probes failed or its token counters stood still."
        hint = "It was stopped to free the GPU. Look at the last log lines; a restart policy relaunches it by itself."
        return Failure(FailureClass.UNHEALTHY, message, hint, permanent=False, lines=lines)
    if outcome.trouble is not None:  # 4
        kind, message = outcome.trouble
        return Failure(kind, message, _HINTS[kind], permanent=False, lines=lines)
    if why is Why.WAKE_FAILED:
        kind = FailureClass.WAKE_FAILED
        return Failure(kind, "The engine did not wake from its sleep.", _HINTS[kind], permanent=False, lines=lines)
    record = outcome.record
    if record is None:  # 5
        kind = FailureClass.SHIM_LOST
        return Failure(kind, "The engine's supervising process died.", _HINTS[kind], permanent=False, lines=lines)
    if record.error is not None:
        kind = FailureClass.SPAWN_FAILED
        return Failure(kind, record.error, _HINTS[kind], permanent=False, lines=lines)
    return engine.explain(ExitFacts(record.exit_code, record.signal, outcome.was_ready, outcome.asleep), log_tail)  # 6
