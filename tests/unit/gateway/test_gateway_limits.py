from __future__ import annotations

from vllm_bootstrap.gateway.limits import GatewayLimits
from vllm_bootstrap.settings import Settings


def test_every_setting_of_the_data_plane_is_a_limit() -> None:
    ours = {
        name for name in Settings.model_fields if name.startswith(("upstream_", "max_body", "max_header", "max_up"))
    }
    assert ours <= set(GatewayLimits.__dataclass_fields__)


def test_deadlines_are_looked_at_often_enough() -> None:
    assert GatewayLimits().sweep_interval_s == 1.0
    assert GatewayLimits(header_timeout_s=0.4).sweep_interval_s == 0.1


def test_the_head_limits() -> None:
    head = GatewayLimits(max_header_bytes=1, max_header_count=2).head
    assert (head.max_bytes, head.max_count) == (1, 2)
