"""The composition root: settings in, a running daemon out. The only file that knows every concrete class.

Order of start: settings checked → state directory locked → database → what was running is found again → port opened →
announced. Order of stop: no new work → launches stopped or left, as set → connections closed → database closed. A
second SIGTERM or SIGINT cuts the grace short.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import uvicorn
import uvloop

from vllm_bootstrap import __version__, instance
from vllm_bootstrap.activity import Activity
from vllm_bootstrap.api.app import build_api
from vllm_bootstrap.api.services import Services
from vllm_bootstrap.auth.guard import Guard
from vllm_bootstrap.auth.keys import Key, KeyRing, shared_key
from vllm_bootstrap.auth.sessions import Sessions
from vllm_bootstrap.batches.desk import BatchDepartment
from vllm_bootstrap.batches.files import FileStore
from vllm_bootstrap.configure import StartError, batch_config, budget_policy, gateway_limits, supervisor_config
from vllm_bootstrap.db import Database
from vllm_bootstrap.engines import build_engines
from vllm_bootstrap.engines.base import Engine
from vllm_bootstrap.engines.metrics_text import Counters
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.gateway.limits import RequestRecord
from vllm_bootstrap.gateway.protocol import make_protocol
from vllm_bootstrap.gpus.inventory import Inventory, make_inventory
from vllm_bootstrap.gpus.ledger import Ledger
from vllm_bootstrap.launches.attempt import AttemptDeps
from vllm_bootstrap.launches.context import ContextMaker
from vllm_bootstrap.launches.gpu_release import GpuRelease
from vllm_bootstrap.launches.process import ProcessHost
from vllm_bootstrap.launches.reconcile import Reconciler
from vllm_bootstrap.launches.start_gate import StartGate
from vllm_bootstrap.launches.store import LaunchStore
from vllm_bootstrap.launches.supervisor import Supervisor
from vllm_bootstrap.logs_setup import set_up_logging
from vllm_bootstrap.metrics import Metrics
from vllm_bootstrap.scheduler.budget import Budget
from vllm_bootstrap.scheduler.gate import Gate
from vllm_bootstrap.scheduler.signals import signals_of
from vllm_bootstrap.server import Server, allow_many_files, forbid_core_dumps, rest_the_garbage_collector
from vllm_bootstrap.serving import Advert
from vllm_bootstrap.settings import Settings
from vllm_bootstrap.statedir import StateLock

log = logging.getLogger("vllm_bootstrap")

CONNECTIONS_CLOSE_S = 2
EXIT_FATAL = 70


def serve(settings: Settings) -> int:
    """Run the daemon until it is told to stop. Returns the exit code. Raises ``StartError``."""
    os.umask(0o077)
    forbid_core_dumps()
    allow_many_files(settings.max_connections)
    set_up_logging(settings.log_level, settings.log_format, settings.log_file)
    instance.private_dir(settings.state_dir)
    with (
        StateLock(settings.state_dir / instance.LOCK_FILE),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(Daemon(settings).run())


class Daemon:
    """Everything that runs, wired together. One use."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._started_at = time.time()
        self._fatal: BaseException | None = None
        self._stop = asyncio.Event()
        self._signals = 0
        self._forcing: asyncio.Task[object] | None = None
        self._instance = instance.open_instance(settings.state_dir)
        self._keys, open_access = self._make_keys()
        self._sessions = Sessions(self._keys, lifetime_s=settings.dashboard_session_s)
        self._guard = Guard(
            self._keys,
            self._sessions,
            open_access=open_access,
            allowed_hosts=settings.allowed_hosts,
            protect_all=settings.protect_all,
        )
        self._metrics = Metrics()
        self._inventory = self._make_inventory()
        self._build_core()
        self._build_server()

    # -- building -----------------------------------------------------------------------------------------------

    def _make_keys(self) -> tuple[KeyRing, bool]:
        settings = self._settings
        shared: list[Key] = []
        named = {"VLLM_ACCESS_KEY": settings.access_key, "ORCHESTRATOR_TOKEN": settings.orchestrator_token}
        for name, secret in named.items():
            if secret is not None:
                shared.append(shared_key(name, secret.get_secret_value()))
        configured = bool(shared) or settings.auth_keys_file is not None
        open_access = not configured and (settings.is_loopback or settings.insecure)
        if not configured and not open_access:
            key, made = instance.generated_key(settings.state_dir)
            shared.append(shared_key("generated", key))
            self._tell_key(key, made=made)
        if not settings.is_loopback:
            self._warn_about_public_bind(open_access=open_access)
        return KeyRing(shared, settings.auth_keys_file, allow_examples=settings.is_loopback), open_access

    def _tell_key(self, key: str, *, made: bool) -> None:
        path = self._settings.state_dir / instance.ACCESS_KEY_FILE
        if made and sys.stderr.isatty():
            print(f"\n  A key was made for this daemon (shown once): {key}\n", file=sys.stderr)  # noqa: T201
        log.warning("No key is configured: a generated one is in %s, 'vllm-bootstrap keys show' prints it.", path)

    def _warn_about_public_bind(self, *, open_access: bool) -> None:
        host = self._settings.host
        if open_access:
            log.warning("Anybody who can reach %s may use this daemon (--insecure).", host)
        if self._settings.ssl_certfile is None:
            log.warning("Listening on %s without TLS: keys travel in clear. See docs/operations.md.", host)

    def _make_inventory(self) -> Inventory:
        settings = self._settings
        return make_inventory(
            mock_devices=settings.mock_devices,
            devices=settings.devices,
            allowed=settings.gpus,
            cpu_slots=settings.cpu_slots,
            nvml_timeout_s=settings.nvml_timeout_s,
            mock_file=settings.mock_gpu_file,
        )

    def _make_engines(self, hf_home: Path) -> dict[str, Engine]:
        settings = self._settings
        try:
            return build_engines(
                engine_python=settings.engine_python,
                engine_command=settings.engine_command,
                engines_file=settings.engines_file,
                allowed_media_domains=settings.allowed_media_domains,
                stop_grace_s=settings.stop_grace_s,
                hf_home=hf_home,
                mock_gpu_file=settings.mock_gpu_file,
            )
        except ValueError as exc:
            raise StartError(str(exc)) from exc

    def _build_core(self) -> None:
        settings, state = self._settings, self._instance
        config = self._config = supervisor_config(settings, state)
        self._db = Database.open(settings.state_dir / "state.db")
        self._activity = Activity.open(
            settings.state_dir / "activity.db", rows=settings.activity_rows, node_id=state.node_id
        )
        self._files = FileStore(
            self._db,
            instance.private_dir(settings.state_dir / "files"),
            node_id=state.node_id,
            max_bytes=settings.file_max_bytes,
            expires_after_s=settings.file_expires_after_s,
            reserve_bytes=settings.disk_reserve_bytes,
        )
        store = LaunchStore(self._db)
        engines = self._make_engines(config.hf_home)
        runtime_dir = instance.private_dir(settings.runtime_dir)
        host = ProcessHost(runtime_dir, state.state_id)
        ledger = self._ledger = Ledger()
        self._gpus = GpuRelease(
            self._inventory,
            ledger,
            store,
            timeout_s=settings.gpu_settle_timeout_s,
            tolerance_bytes=settings.gpu_settle_tolerance_bytes,
        )
        contexts = ContextMaker(config)
        attempts = AttemptDeps(config, store, host, StartGate(), self._gpus, contexts, self._tell_signals)
        self._gate = Gate(
            max_queued=settings.max_in_flight_requests,
            max_queued_bytes=settings.max_queued_bytes,
            queue_timeout_s=settings.queue_timeout_s,
            budget=partial(Budget, budget_policy(settings)),
            ended=lambda launch_id: self.supervisor.has_ended(launch_id),  # noqa: PLW0108 - made below
            watcher=self._metrics.traffic,
        )
        self.supervisor = Supervisor(
            config,
            store,
            engines,
            self._inventory,
            ledger,
            self._gpus,
            attempts,
            on_advert=self._advert,
            on_forget=self._forget,
            on_fatal=self._die,
            on_event=self._metrics.launch_event,
        )
        self._reconciler = Reconciler(
            self.supervisor, store, host, ledger, self._gpus, self._inventory, contexts, attempts
        )

    def _advert(self, advert: Advert) -> None:
        self._gate.update(advert)
        self._batches.advert(advert)

    def _forget(self, launch_id: str) -> None:
        self._gate.forget(launch_id)
        self._batches.forget(launch_id)

    def _tell_signals(self, launch_id: str, counters: Counters) -> None:
        self._gate.signals(launch_id, signals_of(counters))

    def _build_server(self) -> None:
        settings = self._settings
        gateway = self._gateway = Gateway(
            self._guard,
            self._gate,
            gateway_limits(settings),
            spool_dir=instance.private_dir(settings.state_dir / "spool"),
            on_record=self._keep_record,
        )
        folder = instance.private_dir(settings.state_dir / "batches")
        self._batches = BatchDepartment(
            batch_config(settings, folder, self._instance.node_id),
            self._db,
            self._files,
            gateway,
            self._guard.named,
            tally=self._metrics.batch_lines,
        )
        self._guard.on_change(self._batches.dispatcher.keys_changed)
        self.services = Services(
            settings=settings,
            supervisor=self.supervisor,
            gate=self._gate,
            requests=gateway.inflight,
            activity=self._activity,
            files=self._files,
            batches=self._batches.batches,
            items=self._batches.items,
            inventory=self._inventory,
            gpus=self._gpus,
            ledger=self._ledger,
            guard=self._guard,
            keys=self._keys,
            sessions=self._sessions,
            metrics=self._metrics,
            version=__version__,
            started_at=self._started_at,
            clock=time.time,
        )
        config = uvicorn.Config(
            build_api(self.services),
            http=make_protocol(gateway),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(settings.forwarded_allow_ips),
            forwarded_allow_ips=list(settings.forwarded_allow_ips),
            timeout_keep_alive=int(settings.keep_alive_s),
            timeout_graceful_shutdown=CONNECTIONS_CLOSE_S,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
        self._server = Server(config)

    def _keep_record(self, record: RequestRecord) -> None:
        self._metrics.data_plane_request(record)
        self._activity.record(record)

    # -- running ------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Start, serve, stop. Returns the exit code."""
        self._watch_signals()
        listener = self._listen()
        await self._reconciler.run()
        await self._batches.start()
        self.services.phase = "ok"
        background = asyncio.create_task(self._gpus.recheck_forever(), name="recheck unsettled GPUs")
        serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="server")
        stopping = asyncio.create_task(self._stop.wait())
        try:
            up = asyncio.create_task(self._server.up.wait())
            await asyncio.wait({up, serving}, return_when=asyncio.FIRST_COMPLETED)
            self._announce(listener)
            rest_the_garbage_collector()
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._shut_down()
        finally:
            instance.withdraw(self._settings.state_dir)
            await self._batches.close()
            self._gateway.close()
            self._server.leave()
            await asyncio.gather(serving, return_exceptions=True)
            background.cancel()
            stopping.cancel()
            await self.supervisor.leave()
            await self._activity.close()
            self._inventory.close()
            self._files.close()
            self._db.close()
        return EXIT_FATAL if self._fatal is not None else 0

    def _listen(self) -> socket.socket:
        settings = self._settings
        try:
            family, kind, proto, _, address = socket.getaddrinfo(
                settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind, proto)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as exc:
            raise StartError(f"Cannot listen on {settings.host} port {settings.port}: {exc.strerror}") from exc
        return listener

    def _announce(self, listener: socket.socket) -> None:
        host, port = listener.getsockname()[:2]
        scheme = "https" if self._settings.ssl_certfile else "http"
        shown = f"[{host}]" if ":" in host else host
        reachable = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(shown, shown)  # noqa: S104 - compared, not bound
        try:
            instance.announce(self._settings.state_dir, f"{scheme}://{reachable}:{port}")
        except OSError as exc:  # a full disk must not keep what runs from being served
            log.warning("Commands must be told the address, it could not be written down: %s", exc)
        log.info("vllm-bootstrap %s listens on %s://%s:%d", __version__, scheme, shown, port)

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal)
        loop.add_signal_handler(signal.SIGHUP, self._keys.reload)

    def _on_stop_signal(self) -> None:
        self._signals += 1
        self._stop.set()
        if self._signals > 1 and not self._leaves:
            log.warning("Second signal: no more grace")
            self._forcing = asyncio.get_running_loop().create_task(self.supervisor.stop_all(force=True))

    @property
    def _leaves(self) -> bool:
        """Whether launches keep running when this process ends."""
        return self._fatal is not None or self._settings.on_shutdown == "leave"

    def _die(self, cause: BaseException) -> None:
        """A part of the daemon that must not fail has failed: leave everything running and be started anew."""
        if self._fatal is None:
            self._fatal = cause
            self._stop.set()

    async def _shut_down(self) -> None:
        self.services.phase = "draining"
        await self._batches.close()
        self._gateway.drain()
        if self._leaves:
            log.info("Leaving; launches keep running")
            return
        outcomes = await self.supervisor.stop_all(force=self._signals > 1)
        log.info("Stopped launches: %d", len(outcomes))
