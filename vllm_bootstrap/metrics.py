"""All Prometheus metrics of the daemon, declared once, in a registry of their own.

Invariant: every label has a bounded set of values: states, classes, status codes, route templates, GPU indices;
never a key, a launch id or anything a client can invent. Gauges that describe the present are set at scrape time by
``api/metrics_route.py``; counters and histograms are touched where things happen. Knows nothing of who touches them.
"""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from vllm_bootstrap.gateway.limits import RequestRecord
from vllm_bootstrap.launches.types import EventView

# They would be a second series for each counter, which nobody here reads.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no types for it

PREFIX = "vllm_bootstrap"
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SHORT_S = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60)
WAIT_S = (0.001, 0.01, 0.1, 0.5, 1, 5, 15, 60, 300)
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

    def _declare_launches(self) -> None:
        self.launches = self._gauge("launches", "Active launches by state.", "state")
        self.launch_transitions = self._counter("launch_transitions", "Launches that entered a state.", "state")
        self.launch_failures = self._counter("launch_failures", "Attempts that failed, by failure class.", "failure")
        self.launch_restarts = self._counter("launch_restarts", "Attempts granted by a restart policy.")
        self.launch_start = self._histogram("launch_start_seconds", "From spawn to ready.", START_S)
        self.forced_stops = self._counter("forced_stops", "Process trees that needed SIGKILL to end.")
        self.shim_losses = self._counter("shim_losses", "Shims that died before their engine.")
        self.log_dropped = self._gauge(
            "engine_log_dropped_bytes", "Bytes of engine output that active launches' logs could not take."
        )

    def _declare_gpus(self) -> None:
        self.gpu_memory_used = self._gauge("gpu_memory_used_bytes", "Memory in use, by anybody.", "gpu")
        self.gpu_memory_total = self._gauge("gpu_memory_total_bytes", "Memory of the device.", "gpu")
        self.gpu_utilization = self._gauge("gpu_utilization_ratio", "Share of time the device was busy.", "gpu")
        self.gpu_state = self._gauge("gpu_state", "1 for the state a GPU is in, else 0.", "gpu", "state")

    def _declare_control_plane(self) -> None:
        self.build = self._gauge("build_info", "Always 1; the labels say what runs.", "version", "build_sha")
        self.http_requests = self._counter("http_requests", "Answers of the control plane.", "route", "method", "code")
        self.http_seconds = self._histogram(
            "http_request_seconds", "Time to the end of a control-plane answer, streams left out.", SHORT_S, "route"
        )
        self.key_file_broken = self._gauge(
            "key_file_broken", "1 while the key file cannot be read and older keys stay in force."
        )

    def _declare_data_plane(self) -> None:
        self.proxy_requests = self._counter(
            "proxy_requests", "Data-plane requests by class and status (499: the client went away).", "class", "code"
        )
        self.proxy_first_byte = self._histogram(
            "proxy_first_byte_seconds", "From the request to the first byte of the answer.", SHORT_S, "class"
        )
        self.queue_wait = self._histogram("queue_wait_seconds", "Time requests waited for a slot.", WAIT_S, "class")
        self.queue_depth = self._gauge("queue_depth", "Requests waiting for a slot.", "class")
        self.in_flight = self._gauge("in_flight_requests", "Requests an engine is working on.", "class")

    def _note(self, name: str, kind: str, labels: tuple[str, ...], help_text: str) -> None:
        shown = ", ".join(f"`{label}`" for label in labels)
        self._described.append((f"{PREFIX}_{name}", kind, shown, help_text))

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        self._note(name + "_total", "counter", labels, help_text)
        return Counter(name, help_text, labels, namespace=PREFIX, registry=self.registry)

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        self._note(name, "gauge", labels, help_text)
        return Gauge(name, help_text, labels, namespace=PREFIX, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        self._note(name, "histogram", labels, help_text)
        return Histogram(name, help_text, labels, namespace=PREFIX, registry=self.registry, buckets=buckets)

    def data_plane_request(self, record: RequestRecord) -> None:
        """Count one finished request of the data plane. Requests refused before they had a class are class ``none``."""
        name = record.cls or "none"
        self.proxy_requests.labels(name, str(record.status)).inc()
        if record.launch_id is not None:
            self.queue_wait.labels(name).observe(record.queue_ms / 1000)
        if record.first_byte_s is not None:
            self.proxy_first_byte.labels(name).observe(record.first_byte_s)

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
