"""All Prometheus metrics of the daemon, declared once, in a registry of their own.

Invariant: every label has a bounded set of values: states, classes, status codes, route templates, GPU indices;
never a key, a launch id or anything a client can invent; ``model`` is what launches serve. Gauges that describe the
present are set at scrape time by ``api/metrics_route.py``; counters and histograms are touched where things happen,
those of the data plane as plain ``tallies`` that only become metrics when somebody asks. Knows nothing of who touches
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from vllm_bootstrap.launches.types import EventView
from vllm_bootstrap.model_metrics import IdleFigures, IdleMetrics, ModelMetrics
from vllm_bootstrap.tallies import SHORT_S, BatchTally, ClassTally, Spread, Traffic

# They would be a second series for each counter, which nobody here reads.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no types for it

PREFIX = "vllm_bootstrap"
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
START_S = (5, 15, 30, 60, 120, 300, 600, 1200)


class Metrics:
    """One set of metrics. Tests and daemons each make their own; nothing is global. All methods are cheap but
    ``render``, which takes milliseconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._described: list[tuple[str, str, str, str]] = []
        ProcessCollector(namespace=PREFIX, registry=self.registry)
        self._declare_launches()
        self._declare_gpus()
        self._declare_control_plane()
        self._declare_data_plane()
        self._declare_batches()
        self._declare_models()

    def _declare_launches(self) -> None:
        self.launches = self.gauge("launches", "Active launches by state.", "state")
        self.launch_transitions = self.counter("launch_transitions", "Launches that entered a state.", "state")
        self.launch_failures = self.counter("launch_failures", "Attempts that failed, by failure class.", "failure")
        self.launch_restarts = self.counter("launch_restarts", "Attempts granted by a restart policy.")
        self.launch_start = self.histogram("launch_start_seconds", "From spawn to ready.", START_S)
        self.forced_stops = self.counter("forced_stops", "Process trees that needed SIGKILL to end.")
        self.shim_losses = self.counter("shim_losses", "Shims that died before their engine.")
        self.log_dropped = self.gauge(
            "engine_log_dropped_bytes", "Bytes of engine output that active launches' logs could not take."
        )

    def _declare_gpus(self) -> None:
        self.gpu_memory_used = self.gauge("gpu_memory_used_bytes", "Memory in use, by anybody.", "gpu")
        self.gpu_memory_total = self.gauge("gpu_memory_total_bytes", "Memory of the device.", "gpu")
        self.gpu_utilization = self.gauge("gpu_utilization_ratio", "Share of time the device was busy.", "gpu")
        self.gpu_state = self.gauge("gpu_state", "1 for the state a GPU is in, else 0.", "gpu", "state")

    def _declare_control_plane(self) -> None:
        self.build = self.gauge("build_info", "Always 1; the labels say what runs.", "version", "build_sha")
        self.http_requests = self.counter("http_requests", "Answers of the control plane.", "route", "method", "code")
        self.http_seconds = self.histogram(
            "http_request_seconds", "Time to the end of a control-plane answer, streams left out.", SHORT_S, "route"
        )
        self.key_file_broken = self.gauge(
            "key_file_broken", "1 while the key file cannot be read and older keys stay in force."
        )

    def _declare_data_plane(self) -> None:
        self.traffic = Traffic()
        self.data_plane_request = self.traffic.finished  # counts one finished request
        self.queue_depth = self.gauge("queue_depth", "Requests waiting for a slot.", "class")
        self.queue_oldest = self.gauge("queue_oldest_seconds", "How long the oldest waiting request waits.", "class")
        self.in_flight = self.gauge("in_flight_requests", "Requests an engine is working on.", "class")
        self.batch_allowance = self.gauge(
            "batch_allowance_sequences", "Sequences that batch may run at once now.", "model"
        )
        self.batch_running = self.gauge("batch_running_sequences", "Sequences that batch runs.", "model")
        self.realtime_reserve = self.gauge(
            "realtime_reserve_sequences", "Slots that batch never gets, kept for realtime.", "model"
        )
        self.registry.register(_TrafficMetrics(self.traffic, self._note))

    def _declare_batches(self) -> None:
        self.batch_lines = BatchTally()
        self.batches = self.gauge("batches", "Batches that have not ended, by state.", "state")
        self.batches_paused = self.gauge("batches_paused", "Batches that have not ended and are paused.")
        self.items_waiting = self.gauge("items_waiting", "Single items that have not ended.")
        self.registry.register(_BatchMetrics(self.batch_lines, self._note))

    def _declare_models(self) -> None:
        self.models = ModelMetrics(self)
        self.idle_time = IdleFigures()
        self.box_idle = self.gauge("box_idle_seconds", "How long the box has been idle now, 0 while it is not.")
        self.registry.register(IdleMetrics(PREFIX, self.idle_time, self._note))

    def _note(self, name: str, kind: str, labels: tuple[str, ...], help_text: str) -> None:
        shown = ", ".join(f"`{label}`" for label in labels)
        self._described.append((f"{PREFIX}_{name}", kind, shown, help_text))

    def counter(self, name: str, help_text: str, *labels: str) -> Counter:
        self._note(name + "_total", "counter", labels, help_text)
        return Counter(name, help_text, labels, namespace=PREFIX, registry=self.registry)

    def gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        self._note(name, "gauge", labels, help_text)
        return Gauge(name, help_text, labels, namespace=PREFIX, registry=self.registry)

    def histogram(self, name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        self._note(name, "histogram", labels, help_text)
        return Histogram(name, help_text, labels, namespace=PREFIX, registry=self.registry, buckets=buckets)

    def launch_event(self, event: EventView) -> None:
        """Count what one history row of a launch tells."""
        if event.event == "shim_lost":
            self.shim_losses.inc()
        if event.from_state == event.to_state:
            return
        self.launch_transitions.labels(event.to_state).inc()
        seconds = event.detail.get("seconds")
        if event.event == "became_ready" and isinstance(seconds, float):
            self.launch_start.observe(seconds)
        if event.event == "released":
            self._attempt_ended(event)

    def _attempt_ended(self, event: EventView) -> None:
        if event.detail.get("forced"):
            self.forced_stops.inc()
        if event.to_state == "bootstrapping":
            self.launch_restarts.inc()
        failure = event.detail.get("class")
        if isinstance(failure, str):
            self.launch_failures.labels(failure).inc()

    def render(self) -> bytes:
        """Everything in the Prometheus text format 0.0.4."""
        return generate_latest(self.registry)

    def describe(self) -> list[tuple[str, str, str, str]]:
        """Name, type, labels and meaning of each metric of ours, by name, for the docs."""
        return sorted(self._described)


class _TallyMetrics(Collector):
    """Tallies as metrics, made when they are asked for."""

    def __init__(self, note: Callable[[str, str, tuple[str, ...], str], None]) -> None:
        for family in self.describe():
            note(*self._words(family))

    @staticmethod
    def _words(family: Metric) -> tuple[str, str, tuple[str, ...], str]:
        name = family.name.removeprefix(f"{PREFIX}_") + ("_total" if family.type == "counter" else "")
        labels: tuple[str, ...] = getattr(family, "_labelnames", ())
        return name, family.type, labels, family.documentation

    def describe(self) -> Iterable[Metric]:
        return self.collect()


class _BatchMetrics(_TallyMetrics):
    def __init__(self, tally: BatchTally, note: Callable[[str, str, tuple[str, ...], str], None]) -> None:
        self._tally = tally
        super().__init__(note)

    def collect(self) -> Iterator[Metric]:
        tally = self._tally
        yield _counter(
            "batch_lines",
            "Lines of batches and single items that engines ended, by outcome. What expired or was cancelled is not "
            "counted.",
            ("outcome",),
            [("completed", tally.completed), ("failed", tally.failed)],
        )
        yield _counter("batch_retries", "Attempts at lines and items beyond the first.", (), [(tally.retries,)])
        yield _counter(
            "batch_isolated",
            "Lines and items given up because engines ended while they ran them alone.",
            (),
            [(tally.isolated,)],
        )


class _TrafficMetrics(_TallyMetrics):
    def __init__(self, traffic: Traffic, note: Callable[[str, str, tuple[str, ...], str], None]) -> None:
        self._traffic = traffic
        super().__init__(note)

    def collect(self) -> Iterator[Metric]:
        yield from self._counters()
        yield from self._histograms()

    def _counters(self) -> Iterator[Metric]:
        traffic = self._traffic
        yield _counter(
            "proxy_requests",
            "Data-plane requests by class and status (499: the client went away). Class none: needs no slot, or was "
            "turned away at the door.",
            ("class", "code"),
            ((name, str(status), count) for name, tally in traffic for status, count in tally.statuses.items()),
        )
        yield _counter(
            "admit",
            "What the scheduler decided: admitted, or the code of its refusal.",
            ("class", "outcome"),
            ((cls, outcome, count) for (cls, outcome), count in traffic.admissions.items()),
        )
        yield _counter(
            "taken_back",
            "Batch requests taken back from an engine before their first byte, to be sent again.",
            (),
            [(traffic.taken_back,)],
        )
        yield _counter(
            "promotions",
            "Batch requests let through before waiting realtime, to keep batch moving.",
            (),
            [(traffic.promotions,)],
        )
        yield _counter(
            "activity_dropped",
            "Finished requests that the history could not take.",
            (),
            [(traffic.history_dropped,)],
        )
        kinds = ("prompt", "completion")
        yield _counter(
            "tokens",
            "Tokens by what the engine says it read and made.",
            ("class", "model", "kind"),
            (
                (name, model, kind, count)
                for name, tally in traffic
                for model, counts in tally.tokens.items()
                for kind, count in zip(kinds, counts, strict=True)
            ),
        )

    def _histograms(self) -> Iterator[Metric]:
        yield self._spread("queue_wait_seconds", "Time requests waited for a slot.", lambda tally: tally.wait)
        yield self._spread(
            "proxy_first_byte_seconds",
            "From the grant of a slot to the first byte of the answer.",
            lambda tally: tally.first_byte,
        )
        yield self._spread(
            "ttft_seconds",
            "Time to first token: from a request's arrival, waiting included, to the first byte of a streamed answer.",
            lambda tally: tally.first_token,
        )
        yield self._spread(
            "inter_token_seconds",
            "Mean time between the tokens of a streamed answer, one value a request.",
            lambda tally: tally.token_gap,
        )

    def _spread(self, name: str, help_text: str, of: Callable[[ClassTally], Spread]) -> Metric:
        family = HistogramMetricFamily(f"{PREFIX}_{name}", help_text, labels=("class",))
        for cls, tally in self._traffic:
            if cls != "none":
                spread = of(tally)
                family.add_metric((cls,), spread.cumulated(), spread.total)
        return family


def _counter(name: str, help_text: str, labels: tuple[str, ...], rows: Iterable[tuple[str | int, ...]]) -> Metric:
    family = CounterMetricFamily(f"{PREFIX}_{name}", help_text, labels=labels)
    for *values, count in rows:
        family.add_metric([str(value) for value in values], float(count))
    return family
