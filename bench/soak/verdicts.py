"""What may become of a request while things break around it: every end has a name, and most need an excuse.

Invariant: judged from what a client saw and from when the soak itself killed something; the daemon is not asked.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

# The effects of a daemon that was killed are seen a little later than it is back.
AFTERMATH_S = 3.0
ASKS_FOR_PATIENCE = frozenset({429, 503})
# What a model that is being started, stopped and killed may be refused with, besides limits.
TROUBLE = frozenset(
    {"model_not_found", "launch_not_ready", "model_loading", "overloaded", "draining", "upstream_error"}
)
ENGINES_OWN = "of the engine"
LIMITS = frozenset({"rate_limit_exceeded", "concurrency_limit", "queue_full", "overloaded"})


@dataclass
class Book:
    """Ends by kind of request and name, and what must not have happened. Threads may write at once."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    begun: int = 0
    ended: int = 0
    _outages: list[list[float]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def outage_begins(self) -> None:
        """From now on the daemon may be away."""
        self._outages.append([time.monotonic(), float("inf")])

    def outage_ends(self) -> None:
        self._outages[-1][1] = time.monotonic()

    def excused(self, began: float) -> bool:
        """Whether the daemon was away at some time since ``began``."""
        return any(began < end + AFTERMATH_S for _, end in self._outages)

    def begin(self) -> float:
        with self._lock:
            self.begun += 1
        return time.monotonic()

    def end(self, kind: str, name: str, problem: str | None = None) -> None:
        with self._lock:
            self.ended += 1
            self.ends[kind, name] += 1
            if problem is not None:
                self.problems.append(f"{kind}: {name}: {problem}")

    def lost(self, kind: str, began: float, what: str, *, expected: bool = False) -> None:
        """No answer, or one that broke off without a word."""
        excused = expected or self.excused(began)
        self.end(kind, what, None if excused else f"after {time.monotonic() - began:.1f} s, and nothing was killed")

    def refused(
        self, kind: str, began: float, status: int, retry_after: str | None, body: bytes, *, steady: bool
    ) -> None:
        """An answer other than 200 to an honest request."""
        code, problem = _code_and_flaw(status, retry_after, body)
        if code == ENGINES_OWN and not steady:
            problem = None
        elif problem is None and code not in (LIMITS if steady else LIMITS | TROUBLE) and not self.excused(began):
            problem = f"nothing explains it: {body[:300]!r}"
        self.end(kind, f"{status} {code}", problem)

    def broken_off(self, kind: str, began: float, code: str, *, steady: bool) -> None:
        """A stream that ended with an error event."""
        excused = not steady or self.excused(began)
        self.end(kind, f"event {code}", None if excused else "nothing was killed")


def _code_and_flaw(status: int, retry_after: str | None, body: bytes) -> tuple[str, str | None]:
    """The error's code, and what is wrong with the form of the refusal."""
    try:
        told = json.loads(body)
        code = str(told["error"]["code"])
        if told.get("src") != "vllm-bootstrap":
            return ENGINES_OWN, None
    except (ValueError, KeyError, TypeError):
        return "?", f"no error object: {body[:300]!r}"
    if status == 500:
        return code, "an internal error"
    if status in ASKS_FOR_PATIENCE and not (retry_after or "").isdigit():
        return code, "without Retry-After"
    if status in ASKS_FOR_PATIENCE and not 1 <= int(retry_after or 0) <= 60:
        return code, f"Retry-After {retry_after}"
    return code, None
