"""What the simulator counts, and its Prometheus text under vLLM's names. PURE.

Written by hand, not with a metrics library: start-up must stay far below half a second, and one plain integer is
cheaper to count in the token loop. It must not know how tokens are made.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
_LONG = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 960.0, 1920.0, 7680.0)
_COUNTS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0)


class Histogram:
    """Observations in buckets, as Prometheus counts them."""

    __slots__ = ("_bounds", "_counts", "count", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.count = 0
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self.count += times
        self.total += value * times

    def lines(self, name: str, labels: str) -> Iterator[str]:
        below = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            below += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {below}'
        yield f"{name}_count{{{labels}}} {self.count}"
        yield f"{name}_sum{{{labels}}} {self.total}"


class Metrics:
    """All counters. Times in seconds."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.websockets = 0
        self.finished = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self.histograms = {
            "time_to_first_token_seconds": Histogram(_SHORT),
            "inter_token_latency_seconds": Histogram(_SHORT),
            "request_time_per_output_token_seconds": Histogram(_SHORT),
            "e2e_request_latency_seconds": Histogram(_LONG),
            "request_queue_time_seconds": Histogram(_LONG),
            "request_inference_time_seconds": Histogram(_LONG),
            "request_prefill_time_seconds": Histogram(_LONG),
            "request_decode_time_seconds": Histogram(_LONG),
            "request_prompt_tokens": Histogram(_COUNTS),
            "request_generation_tokens": Histogram(_COUNTS),
            "iteration_tokens_total": Histogram(_COUNTS),
        }

    def observe(self, name: str, value: float, times: int = 1) -> None:
        self.histograms[name].observe(value, times)

    def render(self, model: str, gauges: Mapping[str, float]) -> bytes:
        """The Prometheus text. ``gauges`` are the values of this moment, by name without prefix."""
        quoted = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        labels = f'engine="0",model_name="{quoted}"'
        out: list[str] = []
        for name, value in {**gauges, "websocket_connections_active": self.websockets}.items():
            out += [f"# TYPE vllm:{name} gauge", f"vllm:{name}{{{labels}}} {float(value)}"]
        for name, count in self._counters().items():
            out += [f"# TYPE vllm:{name} counter", f"vllm:{name}_total{{{labels}}} {float(count)}"]
        out.append("# TYPE vllm:request_success counter")
        out += [
            f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {float(count)}'
            for reason, count in self.finished.items()
        ]
        for name, histogram in self.histograms.items():
            out.append(f"# TYPE vllm:{name} histogram")
            out += histogram.lines(f"vllm:{name}", labels)
        return ("\n".join(out) + "\n").encode()

    def _counters(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "num_preemptions": self.preemptions,
            "prefix_cache_queries": self.prefix_queries,
            "prefix_cache_hits": self.prefix_hits,
        }
