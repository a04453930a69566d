"""An engine's counters as the batch budget wants them. PURE.

Invariant: what the engine does not say stays unknown.
"""

from __future__ import annotations

from vllm_bootstrap.engines.metrics_text import Counters
from vllm_bootstrap.scheduler.ports import EngineSignals


def signals_of(counters: Counters) -> EngineSignals:
    return EngineSignals(
        running=_whole(counters.running),
        waiting=_whole(counters.waiting),
        kv_usage=counters.kv_usage,
        preemptions=_whole(counters.preemptions),
        prompt_tokens=_whole(counters.prompt_tokens),
        generation_tokens=_whole(counters.generation_tokens),
        inter_token_seconds_sum=counters.inter_token_s,
        inter_token_count=_whole(counters.inter_tokens),
        prefill_seconds_sum=counters.prefill_s,
        prefill_count=_whole(counters.prefills),
    )


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)
