"""What admission asks of others: a launch's batch budget, and whoever loads models on demand. PURE.

Invariants: the budget only says how much batch may use; who gets it is admission's to decide, and nothing here starts,
stops or counts a request twice. Prospects only say what may come; admission decides who waits for it. All times are
seconds of one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.serving import RequestClass


@dataclass(frozen=True, slots=True)
class EngineSignals:
    """What an engine's metrics say at one moment. None: it does not say (never taken for zero). ``kv_usage`` is a part
    from 0 to 1; tokens, preemptions and seconds are counters since the engine started."""

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    preemptions: int | None = None
    prompt_tokens: int | None = None
    generation_tokens: int | None = None
    inter_token_seconds_sum: float | None = None
    inter_token_count: int | None = None
    prefill_seconds_sum: float | None = None
    prefill_count: int | None = None


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """A launch's batch budget as an operator sees it. ``reason`` is one sentence. Seconds; None: not known yet."""

    slots: int
    reserve: int
    allowance: int
    batch_sequences: int
    realtime_sequences: int
    reason: str
    ttft_baseline_s: float | None = None
    ttft_recent_s: float | None = None
    step_s: float | None = None
    promotions: int = 0


class BatchBudget(Protocol):
    """The batch budget of one launch. Admission calls each event once, in the order things happen; no method raises
    or blocks. ``sequences`` are slots."""

    def resize(self, slots: int) -> None:
        """The engine runs this many sequences at once."""

    def realtime_arrived(self, now: float) -> None:
        """A realtime request that this launch could serve has come (granted or queued)."""

    def realtime_granted(self, sequences: int, prompt_tokens: int, now: float) -> None: ...

    def realtime_began(self, ttft_s: float, now: float) -> None:
        """A realtime answer has begun, ``ttft_s`` after its grant."""

    def realtime_ended(self, sequences: int, now: float) -> None: ...

    def batch_granted(self, request: int, sequences: int, prompt_tokens: int, now: float) -> None: ...

    def batch_began(self, request: int, now: float) -> None:
        """A batch answer has begun: its prompt is processed. Not told of answers that come whole at the end."""

    def batch_ended(self, request: int, sequences: int, now: float, *, worked: bool = True) -> None:
        """It ended, was taken back or failed. ``worked``: an engine has done it."""

    def batch_waits(self, waiting: bool, now: float) -> None:
        """Whether any batch request waits for this launch; told on change."""

    def signals(self, signals: EngineSignals, now: float) -> None: ...

    def allowance(self, now: float) -> int:
        """Batch sequences that may run here at once now: 0 to slots minus reserve."""

    def paced_until(self, now: float) -> float | None:
        """No batch request may be granted before this time, because a batch prompt is being processed while realtime
        is active. None: one may go now."""

    def overdue(self, now: float) -> bool:
        """Whether batch is owed as much as its floor of a minute: one batch request may go although realtime
        waits. Whoever uses this calls ``promoted``."""

    def promoted(self, now: float) -> None: ...

    def take_back(self, now: float) -> int:
        """Batch sequences that are too many now and should be taken back where their answer has not begun."""

    def next_change(self, now: float) -> float | None:
        """When to ask again although nothing happens (allowance grows, pacing ends, floor falls due). None: never."""

    def report(self, now: float) -> BudgetReport: ...


class Demand(NamedTuple):
    """Who waits under one model's name. ``since``: when the realtime request began to wait that has waited longest,
    None when none does; ``batch_since`` likewise. ``served``: some launch may serve them now."""

    realtime: int
    batch: int
    since: float | None
    batch_since: float | None
    served: bool


class Prospects(Protocol):
    """What may be loaded when it is asked for. No method raises or blocks."""

    def base_of(self, name: str) -> str | None:
        """The base model that would be loaded for this served name; None: nothing would."""

    def refusal(self, name: str) -> ApiError | None:
        """Why a request for it must not wait (its last load has just failed), None when it may."""

    def asked(self, name: str, cls: RequestClass, *, comes_back: bool) -> None:
        """A request for it has come while nothing serves it. ``comes_back``: it does not wait, or not any longer; it
        was told to come again later."""

    def ready_in_s(self, name: str) -> float | None:
        """When it will probably be ready, None where nothing is known."""

    def waits_for(self, name: str) -> str | None:
        """What its load waits for, in words that complete "it is not loaded yet: ", None while it is being loaded."""


class NoProspects:
    """Nothing is ever loaded on demand."""

    def base_of(self, name: str) -> str | None:  # noqa: ARG002 - the interface's
        return None

    def refusal(self, name: str) -> ApiError | None:  # noqa: ARG002 - the interface's
        return None

    def asked(self, name: str, cls: RequestClass, *, comes_back: bool) -> None:
        """Nobody cares."""

    def ready_in_s(self, name: str) -> float | None:  # noqa: ARG002 - the interface's
        return None

    def waits_for(self, name: str) -> str | None:  # noqa: ARG002 - the interface's
        return None
