"""Requests under way and finished, made up."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from vllm_bootstrap.activity import Activity, _store
from vllm_bootstrap.gateway.limits import RequestRecord
from vllm_bootstrap.scheduler.ports import BudgetReport

REPORT = BudgetReport(
    slots=32, reserve=4, allowance=12, batch_sequences=5, realtime_sequences=2, reason="Realtime is active.",
    ttft_baseline_s=0.03, ttft_recent_s=0.04, step_s=0.01, promotions=1,
)  # fmt: skip


def record(number: int = 1, **fields: Any) -> RequestRecord:
    """A streamed chat that went well."""
    base = RequestRecord(
        request_id=f"req_{number}", method="POST", path="/v1/chat/completions", status=200, code=None, owner="alice",
        model="model", launch_id="l1", cls="realtime", queue_ms=20, started_at=1000.0 + number, duration_s=1.25,
        first_byte_s=0.1, bytes_in=100, bytes_out=2000, prompt_tokens=7, completion_tokens=11, inter_token_s=0.01,
        stream=True,
    )  # fmt: skip
    return base._replace(**fields)


def history(folder: Path, records: Iterable[RequestRecord]) -> Activity:
    """A history that holds these, without an event loop."""
    made = Activity.open(folder / "activity.db", rows=1000)
    assert made._database is not None
    made._database._submit(partial(_store, list(records), "local", 1000)).result()
    return made


def close(made: Activity) -> None:
    """Close a history without an event loop."""
    assert made._database is not None
    made._database.close()
