"""A supervisor with everything real but the port: database files, shims, simulator engines, mock GPUs.

``World`` is one daemon's life; ``restart`` ends it as a crash would (nothing is told to stop) and begins the next on
the same folder. Used by tests that need to look inside; tests of promises to users talk to a daemon instead.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tests.support.aio import eventually
from vllm_bootstrap import instance
from vllm_bootstrap.db import Database
from vllm_bootstrap.engines import probe
from vllm_bootstrap.engines.environment import base_environment
from vllm_bootstrap.engines.simulator_engine import SimulatorEngine
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.gpus.mock import MockInventory
from vllm_bootstrap.launches.accepting import fits_always
from vllm_bootstrap.launches.attempt import AttemptDeps
from vllm_bootstrap.launches.config import SupervisorConfig
from vllm_bootstrap.launches.context import ContextMaker
from vllm_bootstrap.launches.gpu_release import GpuRelease
from vllm_bootstrap.launches.process import ProcessHost
from vllm_bootstrap.launches.reconcile import Reconciler
from vllm_bootstrap.launches.start_gate import StartGate
from vllm_bootstrap.launches.store import LaunchStore
from vllm_bootstrap.launches.supervisor import Supervisor
from vllm_bootstrap.launches.types import EventView, LaunchOrder, LaunchView
from vllm_bootstrap.serving import Advert


def config_for(state: instance.Instance, home: Path, **changes: Any) -> SupervisorConfig:
    plain = SupervisorConfig(
        node_id="local", state_id=state.state_id, boot_id=state.boot_id, instance_secret=state.secret,
        log_base=home / "logs", lock_dir=home / "locks", default_engine="simulator", port_range=(18100, 18110),
        base_env=base_environment(os.environ), hf_token="hf_secret_token_0123456789", hf_home=home / "hf",
        uid=None, gid=None, allow_dangerous_args=(), start_timeout_s=30, start_stall_timeout_s=30, stop_grace_s=3,
        probe_interval_s=0.1, probe_timeout_s=2, unresponsive_after_s=1.0, unhealthy_after_s=30,
        restart_max_attempts=3, restart_backoff_s=0.05, restart_backoff_max_s=0.2, restart_reset_s=600,
        ended_launches_kept=50, replicas_max=8,
        log_segment_bytes=1 << 20, log_max_bytes=1 << 22, ended_logs_max_bytes=1 << 24,
        gpu_busy_bytes=1 << 30, gpu_settle_timeout_s=1, gpu_settle_tolerance_bytes=1 << 20,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


class World:
    """``adverts``: the last one of each launch. ``fatal``: what would have ended the daemon. ``told``: the history rows
    that were announced, for metrics."""

    def __init__(self, home: Path | None = None, *, engines: dict[str, Any] | None = None, **changes: Any) -> None:
        self.home = home or Path(tempfile.mkdtemp(prefix="w"))
        self._changes, self._engines = changes, engines or {}
        self.adverts: dict[str, Advert] = {}
        self.fatal: list[BaseException] = []
        self.told: list[EventView] = []
        self.inventory = MockInventory(2)
        self.on_advert: Callable[[Advert], None] = lambda _advert: None
        self.on_forget: Callable[[str], None] = lambda _launch_id: None
        self.fit = fits_always

    async def __aenter__(self) -> Self:
        state = instance.open_instance(self.home / "state")
        self.config = config_for(state, self.home, **self._changes)
        self.db = Database.open(self.home / "state" / "state.db")
        self.store = LaunchStore(self.db)
        self.host = ProcessHost(instance.private_dir(self.home / "run"), state.state_id)
        self.ledger = Ledger()
        config = self.config
        self.gpus = GpuRelease(
            self.inventory, self.ledger, self.store,
            timeout_s=config.gpu_settle_timeout_s, tolerance_bytes=config.gpu_settle_tolerance_bytes,
        )  # fmt: skip
        contexts = ContextMaker(config)
        attempts = AttemptDeps(config, self.store, self.host, StartGate(), self.gpus, contexts)
        engines = {"simulator": SimulatorEngine(stop_grace_s=config.stop_grace_s), **self._engines}
        self.supervisor = Supervisor(
            config, self.store, engines, self.inventory, self.ledger, self.gpus, attempts,
            on_advert=self._advert,
            on_forget=self._forget,
            on_fatal=self.fatal.append,
            on_event=self.told.append,
            fit=self.fit,
        )  # fmt: skip
        reconciler = Reconciler(
            self.supervisor, self.store, self.host, self.ledger, self.gpus, self.inventory, contexts, attempts
        )
        await reconciler.run()
        return self

    def _advert(self, advert: Advert) -> None:
        self.adverts[advert.launch_id] = advert
        self.on_advert(advert)

    def _forget(self, launch_id: str) -> None:
        self.adverts.pop(launch_id, None)
        self.on_forget(launch_id)

    async def __aexit__(self, *_: object) -> None:
        await self.supervisor.stop_all(force=True)
        await self.abandon()

    async def abandon(self) -> None:
        """End this life without a word to anything that runs."""
        await self.supervisor.leave()
        self.db.close()

    async def restart(self, **changes: Any) -> World:
        """Crash. The next life on the same folder, not entered yet."""
        await self.abandon()
        following = World(self.home, engines=self._engines, **{**self._changes, **changes})
        following.inventory = self.inventory
        return following

    # -- short forms --------------------------------------------------------------------------------------------

    async def launch(self, **wish: Any) -> LaunchView:
        knobs = wish.pop("knobs", {})
        defaults: dict[str, Any] = {"model": "sim", "gpu_count": 1, "extra_args": knobs}
        return await self.supervisor.launch(LaunchOrder(**{**defaults, **wish}), "tester")

    async def until(self, launch_id: str, *states: str, timeout: float = 15) -> LaunchView:
        await eventually(lambda: self.supervisor.get(launch_id).state in states, timeout)
        return self.supervisor.get(launch_id)

    async def ready(self, **wish: Any) -> LaunchView:
        view = await self.launch(**wish)
        found = await self.until(view.launch_id, "ready", "failed")
        assert found.state == "ready", found.failure
        # Traffic goes to it before that is on disk; a crash in between finds it starting.
        await eventually(lambda: any(e.launch_id == view.launch_id and e.to_state == "ready" for e in self.told))
        return found

    async def chat(self, launch_id: str, *, max_tokens: int = 3, timeout_s: float = 5.0) -> int:
        """One request straight to the engine; its status."""
        found = self.adverts[launch_id].instance
        assert found is not None
        body = {"model": found.served_names[0], "prompt": "hello", "max_tokens": max_tokens}
        reply = await probe.EngineClient(found.endpoint).request(
            "POST", "/v1/completions", json.dumps(body).encode(), timeout_s=timeout_s
        )
        return int(reply.status)

    async def events(self, launch_id: str) -> list[str]:
        return [event.event for event in await self.supervisor.events(launch_id, 0, 1000)]


def background(coroutine: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(coroutine)
