"""What an engine is asked so that it sleeps and wakes: vLLM's development routes, over the daemon's own socket.

Invariant: an engine that woke at level 2 has loaded its weights again before it computes anything: without that it
answers, fast and healthy, with nonsense. Nothing here decides about states or knows GPUs.
"""

from __future__ import annotations

import json

from vllm_bootstrap.engines.client import EngineClient, ProbeError, Reply
from vllm_bootstrap.serving import Endpoint

__all__ = ["ProbeError", "fall_asleep", "first_token", "is_sleeping", "wake"]

# What it says next is the surest thing that a language model knows.
_PROMPT = "The capital of France is"


async def fall_asleep(endpoint: Endpoint, level: int, timeout_s: float) -> None:
    """Returns when the engine says that it sleeps. Requests that run are aborted: let them end before. Raises
    ``ProbeError``, also when it says no."""
    await _ask(endpoint, "POST", f"/sleep?level={level}", None, timeout_s)
    if not await is_sleeping(endpoint, timeout_s):
        raise ProbeError("the engine was told to sleep and says that it does not")


async def wake(endpoint: Endpoint, level: int, timeout_s: float) -> None:
    """Returns when the engine says that it is awake. Idempotent. Raises ``ProbeError``."""
    if level == 2:  # in two parts, so that weights and cache are not both allocated before the weights are loaded
        await _ask(endpoint, "POST", "/wake_up?tags=weights", None, timeout_s)
        body = json.dumps({"method": "reload_weights"}).encode()
        await _ask(endpoint, "POST", "/collective_rpc", body, timeout_s)
        await _ask(endpoint, "POST", "/wake_up?tags=kv_cache", None, timeout_s)
    else:
        await _ask(endpoint, "POST", "/wake_up", None, timeout_s)
    if await is_sleeping(endpoint, timeout_s):
        raise ProbeError("the engine was told to wake and says that it still sleeps")


async def is_sleeping(endpoint: Endpoint, timeout_s: float) -> bool:
    """What the engine says. Raises ``ProbeError``."""
    said = (await _ask(endpoint, "GET", "/is_sleeping", None, timeout_s)).json()
    if not isinstance(said, dict) or not isinstance(said.get("is_sleeping"), bool):
        raise ProbeError("/is_sleeping does not say whether it sleeps")
    return bool(said["is_sleeping"])


async def first_token(endpoint: Endpoint, name: str, timeout_s: float) -> str | None:
    """What the model says first to a fixed prompt, at temperature 0; None when it does not continue texts. Raises
    ``ProbeError``."""
    wish = {"model": name, "prompt": _PROMPT, "max_tokens": 1, "temperature": 0}
    client = EngineClient(endpoint)
    reply = await client.request("POST", "/v1/completions", json.dumps(wish).encode(), timeout_s=timeout_s)
    body = reply.json()
    choices = body.get("choices") if reply.status == 200 and isinstance(body, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    text = first.get("text") if isinstance(first, dict) else None
    return text if isinstance(text, str) else None


async def _ask(endpoint: Endpoint, method: str, path: str, body: bytes | None, timeout_s: float) -> Reply:
    reply = await EngineClient(endpoint).request(method, path, body, timeout_s=timeout_s)
    if reply.status != 200:
        said = reply.body[:200].decode("utf-8", "replace")
        raise ProbeError(f"{method} {path} answered {reply.status}: {said}")
    return reply
