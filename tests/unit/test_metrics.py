"""What the scheduler did, as a scrape shows it: each count under its own name."""

from __future__ import annotations

from vllm_bootstrap.errors import (
    ApiError,
    ConcurrencyLimit,
    Draining,
    ModelLoading,
    ModelNotFound,
    QueueFull,
    TooManyRequests,
    Unavailable,
)
from vllm_bootstrap.metrics import PREFIX, Metrics
from vllm_bootstrap.scheduler.tickets import Grant, Ticket
from vllm_bootstrap.serving import Endpoint, Instance, RequestClass

INSTANCE = Instance("a", "a", "raw", "base", ("m",), Endpoint(uds="/x"), 1, ())
# No two counts are alike, so that none can stand for another.
ADMITTED: dict[RequestClass, int] = {"realtime": 2, "batch": 3}
REFUSED: dict[tuple[RequestClass, type[ApiError]], int] = {
    ("realtime", QueueFull): 5, ("batch", QueueFull): 6, ("realtime", Unavailable): 7, ("batch", Draining): 8,
    ("realtime", ModelLoading): 9, ("realtime", ConcurrencyLimit): 10, ("batch", TooManyRequests): 11,
    ("batch", ModelNotFound): 12,
}  # fmt: skip
TAKEN_BACK, PROMOTED, DROPPED = 13, 14, 15


def shown(metrics: Metrics, *names: str) -> dict[str, float]:
    """The samples of these metrics in the rendered text."""
    lines = (line for line in metrics.render().decode().splitlines() if not line.startswith("#"))
    samples = (line.removeprefix(f"{PREFIX}_").rsplit(" ", 1) for line in lines)
    return {sample: float(value) for sample, value in samples if sample.partition("{")[0] in names}


def test_what_the_scheduler_decided_is_shown_with_each_count_in_its_place() -> None:
    metrics = Metrics()
    traffic = metrics.traffic
    for cls, count in ADMITTED.items():
        for _ in range(count):
            traffic.admitted(Ticket("me", cls), Grant(1, INSTANCE, 0.0, promoted=False, model="m"))
    for (cls, error), count in REFUSED.items():
        for _ in range(count):
            traffic.rejected(Ticket("me", cls), "m", error("No"))
    for _ in range(TAKEN_BACK):
        traffic.revoked(Ticket("me", "batch"), "m", "a")
    for _ in range(PROMOTED):
        traffic.promoted(Ticket("me", "batch"), Grant(1, INSTANCE, 0.0, promoted=True, model="m"))
    traffic.history_dropped = DROPPED
    assert shown(metrics, "admit_total", "taken_back_total", "promotions_total", "activity_dropped_total") == {
        'admit_total{class="realtime",outcome="admitted"}': 2,
        'admit_total{class="batch",outcome="admitted"}': 3,
        'admit_total{class="realtime",outcome="queue_full"}': 5,
        'admit_total{class="batch",outcome="queue_full"}': 6,
        'admit_total{class="realtime",outcome="overloaded"}': 7,
        'admit_total{class="batch",outcome="draining"}': 8,
        'admit_total{class="realtime",outcome="model_loading"}': 9,
        'admit_total{class="realtime",outcome="concurrency_limit"}': 10,
        'admit_total{class="batch",outcome="rate_limit_exceeded"}': 11,
        'admit_total{class="batch",outcome="model_not_found"}': 12,
        "taken_back_total": TAKEN_BACK,
        "promotions_total": PROMOTED,
        "activity_dropped_total": DROPPED,
    }


def test_what_never_happened_is_shown_as_nothing_and_no_refusal_is_made_up() -> None:
    shown_at_first = shown(Metrics(), "admit_total", "taken_back_total", "promotions_total", "activity_dropped_total")
    assert shown_at_first == {"taken_back_total": 0, "promotions_total": 0, "activity_dropped_total": 0}
