"""What the page shows of the catalogue: each model with its state, who waits for it, and what a load would take.

Pure functions of their arguments, like ``board``, of which this is a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vllm_bootstrap.models.types import ModelProgress, ModelState, ModelView
from vllm_bootstrap.wire import LaunchStatus
from vllm_bootstrap.wording import duration, percent, phase, time_left, words

MODELS_SHOWN = 40
NEARLY = 0.99
# The looks there are already: a colour says the same everywhere on the page.
_TONES: dict[ModelState, str] = {
    "loaded": "ready", "loading": "bootstrapping", "waking": "bootstrapping", "falling_asleep": "stopping",
    "unloading": "stopping", "unresponsive": "unresponsive", "failed": "failed",
}  # fmt: skip
_FIRST = ("failed", "unresponsive", "loading", "waking", "loaded", "falling_asleep", "unloading", "asleep", "unloaded")
_COMING = frozenset({"loading", "waking"})
_LOADABLE = frozenset({"unloaded", "asleep", "failed"})
_UNLOADABLE = frozenset({"loaded", "unresponsive", "asleep", "loading", "waking"})


class ModelBar(NamedTuple):
    """``percent`` None: it moves, nobody knows how far."""

    percent: int | None
    label: str


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One model. ``key`` is unique on the page, ``trouble`` says why its last load failed and what helps."""

    key: str
    name: str
    tone: str
    label: str
    about: str
    figures: str
    bar: ModelBar | None
    why: str
    trouble: tuple[str, str] | None
    can_load: bool
    can_unload: bool


@dataclass(frozen=True, slots=True)
class ModelsPart:
    """``headline`` counts by state, ``more`` what is left out; ``note``: why an edit of the file is not in force."""

    headline: str = ""
    rows: tuple[ModelRow, ...] = ()
    more: str = ""
    note: str = ""


def models_part(views: Sequence[ModelView], launches: Sequence[LaunchStatus], note: str | None) -> ModelsPart:
    """``launches``: those there are, to say on which GPUs a model is."""
    rows = sorted(views, key=lambda view: (_FIRST.index(view.state), view.entry.name))
    left_out = len(rows) - MODELS_SHOWN
    devices = {launch.launch_id: launch for launch in launches}
    counts = [(sum(view.state == state for view in views), state) for state in _FIRST]
    return ModelsPart(
        headline=" · ".join(f"{count} {words(state)}" for count, state in counts if count),
        rows=tuple(_row(view, devices) for view in rows[:MODELS_SHOWN]),
        more=f"and {left_out} more" if left_out > 0 else "",
        note=note or "",
    )


def _row(view: ModelView, launches: dict[str, LaunchStatus]) -> ModelRow:
    name, trouble = view.entry.name, view.trouble if view.state == "failed" else None
    return ModelRow(
        key=f"model-{name}",
        name=name,
        tone=_TONES.get(view.state, view.state),
        label=words(view.state),
        about=" · ".join(part for part in (_where(view, launches), "pinned" if view.entry.pin else "") if part),
        figures=_figures(view),
        bar=_bar(view.progress) if view.progress is not None and view.state in _COMING else None,
        why=view.why or "",
        trouble=None if trouble is None else (f"{words(trouble.failure_class)}: {trouble.message}", trouble.hint),
        can_load=view.state in _LOADABLE,
        can_unload=view.state in _UNLOADABLE,
    )


def _where(view: ModelView, launches: dict[str, LaunchStatus]) -> str:
    claims = [claim for one in view.launches if one.launch_id in launches for claim in launches[one.launch_id].gpus]
    if any(claim.uuid == "cpu" for claim in claims):
        return "CPU"
    names = dict.fromkeys(str(claim.uuid if claim.index is None else claim.index) for claim in claims)
    return f"GPU {', '.join(names)}" if names else ""


def _figures(view: ModelView) -> str:
    waiting = sum(view.waiting.values())
    estimate = view.wake_est_s if view.state == "asleep" and view.wake_est_s is not None else view.load_est_s
    here = view.state in ("loaded", "unresponsive")
    parts = [
        f"{view.in_flight} in flight" if here or view.in_flight else "",
        f"{waiting} waiting" if waiting else "",
        f"{view.batch_lines} batch lines" if view.batch_lines else "",
        f"idle {duration(view.idle_s)}" if here and view.idle_s is not None and not view.in_flight else "",
        f"{'wakes' if view.state == 'asleep' else 'loads'} in {duration(estimate)}" if estimate and not here else "",
        "changed since it was loaded" if view.outdated else "",
    ]
    return " · ".join(part for part in parts if part)


def _bar(progress: ModelProgress) -> ModelBar:
    """By earlier loads where there were any, else by the phase's own fraction."""
    done = progress.fraction
    parts = [phase(progress.phase) + (f" {percent(done)}" if done is not None else ""), duration(progress.elapsed_s)]
    if progress.eta_s is not None:
        total = progress.elapsed_s + progress.eta_s
        done = min(NEARLY, progress.elapsed_s / total) if total > 0 else done
        parts.append(time_left(progress.eta_s))
    return ModelBar(None if done is None else round(done * 100), " · ".join(parts))
