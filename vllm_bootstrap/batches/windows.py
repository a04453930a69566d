"""How long a batch may take, as its maker writes it: ``24h``, ``90m``, ``7d``, ``30s``. PURE.

OpenAI takes ``24h`` alone. Here it is any whole number with one unit, up to ``MAX_WINDOW_S``.
"""

from __future__ import annotations

import re

from vllm_bootstrap.errors import BadRequest

MAX_WINDOW_S = 30 * 86400
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_FORM = re.compile(r"([1-9][0-9]{0,6})([smhd])")


def window_s(text: str) -> float:
    """The seconds that ``text`` stands for. Raises ``BadRequest`` where it is no such duration or too long."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise BadRequest(
            f"The completion_window {text!r} is no duration: write a whole number above 0 and one of the units s, m, "
            "h and d, as in '24h', '90m' or '7d'.",
            param="completion_window",
        )
    seconds = int(match[1]) * _UNITS_S[match[2]]
    if seconds > MAX_WINDOW_S:
        raise BadRequest(
            f"The completion_window {text!r} is longer than {MAX_WINDOW_S // 86400} days.", param="completion_window"
        )
    return float(seconds)
