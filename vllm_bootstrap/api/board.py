"""What the page shows, out of what the API answers: plain values with words and figures ready for the template.

Pure functions of their arguments. What a caller may not see was left out before (``views``); nothing is decided here
but wording, order and what is worth showing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from vllm_bootstrap.api.board_models import ModelsPart
from vllm_bootstrap.api.board_traffic import SlotsCard, TrafficPart, slots_card
from vllm_bootstrap.launches.types import LaunchView
from vllm_bootstrap.wire import GpuInfo, GpuListing, LaunchStatus, Progress
from vllm_bootstrap.wording import duration, percent, phase, reason, size, time_left, words

LABELS = {"bootstrapping": "loading", "falling_asleep": "falling asleep"}
ENDED_STATES = frozenset({"stopped", "failed"})
ENDED_SHOWN = 8
NEARLY = 0.99


@dataclass(frozen=True, slots=True)
class Bar:
    """``percent`` None: it moves, nobody knows how far."""

    percent: int | None
    label: str


@dataclass(frozen=True, slots=True)
class FailureCard:
    kind: str
    message: str
    hint: str
    ended: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LaunchCard:
    """One launch. ``tone`` is its look (a state, or ``unresponsive``), ``facts`` are names with values."""

    id: str
    name: str
    model: str
    tone: str
    label: str
    active: bool
    can_stop: bool
    device: str
    summary: str
    bar: Bar | None
    failure: FailureCard | None
    slots: SlotsCard | None
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Owner:
    launch_id: str
    name: str
    share: str


@dataclass(frozen=True, slots=True)
class GpuCard:
    key: str
    title: str
    name: str
    state: str
    reason: str
    warmth: str
    memory: Bar
    load: str
    owners: tuple[Owner, ...]
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """Everything on the page that changes. ``headline`` sums it up in a few words."""

    headline: str
    active: tuple[LaunchCard, ...]
    ended: tuple[LaunchCard, ...]
    gpus: tuple[GpuCard, ...]
    gpu_note: str = ""
    traffic: TrafficPart = field(default_factory=TrafficPart)
    models: ModelsPart = field(default_factory=ModelsPart)
    allowed: frozenset[str] = field(default_factory=frozenset)


def worth_showing(launches: Sequence[LaunchView]) -> list[LaunchView]:
    """All active launches and the last ended ones, in the order given (newest first)."""
    ended = [view.launch_id for view in launches if view.state in ENDED_STATES]
    left_out = set(ended[ENDED_SHOWN:])
    return [view for view in launches if view.launch_id not in left_out]


def make(
    launches: Sequence[LaunchStatus],
    gpus: GpuListing,
    now: datetime,
    allowed: frozenset[str],
    traffic: TrafficPart | None = None,
    models: ModelsPart | None = None,
) -> Board:
    """``launches`` newest first. ``allowed``: what the caller may do beyond looking (``admin``, ``logs``)."""
    active = [launch for launch in launches if launch.state not in ENDED_STATES]
    ended = [launch for launch in launches if launch.state in ENDED_STATES]
    names = {launch.launch_id: launch.served_model_name for launch in launches}
    return Board(
        headline=_headline(active, gpus),
        active=tuple(launch_card(launch, now) for launch in active),
        ended=tuple(launch_card(launch, now) for launch in ended),
        gpus=tuple(gpu_card(gpu, names) for gpu in gpus.data),
        gpu_note=_gpu_note(gpus),
        traffic=traffic or TrafficPart(),
        models=models or ModelsPart(),
        allowed=allowed,
    )


def _headline(active: Sequence[LaunchStatus], gpus: GpuListing) -> str:
    ready = sum(launch.state == "ready" for launch in active)
    loading = sum(launch.state == "bootstrapping" for launch in active)
    parts = [f"{ready} ready"]
    if loading:
        parts.append(f"{loading} loading")
    if gpus.kind == "cpu":
        return " · ".join([*parts, "no GPU here, models run on the CPU"])
    free = sum(gpu.state == "free" for gpu in gpus.data)
    return " · ".join([*parts, f"{free} of {len(gpus.data)} GPUs free"])


def _gpu_note(gpus: GpuListing) -> str:
    if gpus.unknown:
        return f"Nothing can be given out at the moment: {gpus.unknown}"
    if not gpus.pids_trusted:
        return "The driver's process ids mean nothing in this container: others' use is judged by memory alone."
    return ""


def launch_card(launch: LaunchStatus, now: datetime) -> LaunchCard:
    """One launch as a card."""
    unresponsive = launch.state == "ready" and launch.unresponsive
    return LaunchCard(
        id=launch.launch_id,
        name=launch.served_model_name,
        model=launch.model,
        tone="unresponsive" if unresponsive else launch.state,
        label="unresponsive" if unresponsive else LABELS.get(launch.state, launch.state),
        active=launch.state not in ENDED_STATES,
        can_stop=launch.state not in (*ENDED_STATES, "stopping"),
        device=_where(launch),
        summary=_summary(launch, now),
        bar=_start_bar(launch) if launch.state == "bootstrapping" else None,
        failure=_failure(launch),
        slots=slots_card(launch.load) if launch.state == "ready" else None,
        facts=_facts(launch),
    )


def _device(launch: LaunchStatus) -> str:
    if any(claim.uuid == "cpu" for claim in launch.gpus):
        return "CPU"
    names = ", ".join(str(claim.uuid if claim.index is None else claim.index) for claim in launch.gpus)
    share = launch.gpus[0].share if launch.gpus else 1
    return (f"GPU {names}" if names else "") + (f" ({percent(share)})" if share < 1 else "")


def _where(launch: LaunchStatus) -> str:
    replica = f"one of {launch.group_size} replicas" if launch.group_id != launch.launch_id else ""
    return " · ".join(part for part in (_device(launch), replica) if part)


def _summary(launch: LaunchStatus, now: datetime) -> str:
    since = duration((now - launch.state_changed_at).total_seconds())
    if launch.state == "ready":
        running, queued = sum(launch.load.in_flight.values()), sum(launch.load.queued.values())
        of = f" of {launch.load.capacity}" if launch.load.capacity else ""
        return f"{running}{of} running · {queued} queued · up {since}"
    if launch.state == "stopping":
        return f"{reason(launch.stopping_because)}, for {since}"
    if launch.state in ("falling_asleep", "asleep", "waking"):
        return f"for {since}"
    if launch.state == "bootstrapping":
        return f"attempt {launch.attempt}" if launch.attempt > 1 else ""
    lived = duration((launch.state_changed_at - launch.created_at).total_seconds())
    return f"ended {since} ago, lasted {lived}"


def _start_bar(launch: LaunchStatus) -> Bar:
    """By earlier starts of the same model where there were any, else by the phase's own fraction."""
    progress = launch.progress
    if launch.next_attempt_at is not None:
        return Bar(None, f"waiting for attempt {launch.attempt}")
    if progress is None:
        return Bar(None, phase(None))
    parts = [phase(progress.phase) + _detail(progress), duration(progress.elapsed_s)]
    done = progress.fraction
    if progress.eta_s is not None and progress.elapsed_s + progress.eta_s > 0:
        done = min(NEARLY, progress.elapsed_s / (progress.elapsed_s + progress.eta_s))
        parts.append(time_left(progress.eta_s))
    return Bar(None if done is None else round(done * 100), " · ".join(parts))


def _detail(progress: Progress) -> str:
    if progress.fraction is not None:
        return f" {percent(progress.fraction)}"
    if progress.phase in ("load", "download") and progress.downloaded_bytes:
        total = f" of {size(progress.download_total_bytes)}" if progress.download_total_bytes else ""
        return f" ({size(progress.downloaded_bytes)}{total} in the cache)"
    return ""


def _failure(launch: LaunchStatus) -> FailureCard | None:
    failure = launch.failure
    if failure is None:
        return None
    ended = ""
    if failure.signal is not None:
        ended = f"signal {failure.signal}"
    elif failure.exit_code is not None:
        ended = f"exit code {failure.exit_code}"
    lines = tuple(failure.lines or ())
    return FailureCard(words(failure.failure_class), failure.message, failure.hint, ended, lines)


def _facts(launch: LaunchStatus) -> tuple[tuple[str, str], ...]:
    rows = [
        ("group", launch.group_id if launch.group_id != launch.launch_id else ""),
        ("model", launch.model if launch.model != launch.served_model_name else ""),
        ("engine", launch.engine),
        ("owner", launch.owner),
        ("own path", f"{launch.proxy_url}/v1" if launch.state == "ready" else ""),
        ("process", f"{launch.pid} under {launch.shim_pid}" if launch.pid else ""),
        ("restart", f"{launch.restart}, attempt {launch.attempt}" if launch.restart != "never" else ""),
        ("labels", ", ".join(f"{name}={value}" for name, value in launch.labels.items())),
        ("started", f"{launch.created_at:%Y-%m-%d %H:%M:%S} UTC"),
    ]
    return tuple((name, value) for name, value in rows if value)


def gpu_card(gpu: GpuInfo, names: dict[str, str]) -> GpuCard:
    """One device. ``names``: launch id to the name its model is served under."""
    used, total = gpu.memory_used_bytes, gpu.memory_total_bytes
    part = round(100 * used / total) if used is not None and total else None
    memory = f"{size(used)} of {size(total)}" if used is not None else f"{size(total)}, use not known"
    warmth = [
        "" if gpu.temperature_c is None else f"{gpu.temperature_c} °C",
        "" if gpu.power_w is None else f"{gpu.power_w:.0f} W",
    ]
    return GpuCard(
        key=f"gpu-{gpu.index}",
        title="CPU" if gpu.kind == "cpu" else f"GPU {gpu.index}",
        name="" if gpu.kind == "cpu" else gpu.name,
        state=gpu.state,
        reason=_reason(gpu),
        warmth=" · ".join(value for value in warmth if value),
        memory=Bar(part, memory),
        load="" if gpu.utilization is None else f"load {percent(gpu.utilization)}",
        owners=tuple(_owner(claim, names) for claim in gpu.claims),
        others=tuple(_other(gpu)),
    )


def _reason(gpu: GpuInfo) -> str:
    """Why a device cannot be given out, unless what is shown says so already: its owners, or others by name."""
    said = gpu.state in ("free", "claimed") or (gpu.state == "busy" and gpu.others)
    return "" if said else gpu.reason or ""


def _owner(claim: dict[str, object], names: dict[str, str]) -> Owner:
    launch_id, share = str(claim["launch_id"]), claim.get("share")
    part = percent(share) if isinstance(share, float) and share < 1 else ""
    return Owner(launch_id, names.get(launch_id, launch_id), part)


def _other(gpu: GpuInfo) -> list[str]:
    return [
        " ".join(
            part
            for part in (
                f"pid {user.pid}" if user.pid is not None else "a process",
                user.name or "",
                f"of {user.user}" if user.user else "",
                f"with {size(user.used_bytes)}" if user.used_bytes is not None else "",
            )
            if part
        )
        for user in gpu.others
    ]
