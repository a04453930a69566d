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
from vllm_bootstrap.auth.sessions import Sessions
from vllm_bootstrap.batches.desk import BatchDepartment
from vllm_bootstrap.batches.files import FileStore
from vllm_bootstrap.configure import (
    StartError,
    batch_config,
    budget_policy,
    catalogue,
    gateway_limits,
    idle_actions,
    models_config,
    supervisor_config,
)
from vllm_bootstrap.db import Database
from vllm_bootstrap.doors import announce, listen, make_keys
from vllm_bootstrap.engines import build_engines
from vllm_bootstrap.engines.base import Engine
from vllm_bootstrap.engines.metrics_text import Counters
from vllm_bootstrap.gateway.gateway import Gateway
from vllm_bootstrap.gateway.limits import RequestRecord
from vllm_bootstrap.gateway.protocol import make_protocol
from vllm_bootstrap.gpus.cpu import CpuInventory
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
from vllm_bootstrap.models.department import ModelDepartment, Surroundings
from vllm_bootstrap.models.entries import EntryStore
from vllm_bootstrap.models.fitting import Fitter
from vllm_bootstrap.scheduler.budget import Budget
from vllm_bootstrap.scheduler.gate import Gate
from vllm_bootstrap.scheduler.signals import signals_of
from vllm_bootstrap.server import Server, prepare_process, rest_the_garbage_collector
from vllm_bootstrap.serving import Advert
from vllm_bootstrap.settings import Settings
from vllm_bootstrap.statedir import StateLock
from vllm_bootstrap.watching_idle import make_idle_box

log = logging.getLogger("vllm_bootstrap")

CONNECTIONS_CLOSE_S = 2
EXIT_FATAL = 70


def serve(settings: Settings) -> int:
    """Run the daemon until it is told to stop. Returns the exit code. Raises ``StartError``."""
    os.umask(0o077)
    prepare_process(settings.max_connections)
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
        self._keys, open_access = make_keys(settings)
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
        fitter = Fitter(self._inventory, hf_home=config.hf_home, hf_token=config.hf_token, refusing=settings.fit_check)
        self._models = self._make_models(engines, fitter)
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
            prospects=self._models.prospects,
            hold_s=settings.cold_start_hold_s,
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
            fit=fitter.refuse,
        )
        self._reconciler = Reconciler(
            self.supervisor, store, host, ledger, self._gpus, self._inventory, contexts, attempts
        )

    def _make_models(self, engines: dict[str, Engine], fitter: Fitter) -> ModelDepartment:
        settings, config = self._settings, self._config
        folder = instance.private_dir(settings.state_dir / "adapters")
        store, on_cpu = EntryStore(self._db, config.node_id), isinstance(self._inventory, CpuInventory)
        return ModelDepartment(
            models_config(settings, config, folder, engines),
            self._db,
            fitter,
            lambda adapters, weights: catalogue(
                settings, store, engines, on_cpu=on_cpu, adapters=adapters.entries_for, resolved=weights.resolved
            ),
            self._metrics.models,
            on_bytes=self._metrics.models.downloaded,
        )

    def _connect_models(self) -> None:
        models, batches = self._models, self._batches
        models.connect(
            Surroundings(
                launches=self.supervisor,
                queues=self._gate,
                devices=self._inventory,
                ledger=self._ledger,
                gpus=self._gpus,
                estimate=self.supervisor.estimate,
                batch_lines=batches.dispatcher.demand,
            )
        )
        batches.dispatcher.hope_for = models.absence
        models.book.on_change(lambda: self._metrics.models.catalogue(models.book.entries()))
        self._idle = make_idle_box(
            self._db, self._inventory, self._ledger, self.supervisor, self._gate, self._gateway, batches, self._files,
            models, self._metrics, idle_actions(self._settings, time.time),
            after_s=self._settings.idle_after_s, node_id=self._instance.node_id,
        )  # fmt: skip

    def _advert(self, advert: Advert) -> None:
        self._gate.update(advert)
        self._batches.advert(advert)
        self._models.advert(advert)

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
            default_model=self._models.default_model,
            rewrite_of=self._models.book.rewrite_of,
            progress_of=self._models.progress_of,
            wants_progress=self._models.wants_progress,
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
        self._connect_models()
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
            models=self._models.desk,
            idle=self._idle,
            not_ready=self._models.not_ready,
        )
        self._server = Server(self._uvicorn_config())

    def _uvicorn_config(self) -> uvicorn.Config:
        settings = self._settings
        return uvicorn.Config(
            build_api(self.services),
            http=make_protocol(self._gateway),
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

    def _keep_record(self, record: RequestRecord) -> None:
        self._metrics.data_plane_request(record)
        self._activity.record(record)

    # -- running ------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """Start, serve, stop. Returns the exit code."""
        self._watch_signals()
        listener = listen(self._settings)
        await self._reconciler.run()
        await self._batches.start()
        await self._models.start()
        self._metrics.models.catalogue(self._models.book.entries())
        await self._idle.start()
        self.services.phase = "ok"
        background = asyncio.create_task(self._gpus.recheck_forever(), name="recheck unsettled GPUs")
        serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="server")
        stopping = asyncio.create_task(self._stop.wait())
        try:
            up = asyncio.create_task(self._server.up.wait())
            await asyncio.wait({up, serving}, return_when=asyncio.FIRST_COMPLETED)
            announce(self._settings, listener)
            rest_the_garbage_collector()
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._shut_down()
        finally:
            instance.withdraw(self._settings.state_dir)
            await self._idle.close()
            await self._models.close()
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

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal)
        loop.add_signal_handler(signal.SIGHUP, self._reload)

    def _reload(self) -> None:
        self._keys.reload()
        self._models.book.reload_soon()

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
        await self._models.close()
        await self._batches.close()
        self._gateway.drain()
        if self._leaves:
            log.info("Leaving; launches keep running")
            return
        outcomes = await self.supervisor.stop_all(force=self._signals > 1)
        log.info("Stopped launches: %d", len(outcomes))
