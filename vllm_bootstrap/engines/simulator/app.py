"""What all routes share: the options, the batch, the counters, and what was received. No sockets, no signals."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from vllm_bootstrap.engines.simulator.batching import Batching
from vllm_bootstrap.engines.simulator.blocks import Blocks
from vllm_bootstrap.engines.simulator.doze import Doze
from vllm_bootstrap.engines.simulator.http import Exchange
from vllm_bootstrap.engines.simulator.knobs import Options
from vllm_bootstrap.engines.simulator.metrics import Metrics
from vllm_bootstrap.engines.simulator.mockgpu import Memory
from vllm_bootstrap.engines.simulator.model import Model
from vllm_bootstrap.engines.simulator.sequence import Batch, Timer
from vllm_bootstrap.engines.simulator.stepcost import Profile
from vllm_bootstrap.engines.simulator.text import Vocabulary

RECORDED_REQUESTS = 200
RECORDED_BODY_BYTES = 64 * 1024
HANG = "hang"
CallLater = Callable[[float, Callable[[], None]], Timer]


class App:
    """State of a running simulator. ``on_answered`` is called after each answered inference request."""

    def __init__(
        self,
        options: Options,
        env: Mapping[str, str],
        *,
        clock: Callable[[], float],
        call_later: CallLater,
        memory: Memory | None = None,
    ) -> None:
        self.options = options
        self.names = list(options.names)
        self.started = int(time.time())
        self.context_length = options.context_length
        self.tasks = options.task_set
        self.may_load_adapters = env.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").lower() in ("1", "true")
        self.key = env.get("VLLM_API_KEY") or None
        self.metrics = Metrics()
        self.vocabulary = Vocabulary()
        self.call_later = call_later
        profile = options.load_profile()
        # Tokens in a block of the prefix cache, 0 for no such cache.
        self.prefix_block = profile.block_size if profile is not None and options.enable_prefix_caching else 0
        self.batch: Batch = self._at_fixed_rates(clock) if profile is None else self._continuous(profile, clock)
        self.received: deque[dict[str, Any]] = deque(maxlen=RECORDED_REQUESTS)
        self.doze = Doze(self, memory)
        self.draining = False
        self.accepted = 0
        self.answered = 0
        self.on_answered: Callable[[int], None] = lambda _: None
        self.on_poison: Callable[[], None] = lambda: None

    def _at_fixed_rates(self, clock: Callable[[], float]) -> Model:
        options = self.options
        return Model(
            slots=options.max_num_seqs,
            tokens_per_second=options.tokens_per_second,
            prefill_tokens_per_second=options.prefill_tokens_per_second,
            capacity_tokens=self.context_length * options.max_num_seqs,
            metrics=self.metrics,
            clock=clock,
            call_later=self.call_later,
        )

    def _continuous(self, profile: Profile, clock: Callable[[], float]) -> Batching:
        options = self.options
        return Batching(
            profile,
            slots=options.max_num_seqs,
            budget=options.max_num_batched_tokens or profile.max_num_batched_tokens,
            blocks=Blocks(
                options.num_gpu_blocks_override or profile.kv_blocks,
                profile.block_size,
                caching=options.enable_prefix_caching,
            ),
            metrics=self.metrics,
            clock=clock,
            call_later=self.call_later,
            cut=options.long_prefill_token_threshold,
            fcfs=options.scheduling_policy == "fcfs",
        )

    def accept(self, exchange: Exchange) -> None:
        """Count an inference request that goes to the batch."""
        self.accepted += 1
        if self.options.poison and self.options.poison.encode() in exchange.body:
            self.call_later(0, self.on_poison)
        if self.options.hang_after and self.accepted > self.options.hang_after:
            self.batch.freeze(HANG)

    def finished(self) -> None:
        self.answered += 1
        self.on_answered(self.answered)

    def request_id(self, exchange: Exchange, prefix: str) -> str:
        """The id of an answer: the caller's ``X-Request-Id`` with the API's prefix, as vLLM makes it."""
        given = exchange.header(b"x-request-id")
        return f"{prefix}{given.decode('latin-1') if given else uuid.uuid4().hex}"

    def record(self, exchange: Exchange) -> None:
        """Remember what arrived, exactly, when asked to."""
        if self.options.echo_headers and not exchange.path.startswith("/debug/"):
            self.received.append(
                {
                    "method": exchange.method,
                    "target": exchange.target.decode("latin-1"),
                    "http_version": exchange.version,
                    "headers": [[key.decode("latin-1"), value.decode("latin-1")] for key, value in exchange.headers],
                    "body_bytes": exchange.size,
                    "body_sha256": hashlib.sha256(exchange.body).hexdigest(),
                    "body": exchange.body[:RECORDED_BODY_BYTES].decode("latin-1"),
                }
            )

    def gauges(self) -> dict[str, float]:
        return {
            "num_requests_running": self.batch.running,
            "num_requests_waiting": self.batch.waiting,
            "kv_cache_usage_perc": self.batch.cache_usage,
        }
