"""Metrics of models and of idle time: what loading, putting away and waiting come to.

Invariant: the label ``model`` has few values: names of the catalogue and names that were loaded at least once, at most
``MODELS_MAX`` of them; all else is counted under ``other``, so that no client can invent a series. Knows nothing of who
touches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from vllm_bootstrap.models.idle_time import DeviceTime
from vllm_bootstrap.models.types import ModelState
from vllm_bootstrap.tallies import MODELS_MAX, OTHER

LOAD_S = (1.0, 2, 5, 15, 30, 60, 120, 300, 600, 1200)
STATES: tuple[ModelState, ...] = (
    "unloaded", "loading", "loaded", "unresponsive", "falling_asleep", "asleep", "waking", "unloading", "failed"
)  # fmt: skip

How = Literal["start", "wake"]


class Declares(Protocol):
    """How metrics are declared, under our prefix and in our registry."""

    registry: CollectorRegistry

    def counter(self, name: str, help_text: str, *labels: str) -> Counter: ...

    def gauge(self, name: str, help_text: str, *labels: str) -> Gauge: ...

    def histogram(self, name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Histogram: ...


class ModelMetrics:
    """Methods are cheap and never raise. ``how`` is ``start`` or ``wake`` for loads, ``stop`` or ``sleep`` for putting
    away; ``why`` is a word of a fixed few."""

    def __init__(self, declare: Declares) -> None:
        self._loads = declare.counter(
            "model_loads", "Loads of models that ended, by outcome: loaded, or the failure class.", "model", "outcome"
        )
        self._seconds = declare.histogram(
            "model_load_seconds", "From the decision to load (start or wake) to ready.", LOAD_S, "model", "how"
        )
        self._put_away = declare.counter(
            "model_put_away", "Models put away, by how (stop or sleep) and why.", "model", "how", "why"
        )
        self._held = declare.gauge("held_requests", "Requests that wait for a model that is not loaded.", "class")
        self._state = declare.gauge("model_state", "1 for the state a model is in, else 0.", "model", "state")
        self._bytes = declare.counter("model_download_bytes", "Bytes of weights that were downloaded.")
        self._hook = declare.counter(
            "idle_hook_runs", "Attempts at the idle command and webhook that ended, by outcome.", "action", "outcome"
        )
        self._names: set[str] = set()
        self._catalogue: frozenset[str] = frozenset()

    def catalogue(self, names: Iterable[str]) -> None:
        """These are the names that were configured. What was counted of others stays counted."""
        self._catalogue = frozenset(names)

    def loaded(self, name: str, how: How, seconds: float) -> None:
        """A model is ready, so long after that was decided."""
        known = self._known(name, admit=True)
        self._loads.labels(known, "loaded").inc()
        self._seconds.labels(known, how).observe(seconds)

    def load_failed(self, name: str, failure_class: str) -> None:
        """A load ended without a ready model."""
        self._loads.labels(self._known(name), failure_class).inc()

    def put_away(self, name: str, how: Literal["stop", "sleep"], why: str) -> None:
        """A model's engine was stopped, or fell asleep."""
        self._put_away.labels(self._known(name), how, why).inc()

    def state(self, name: str, state: ModelState) -> None:
        """A model is in this state from now on. Those that have no series of their own have none."""
        known = self._known(name)
        if known != OTHER:
            for one in STATES:
                self._state.labels(known, one).set(one == state)

    def states(self, by_name: Mapping[str, ModelState]) -> None:
        """All models there are, with their states: others leave no stale series."""
        self._state.clear()
        for name, state in by_name.items():
            self.state(name, state)

    def held(self, by_class: Mapping[str, int]) -> None:
        """So many wait for a load now."""
        for name in ("realtime", "batch"):
            self._held.labels(name).set(by_class.get(name, 0))

    def downloaded(self, count: int) -> None:
        """So many more bytes of weights have come."""
        self._bytes.inc(count)

    def idle_hook(self, action: str, outcome: str) -> None:
        """An attempt at an action of the idle hook has ended."""
        self._hook.labels(action, outcome).inc()

    def _known(self, name: str, *, admit: bool = False) -> str:
        if name in self._names:
            return name
        if (admit or name in self._catalogue) and len(self._names) < MODELS_MAX:
            self._names.add(name)
            return name
        return OTHER


@dataclass(slots=True)
class IdleFigures:
    """What is printed of idle time; set before printing."""

    gpus: tuple[DeviceTime, ...] = ()


Note = Callable[[str, str, tuple[str, ...], str], None]


@dataclass(eq=False)
class IdleMetrics(Collector):
    """Idle time as counters, made when they are asked for: over all starts, so they go on where they were."""

    prefix: str
    figures: IdleFigures
    note: Note = field(repr=False)

    _KINDS = (
        ("claimed", "Time that launches held the GPU, over all starts of the daemon."),
        ("working", "Time that requests were in flight on a launch that held the GPU."),
        ("idle", "Time that was seen and was not work, whether a launch held the GPU or not."),
    )

    def __post_init__(self) -> None:
        for kind, help_text in self._KINDS:
            self.note(f"gpu_{kind}_seconds_total", "counter", ("gpu",), help_text)

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        for kind, help_text in self._KINDS:
            family = CounterMetricFamily(f"{self.prefix}_gpu_{kind}_seconds", help_text, labels=("gpu",))
            for time in self.figures.gpus:
                spent = {"claimed": time.total.claimed_s, "working": time.total.working_s, "idle": time.total.idle_s}
                family.add_metric((str(time.index),), spent[kind])
            yield family
