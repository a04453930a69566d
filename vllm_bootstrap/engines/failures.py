"""Why an engine died, from how it ended and its last log lines. PURE.

The decision, in this order:

1. died while starting, and the log names a known cause → that cause
2. died after it was ready, and the log shows that memory ran out → that
3. ended by a signal → killed by signal
4. anything else → the engine died; exit code 0 without our wish is no exception

Invariant: lines of information are never read as causes (they quote arguments and advice); the message of a death
after readiness holds nothing from the log, because the log may hold prompts by then.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vllm_bootstrap.engines import loglines
from vllm_bootstrap.engines.base import ExitFacts, Failure, FailureClass
from vllm_bootstrap.engines.causes import CAUSES, Cause
from vllm_bootstrap.engines.loglines import LogLine

# Linux numbers; only for people to read.
SIGNALS: Mapping[int, str] = {
    1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 9: "SIGKILL",
    11: "SIGSEGV", 13: "SIGPIPE", 14: "SIGALRM", 15: "SIGTERM", 24: "SIGXCPU", 31: "SIGSYS",
}  # fmt: skip
SIGKILL = 9
CRASHES = frozenset({4, 6, 7, 8, 11, 31})

MAX_TELLING = 12
MAX_CHARS = 600
TAIL_WITHOUT_CAUSE = 10

_EXCEPTION = re.compile(r"[\w.]*(?:Error|Exception|Interrupt|Exit)\b(?:: .*)?$|[\w.-]+: error: .*")
# What every failed start ends with, whatever the cause.
_SECONDARY = re.compile(
    r"RuntimeError: Engine core initialization failed|Exception: WorkerProc initialization failed|"
    r"RuntimeError: Executor failed|.*EngineDeadError"
)


@dataclass(frozen=True, slots=True)
class _Found:
    cause: Cause
    match: re.Match[str]


def explain(facts: ExitFacts, log_tail: Sequence[str]) -> Failure:
    """Classify a death. ``log_tail``: the last lines of the log, oldest first."""
    lines = [loglines.parse(line) for line in log_tail]
    found = _find(lines, after_ready=facts.was_ready)
    if found is not None:  # 1, 2
        return _known(facts, found, lines)
    if facts.signal is not None:  # 3
        return _killed(facts, lines)
    return _died(facts, lines)  # 4


def _find(lines: Sequence[LogLine], *, after_ready: bool) -> _Found | None:
    telling = [line.text for line in lines if _may_tell(line)]
    for cause in CAUSES:
        if after_ready and not cause.any_time:
            continue
        for text in telling:
            match = cause.pattern.search(text)
            if match is not None:
                return _Found(cause, match)
    return None


def _known(facts: ExitFacts, found: _Found, lines: Sequence[LogLine]) -> Failure:
    cause, match = found.cause, found.match
    return _failure(
        facts,
        cause.failure_class,
        _fill(cause.message, match),
        _fill(cause.hint, match),
        permanent=cause.permanent,
        lines=_telling(lines, lambda text: cause.pattern.search(text) is not None),
    )


def _fill(text: str | Callable[[re.Match[str]], str], match: re.Match[str]) -> str:
    return text if isinstance(text, str) else text(match)


def _killed(facts: ExitFacts, lines: Sequence[LogLine]) -> Failure:
    number = facts.signal or 0
    name = SIGNALS.get(number, f"signal {number}")
    hint = "Somebody or something outside of this daemon ended the engine. A restart policy relaunches it by itself."
    if number == SIGKILL:
        hint = (
            "SIGKILL that we did not send is mostly the kernel's out-of-memory killer (see dmesg): give the engine "
            "less host memory to use, or the machine more."
        )
    elif number in CRASHES:
        hint = (
            "The engine crashed in native code: check that driver, CUDA and engine fit together. SIGBUS often means "
            "that /dev/shm is too small (--shm-size of the container)."
        )
    message = f"The engine was ended by {name}{_when(facts)}."
    return _failure(facts, FailureClass.KILLED_BY_SIGNAL, message, hint, permanent=False, lines=_telling(lines))


def _died(facts: ExitFacts, lines: Sequence[LogLine]) -> Failure:
    code = "an unknown exit code" if facts.exit_code is None else f"exit code {facts.exit_code}"
    message = f"The engine ended by itself with {code}{_when(facts)}."
    root = next((line.text for line in lines if _is_root(line)), None)
    if root is not None and not facts.was_ready:
        message += f" {root[:300]}"
    hint = "The lines tell what the engine said last. A restart policy relaunches it by itself."
    return _failure(facts, FailureClass.ENGINE_DIED, message, hint, permanent=False, lines=_telling(lines))


def _when(facts: ExitFacts) -> str:
    if facts.asleep:
        return " while it slept"
    return " while it was serving" if facts.was_ready else " before it was ready"


def _is_root(line: LogLine) -> bool:
    return _may_tell(line) and bool(_EXCEPTION.match(line.text)) and not _SECONDARY.match(line.text)


def _may_tell(line: LogLine) -> bool:
    return not line.is_calm and not line.is_source


def _telling(lines: Sequence[LogLine], extra: Callable[[str], bool] = lambda _: False) -> tuple[str, ...]:
    """The lines worth reading: those that named the cause and every exception, each once; else the last ones."""
    chosen: dict[str, None] = {}
    for line in lines:
        if _may_tell(line) and (extra(line.text) or _EXCEPTION.match(line.text)):
            chosen.setdefault(line.text[:MAX_CHARS])
    if not chosen:
        return tuple(line.text[:MAX_CHARS] for line in lines if line.text)[-TAIL_WITHOUT_CAUSE:]
    kept = list(chosen)
    if len(kept) > MAX_TELLING:
        half = MAX_TELLING // 2
        kept = [*kept[:half], *kept[-half:]]
    return tuple(kept)


def _failure(
    facts: ExitFacts,
    failure_class: FailureClass,
    message: str,
    hint: str,
    *,
    permanent: bool,
    lines: tuple[str, ...],
) -> Failure:
    return Failure(failure_class, message, hint, permanent, exit_code=facts.exit_code, signal=facts.signal, lines=lines)
