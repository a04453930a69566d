"""What the page shows of requests: those under way, the last finished ones, and what batch may use of a launch.

Pure functions of their arguments, like ``board``, of which this is a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_bootstrap.auth import scopes
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.errors import Cancelled
from vllm_bootstrap.wire import BatchBudget, Load
from vllm_bootstrap.wire_requests import ActivityEntry, RequestEntry
from vllm_bootstrap.wording import duration, percent, short, tokens_per_second

REQUESTS_SHOWN = 30
RECENT_SHOWN = 8
WORTH_SAYING_MS = 50


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a launch's slots: its kind, where it begins and how wide it is, in percent."""

    kind: str
    start: float
    width: float


@dataclass(frozen=True, slots=True)
class SlotsCard:
    """Who uses a launch's slots. ``figures`` are names with values, ``reason`` says why batch may use what it may."""

    shares: tuple[Share, ...]
    label: str
    figures: tuple[tuple[str, str], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class RequestRow:
    id: str
    state: str
    cls: str
    owner: str
    model: str
    figures: str
    can_cancel: bool


@dataclass(frozen=True, slots=True)
class RecentRow:
    """A finished request. ``tone``: good, refused, or failed."""

    key: str
    tone: str
    status: str
    cls: str
    owner: str
    model: str
    figures: str
    speed: str
    at: str


@dataclass(frozen=True, slots=True)
class TrafficPart:
    """``headline`` counts what is under way; ``more`` says what is left out of ``requests``."""

    headline: str = ""
    requests: tuple[RequestRow, ...] = ()
    more: str = ""
    recent: tuple[RecentRow, ...] = ()


def slots_card(load: Load) -> SlotsCard | None:
    """The slots of a launch, None where nothing is known of them."""
    batch = load.batch
    if batch is None or batch.slots < 1:
        return None
    figures = [
        ("realtime", _class_figures(load, "realtime", "")),
        ("batch", _class_figures(load, "batch", f" of {batch.allowance} allowed")),
        ("kept for realtime", str(batch.reserve) if batch.reserve else ""),
        ("oldest waits", "" if load.oldest_wait_s is None else duration(load.oldest_wait_s)),
        ("first token", _against_baseline(batch)),
    ]
    label = f"Slots: {batch.realtime_sequences} realtime, {batch.batch_sequences} batch, of {batch.slots}"
    return SlotsCard(_shares(batch), label, tuple((n, v) for n, v in figures if v), batch.reason)


def _class_figures(load: Load, name: str, of: str) -> str:
    queued = load.queued.get(name, 0)
    return f"{load.in_flight.get(name, 0)} running{of}" + (f", {queued} queued" if queued else "")


def _against_baseline(batch: BatchBudget) -> str:
    if batch.ttft_recent_s is None or batch.ttft_baseline_s is None or batch.ttft_baseline_s <= 0:
        return ""
    beside = batch.ttft_recent_s / batch.ttft_baseline_s
    return f"{batch.ttft_recent_s * 1000:.0f} ms, {percent(beside)} of alone"


def _shares(batch: BatchBudget) -> tuple[Share, ...]:
    """Realtime from the left, then batch, then what batch may still take."""
    found, start = [], 0
    may_take = max(0, batch.allowance - batch.batch_sequences)
    for kind, count in (
        ("realtime", batch.realtime_sequences), ("batch", batch.batch_sequences), ("allowed", may_take),
    ):  # fmt: skip
        width = min(count, batch.slots - start)
        if width > 0:
            found.append(Share(kind, round(100 * start / batch.slots, 2), round(100 * width / batch.slots, 2)))
            start += width
    return tuple(found)


def traffic_part(requests: Sequence[RequestEntry], recent: Sequence[ActivityEntry], caller: Principal) -> TrafficPart:
    """``requests`` oldest first, ``recent`` newest first."""
    counts = [(sum(entry.state == state for entry in requests), state) for state in ("running", "queued", "reading")]
    left_out = len(requests) - REQUESTS_SHOWN
    # What waits is what people look for; the rest in the order of arrival.
    shown = sorted(requests, key=lambda entry: entry.state != "queued")[:REQUESTS_SHOWN]
    return TrafficPart(
        headline=" · ".join(f"{count} {state}" for count, state in counts if count),
        requests=tuple(_request(entry, caller) for entry in shown),
        more=f"and {left_out} more" if left_out > 0 else "",
        recent=tuple(_recent(entry) for entry in recent),
    )


def _request(entry: RequestEntry, caller: Principal) -> RequestRow:
    figures = [duration(entry.age_s)]
    if entry.state == "running" and entry.queue_ms >= WORTH_SAYING_MS:
        figures.append(f"waited {short(entry.queue_ms)}")
    if entry.tokens:
        figures.append(f"{entry.tokens} tokens so far")
    if entry.sequences > 1:
        figures.append(f"{entry.sequences} sequences")
    own = entry.owner == caller.name and scopes.allows(caller.scopes, scopes.INFERENCE)
    return RequestRow(
        id=entry.id,
        state=entry.state,
        cls=entry.request_class or "",
        owner=entry.owner,
        model=entry.model or entry.path,
        figures=" · ".join(figures),
        can_cancel=own or scopes.allows(caller.scopes, frozenset({scopes.ADMIN})),
    )


def _tone(status: int, code: str | None) -> str:
    """A stream that broke off had begun with 200: it is not good for that."""
    if status < 400:
        return "good" if code is None else "refused" if code == Cancelled.code else "bad"
    return "refused" if status < 500 else "bad"


def _recent(entry: ActivityEntry) -> RecentRow:
    speed = tokens_per_second(entry.completion_tokens, entry.duration_ms, entry.ttft_ms or entry.queue_ms)
    figures = [entry.code.replace("_", " ")] if entry.code else []
    figures.append(short(entry.duration_ms))
    if entry.ttft_ms is not None:
        figures.append(f"first token {short(entry.ttft_ms)}")
    elif entry.queue_ms >= WORTH_SAYING_MS:
        figures.append(f"waited {short(entry.queue_ms)}")
    if entry.prompt_tokens is not None:
        figures.append(f"{entry.prompt_tokens} + {entry.completion_tokens or 0} tokens")
    elif entry.completion_tokens is not None:  # of a stream that was cut before the engine said what it had read
        figures.append(f"{entry.completion_tokens} tokens")
    return RecentRow(
        key=entry.id,
        tone=_tone(entry.status, entry.code),
        status=str(entry.status),
        cls=entry.request_class or "",
        owner=entry.owner,
        model=entry.model or entry.path,
        figures=" · ".join(figures),
        speed="" if speed is None else f"{speed:.0f} tokens/s",
        at=f"{entry.started_at:%H:%M:%S}",
    )
