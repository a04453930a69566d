"""What all requests of the data plane share: guard, gate, pools of engine connections, limits, deadlines.

Invariant: every client connection (with its exchange) and every call is known here while it lives, so that deadlines
are kept without a timer for each, counts come back to zero, and closing leaves nothing behind. Must not know: how a
request is parsed, judged or relayed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import ssl
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from vllm_bootstrap.auth.guard import Guard
from vllm_bootstrap.gateway.access_log import AccessLog
from vllm_bootstrap.gateway.familiar import FamiliarHeads
from vllm_bootstrap.gateway.inflight import Inflight
from vllm_bootstrap.gateway.limits import GatewayLimits, RequestRecord
from vllm_bootstrap.gateway.outbox import Outbox
from vllm_bootstrap.gateway.pool import Pool
from vllm_bootstrap.gateway.revive import Reviver
from vllm_bootstrap.gateway.sticky import Responses
from vllm_bootstrap.gateway.uploads import Spool
from vllm_bootstrap.models.types import Rewrite
from vllm_bootstrap.scheduler.gate import Gate
from vllm_bootstrap.serving import Instance

_log = logging.getLogger(__name__)
_NOT_REWRITTEN: dict[str, Rewrite] = {}
_NOT_SHOWN: frozenset[str] = frozenset()


class Watched(Protocol):
    """What has deadlines, and must end when the daemon does."""

    def tick(self, now: float) -> None:
        """Look at deadlines. ``now`` is loop time."""

    def stop(self) -> None:
        """The daemon stops: end what is under way with an honest error, then close."""


class Connection(Watched, Protocol):
    """A client's connection, as the gateway sees it."""

    def close_idle(self) -> None:
        """Close, being idle."""


class Gateway:
    """Shared by all client connections of one server. Lives on one event loop.

    ``spool_dir``: where large uploads wait. ``on_record`` is called once for each finished data-plane request and must
    not block or raise. ``tls`` overrides how certificates of external engines are checked.

    What it asks about models, all of it cheap, without blocking or raising: ``default_model()`` is where requests by
    ``/v1`` go that name none (None: they are refused); ``rewrite_of(name)`` how JSON bodies are changed that name this
    one (asked for each request: a dict's ``get`` costs least); ``progress_of(name)`` how far its load is, in a line for
    humans, None where nothing is being loaded or something serves it already; ``wants_progress(name)`` whether clients
    are told so that have not asked for it.
    """

    def __init__(
        self,
        guard: Guard,
        gate: Gate,
        limits: GatewayLimits | None = None,
        *,
        spool_dir: Path | None = None,
        on_record: Callable[[RequestRecord], None] | None = None,
        tls: ssl.SSLContext | None = None,
        default_model: Callable[[], str | None] = lambda: None,
        rewrite_of: Callable[[str], Rewrite | None] = _NOT_REWRITTEN.get,
        progress_of: Callable[[str], str | None] = lambda _name: None,
        wants_progress: Callable[[str], bool] = _NOT_SHOWN.__contains__,
    ) -> None:
        self.default_model, self.rewrite_of = default_model, rewrite_of
        self.progress_of, self.wants_progress = progress_of, wants_progress
        self.guard = guard
        self.gate = gate
        self.limits = limits or GatewayLimits()
        self.head_limits = self.limits.head
        self.heads = FamiliarHeads(self.head_limits)
        self._access_log = AccessLog()
        self.spool = Spool(spool_dir or Path(tempfile.gettempdir()), self.limits.spool_budget_bytes)
        self.on_record = on_record
        self.draining = False
        self.inflight = Inflight()
        self.responses = Responses()
        self.reviver = Reviver(gate)
        self.outbox = Outbox()
        self.body_bytes = 0
        self.connections: dict[Connection, None] = {}
        self.idle: dict[Connection, None] = {}  # in the order in which they became idle
        self.calls: dict[Watched, None] = {}
        self._pools: dict[str, Pool] = {}
        self._tls = tls
        self._sweeper: asyncio.TimerHandle | None = None
        self._ids = itertools.count(1)
        self._id_prefix = f"req_{int(time.time()):x}{os.urandom(4).hex()}"
        gate.on_withdrawn(self._drop_pool)
        guard.on_change(self.inflight.rights_changed)

    # Client connections

    def join(self, connection: Connection) -> bool:
        """A client connected. False: there are too many, none of them idle."""
        if len(self.connections) >= self.limits.max_connections:
            oldest = next(iter(self.idle), None)
            if oldest is None:
                return False
            oldest.close_idle()
        self.connections[connection] = None
        if self._sweeper is None:
            self._schedule()
        return True

    def leave(self, connection: Connection) -> None:
        """It is gone. Idempotent."""
        self.connections.pop(connection, None)
        self.idle.pop(connection, None)

    # The daemon's own requests

    def enter(self, call: Watched) -> None:
        """A request of the daemon's own has begun."""
        self.calls[call] = None
        if self._sweeper is None:
            self._schedule()

    def exit(self, call: Watched) -> None:
        """It has ended. Idempotent."""
        self.calls.pop(call, None)

    # Engine connections

    def pool(self, instance: Instance) -> Pool:
        """The connections of one instance. A launch that came back elsewhere gets a new pool."""
        pool = self._pools.get(instance.launch_id)
        if pool is not None and (pool.endpoint is instance.endpoint or pool.endpoint == instance.endpoint):
            return pool
        if pool is not None:
            pool.close()
        limits = self.limits
        pool = self._pools[instance.launch_id] = Pool(
            instance.endpoint,
            connect_timeout_s=limits.upstream_connect_timeout_s,
            keep_alive_s=limits.upstream_keep_alive_s,
            tls=self._tls,
            outbox=self.outbox,
        )
        return pool

    def _drop_pool(self, launch_id: str) -> None:
        pool = self._pools.pop(launch_id, None)
        if pool is not None:
            pool.close()

    # Request ids

    def new_request_id(self) -> str:
        return f"{self._id_prefix}{next(self._ids):06x}"

    # Records

    def record(self, record: RequestRecord) -> None:
        """Leave a request's record: to the access log and to ``on_record``."""
        self._access_log.add(record)
        if self.on_record is not None:
            try:
                self.on_record(record)
            except Exception:  # noqa: BLE001 - a request must end even if nobody can count it
                _log.exception("the record of a request was not taken")

    # Deadlines

    def _schedule(self) -> None:
        self._sweeper = asyncio.get_running_loop().call_later(self.limits.sweep_interval_s, self._sweep)

    def _sweep(self) -> None:
        now = asyncio.get_running_loop().time()
        self.guard.look()
        for one in (*self.connections, *self.calls):
            try:
                one.tick(now)
            except Exception:  # noqa: BLE001 - one connection's trouble must not end everybody's deadlines
                _log.exception("looking at a connection's deadlines failed")
        for pool in self._pools.values():
            pool.sweep(now)
        if self.connections or self.calls or any(pool.idle for pool in self._pools.values()):
            self._schedule()
        else:
            self._sweeper = None

    # The end

    def drain(self) -> None:
        """Refuse new requests, close idle connections, let running requests finish. Idempotent."""
        self.draining = True
        self.gate.drain()
        for connection in list(self.idle):
            connection.close_idle()

    def close(self) -> None:
        """End everything that still runs: streams with an error event, other answers with a cut. Idempotent."""
        self.draining = True
        for one in (*self.connections, *self.calls):
            one.stop()
        self.reviver.close()
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        self.outbox.flush()
        self._access_log.flush()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
