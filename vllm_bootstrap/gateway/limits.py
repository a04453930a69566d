"""Numbers the data plane keeps to, and the record it leaves of each request. PURE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vllm_bootstrap.gateway.head import HeadLimits
from vllm_bootstrap.serving import RequestClass

KIB, MIB, GIB = 1024, 1024**2, 1024**3

MIN_BODY_RATE = 16 * KIB
"""Bytes a second below which a body counts as stalled; each received byte buys time at this rate."""

FILE_FORM_BYTES = 1 * MIB
"""What a form with a file may take beside the file."""

LINGER_S = 2.0
"""How long to go on reading (and dropping) after an early refusal, so that the client can still read the answer."""


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """Sizes in bytes, times in seconds. ``max_control_body_bytes`` bounds bodies of the control plane,
    ``max_file_body_bytes`` and ``max_adapter_body_bytes`` those that bring a file or an adapter to it and are never
    held whole, ``body_budget_bytes`` all JSON bodies of the data plane held at once, ``spool_budget_bytes`` all its
    uploads. ``client_dead_after_s`` 0: never. ``revoked_keys_cut_streams``: what already runs ends too when its key is
    revoked or loses rights, not only what waits."""

    max_header_bytes: int = 64 * KIB
    max_header_count: int = 100
    header_timeout_s: float = 15
    body_timeout_s: float = 60
    keep_alive_s: float = 75
    max_connections: int = 10_000
    max_body_bytes: int = 64 * MIB
    max_control_body_bytes: int = 1 * MIB
    max_file_body_bytes: int = 2048 * MIB + FILE_FORM_BYTES
    max_adapter_body_bytes: int = 4096 * MIB + FILE_FORM_BYTES
    max_upload_bytes: int = 512 * MIB
    body_budget_bytes: int = 1024 * MIB
    spool_budget_bytes: int = 8 * GIB
    client_dead_after_s: float = 60
    write_stall_timeout_s: float = 300
    upstream_connect_timeout_s: float = 5
    upstream_first_byte_timeout_s: float = 1800
    upstream_idle_timeout_s: float = 600
    upstream_keep_alive_s: float = 4
    revoked_keys_cut_streams: bool = False

    def of_body(self, brought: Literal["file", "adapter"] | None) -> int:
        """How long a body of the control plane may be that brings this."""
        if brought is None:
            return self.max_control_body_bytes
        return self.max_file_body_bytes if brought == "file" else self.max_adapter_body_bytes

    @property
    def head(self) -> HeadLimits:
        return HeadLimits(self.max_header_bytes, self.max_header_count)

    @property
    def sweep_interval_s(self) -> float:
        """How often deadlines are looked at: often enough for the shortest of them."""
        shortest = min(
            self.header_timeout_s, self.body_timeout_s, self.keep_alive_s, self.write_stall_timeout_s,
            self.upstream_first_byte_timeout_s, self.upstream_idle_timeout_s, self.upstream_keep_alive_s,
            self.client_dead_after_s or math.inf,
        )  # fmt: skip
        return min(1.0, shortest / 4)


class RequestRecord(NamedTuple):
    """What is kept of a finished data-plane request. Never holds keys, queries or content.

    ``status`` is what the client saw (499: it went away first); ``code`` our error code when the answer or the end of
    the stream was ours. ``started_at`` unix seconds, durations in seconds; ``first_byte_s`` from the grant of a place
    to the first byte of the answer's body, None without one. Tokens are the engine's own count, None where it told
    none. ``inter_token_s`` is the mean time between a sequence's tokens in a stream. ``stream``: the answer came as
    events.
    """

    request_id: str
    method: str
    path: str
    status: int
    code: str | None
    owner: str | None
    model: str | None
    launch_id: str | None
    cls: RequestClass | None
    queue_ms: int
    started_at: float
    duration_s: float
    first_byte_s: float | None
    bytes_in: int
    bytes_out: int
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    inter_token_s: float | None = None
    stream: bool | None = None
