"""A daemon with one launch, as users of the stock ``openai`` client meet it."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import openai

from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_for

MODEL = "stock"
CHAT: Any = [{"role": "user", "content": "one two three"}]
LONG: dict[str, Any] = {"max_tokens": 3000, "extra_body": {"ignore_eos": True}}
FREE_WITHIN_S = 1.0
KEYS = {"keys": [
    {"name": "root", "token": "k-admin", "scopes": ["admin", "monitor"]},
    {"name": "rt", "token": "k-realtime", "scopes": ["realtime"]},
    {"name": "bulk", "token": "k-batch", "scopes": ["batch"]},
    {"name": "one", "token": "k-one", "scopes": ["realtime"], "max_parallel": 1},
    {"name": "few", "token": "k-few", "scopes": ["realtime"], "requests_per_minute": 600},
    {"name": "eyes", "token": "k-eyes", "scopes": ["monitor"]},
]}  # fmt: skip


class Box:
    """``launch``: how the model is launched."""

    def __init__(self, daemon: DaemonProcess, **launch: Any) -> None:
        self.daemon = daemon
        self.launch_id = str(daemon.ready("org/stock", served_model_name=MODEL, **launch)["launch_id"])

    def base(self, way: str) -> str:
        return self.daemon.url + way.format(id=self.launch_id)

    def client(self, way: str = "/v1", key: str = "k-realtime", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base(way), api_key=key, **{"max_retries": 0, "timeout": 20, **options})

    @asynccontextmanager
    async def async_client(self, way: str = "/v1", key: str = "k-realtime") -> AsyncIterator[openai.AsyncOpenAI]:
        async with openai.AsyncOpenAI(base_url=self.base(way), api_key=key, max_retries=0, timeout=20) as client:
            yield client

    def running(self) -> float:
        """How many requests the engine itself says it works on."""
        text = self.daemon.request("GET", f"/proxy/{self.launch_id}/metrics").body.decode()
        (line,) = re.findall(r"(?m)^vllm:num_requests_running(?:\{.*\})? (\S+)$", text)
        return float(line)

    def load(self, part: str) -> dict[str, int]:
        """By class, what is ``in_flight`` or ``queued``."""
        found: dict[str, int] = self.daemon.status(self.launch_id)["load"][part]
        return found

    def assert_freed(self) -> None:
        wait_for(lambda: self.running() == 0, FREE_WITHIN_S, what="the engine to be free")
        wait_for(lambda: not any(self.load("in_flight").values()), FREE_WITHIN_S, what="its slots to be free")


@contextmanager
def boxed(launch: dict[str, Any] | None = None, **settings: Any) -> Iterator[Box]:
    """A running daemon with these keys and settings."""
    daemon = DaemonProcess(key="k-admin", **settings)
    (daemon.root / "keys.json").write_text(json.dumps(KEYS))
    daemon.configure(auth_keys_file=daemon.root / "keys.json")
    with daemon:
        yield Box(daemon, **launch or {})
