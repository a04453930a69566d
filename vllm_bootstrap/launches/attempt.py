"""One attempt of a launch, from waiting for its GPUs to the moment they are free again. All its IO lives here.

Invariant: ``run`` posts facts to the launch's owner and decides nothing about states; its last post is always
``released``, after the process tree was seen dead and the GPUs settled or were given up. It must not know the store
beyond its own attempt row, nor any other launch.

Order of birth: baseline stored → shim spawned → its identity stored → "go" → engine's identity stored. A crash of the
daemon between any two of them leaves something that the next start finds (see ``recovery``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from vllm_bootstrap.engines import probe
from vllm_bootstrap.engines.base import (
    Engine,
    EngineCommand,
    EngineContext,
    FailureClass,
    LaunchSpec,
    Placement,
    Traits,
)
from vllm_bootstrap.errors import StorageFailed
from vllm_bootstrap.launches import observing, watching
from vllm_bootstrap.launches.config import SupervisorConfig
from vllm_bootstrap.launches.context import ContextMaker
from vllm_bootstrap.launches.described import row_of
from vllm_bootstrap.launches.downloads import blobs_dir
from vllm_bootstrap.launches.durably import durably
from vllm_bootstrap.launches.ending import Outcome
from vllm_bootstrap.launches.gpu_release import GpuRelease
from vllm_bootstrap.launches.lifecycle import Event, State
from vllm_bootstrap.launches.logs import LogReader
from vllm_bootstrap.launches.posts import Post
from vllm_bootstrap.launches.process import ProcessHost, Shim, ShimLost, ShimRefused
from vllm_bootstrap.launches.progress import STARTING, WAITING_FOR_GPU, StartProgress
from vllm_bootstrap.launches.resting import SleepFacts
from vllm_bootstrap.launches.sleeping import INTERRUPTED, Bed, fall_asleep, stay_awake, wake
from vllm_bootstrap.launches.start_gate import StartGate, Ticket
from vllm_bootstrap.launches.store import LaunchStore
from vllm_bootstrap.launches.types import ExitRecord, StartOrder
from vllm_bootstrap.serving import Endpoint

log = logging.getLogger(__name__)

STOP_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class AttemptDeps:
    """What attempts share. ``on_counters``: what the engine of a ready launch counts, whenever it was asked."""

    config: SupervisorConfig
    store: LaunchStore
    host: ProcessHost
    gate: StartGate
    gpus: GpuRelease
    contexts: ContextMaker
    on_counters: Callable[[str, probe.Counters], None] = lambda _launch_id, _counters: None


class StoppedBeforeStart(Exception):
    """A stop was asked for before anything was spawned."""


class Attempt:
    """See the module. ``resumed`` continues an attempt that an earlier daemon began, with the shim it left
    (``adopted``); ``finished`` and ``lost`` only bury one."""

    def __init__(
        self,
        deps: AttemptDeps,
        launch_id: str,
        number: int,
        spec: LaunchSpec,
        placement: Placement,
        engine: Engine,
        post: Callable[[Post], None],
        *,
        estimate_s: float | None = None,
        adopted: Shim | None = None,
        adopted_endpoint: Endpoint | None = None,
        adopted_traits: Traits | None = None,
        adopted_ready: bool = False,
        finished: ExitRecord | None = None,
        lost: tuple[FailureClass, str] | None = None,
        baseline: dict[str, int] | None = None,
        resumed: bool = False,
        sleep: SleepFacts | None = None,
    ) -> None:
        self.launch_id, self.number = launch_id, number
        self.spec, self.placement, self.engine = spec, placement, engine
        self.endpoint = adopted_endpoint
        self.traits = adopted_traits or engine.traits(spec)
        self.progress = StartProgress(time.monotonic(), estimate_s)
        self.pid = adopted.engine.pid if adopted and adopted.engine else None
        self.shim_pid = adopted.handle.identity.pid if adopted else None
        self.ready_since: float | None = time.monotonic() if adopted_ready else None
        self.deps, self.post = deps, post
        self._shim, self._adopted = adopted, resumed
        self._finished, self._lost = finished, lost
        self._record = finished
        self.baseline = baseline or {}
        self.stopping = asyncio.Event()
        # Clear while it is being born: a daemon that left then would have to begin it anew.
        self.at_rest = asyncio.Event()
        self._force = False
        self._ticket: Ticket | None = None
        self._stopping: dict[str, asyncio.Task[None]] = {}
        self.awake = asyncio.Event()
        self.awake.set()
        self.sleep = sleep
        self._resting: asyncio.Task[None] | None = None
        self.trouble: tuple[FailureClass, str] | None = lost

    # -- the owner's side ---------------------------------------------------------------------------------------

    def request_stop(self, *, force: bool) -> None:
        """Begin the death of the tree, at once or as soon as there is something to kill. Idempotent; never blocks.
        A later call with ``force`` cuts the grace short."""
        self._force = self._force or force
        self.stopping.set()
        if self._shim is not None:
            self._send_stop(self._shim)

    @property
    def can_sleep(self) -> bool:
        """Whether the engine can, and its shim can give the GPUs' lock files up meanwhile."""
        return bool(self.traits.sleep_levels) and self._shim is not None and self._shim.can_unlock

    def rest(self, state: State, level: int = 0) -> None:
        """Begin what belongs to a state that was entered: fall asleep, sleep on, or wake. Never blocks; the owner gets
        a post when it is done. An attempt that only buries does nothing."""
        shim = self._shim
        if shim is None or self.endpoint is None or state not in {State.FALLING_ASLEEP, State.ASLEEP, State.WAKING}:
            return
        self.awake.clear()
        if state is State.ASLEEP:
            return
        bed = Bed(self, shim, self.endpoint, self.baseline)
        if state is State.WAKING:
            work = partial(wake, bed, self.sleep)
        elif level:
            work = partial(fall_asleep, bed, level)
        else:
            work = partial(stay_awake, bed, self.sleep, INTERRUPTED)
        self._resting = asyncio.create_task(self._rest(work), name=f"rest {self.launch_id}/{self.number}")

    async def _rest(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        # A start on the same GPU measures its memory meanwhile: nothing of ours may come or go there.
        ticket = self.deps.gate.enter(self.launch_id, [gpu.uuid for gpu in self.placement.gpus])
        try:
            await ticket.entered
            await work()
        except Exception as exc:
            log.exception("launch %s attempt %d: its sleep failed", self.launch_id, self.number)
            self._give_up(FailureClass.WAKE_FAILED, f"Nobody knows how it sleeps: {type(exc).__name__}: {exc}")
            self.request_stop(force=False)
        finally:
            self.deps.gate.leave(ticket)

    def log_reader(self) -> LogReader:
        return LogReader(self.deps.config.log_base / self.launch_id / str(self.number))

    async def dropped_log_bytes(self) -> int:
        """Bytes of output that the log could not take; 0 where no shim answers within a second."""
        with contextlib.suppress(ShimLost, TimeoutError):
            async with asyncio.timeout(1):
                log_facts = (await self._shim.status()).get("log") if self._shim is not None else None
                return int((log_facts or {}).get("dropped", 0))
        return 0

    def detach(self) -> None:
        """Let go without harming: the daemon leaves, the engine stays."""
        if self._shim is not None:
            self._shim.close()

    # -- the journey --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Live through the attempt. Never raises; cancelling it (daemon leaves) harms nothing."""
        record: ExitRecord | None = self._finished
        try:
            if self._lost is not None:
                self._give_up(*self._lost)
            elif self._finished is not None:
                self.post(Post(self.number, _how_it_ended(self._finished)))
            else:
                record = await self._live()
        except StoppedBeforeStart:
            pass
        except ShimRefused as exc:
            kind = FailureClass.GPU_LOCKED if exc.kind == "gpu_locked" else FailureClass.SPAWN_FAILED
            self._give_up(kind, str(exc))
        except StorageFailed:
            raise
        except Exception as exc:
            log.exception("launch %s attempt %d could not be started", self.launch_id, self.number)
            self._give_up(FailureClass.SPAWN_FAILED, f"{type(exc).__name__}: {exc}")
        finally:
            self.at_rest.set()
            self._leave_gate()
        await self._release(record)

    def _leave_gate(self) -> None:
        if self._ticket is not None:
            self.deps.gate.leave(self._ticket)

    async def _live(self) -> ExitRecord | None:
        if self.ready_since is None:
            self.progress.on_phase(WAITING_FOR_GPU, time.monotonic())
            self._ticket = self.deps.gate.enter(self.launch_id, [gpu.uuid for gpu in self.placement.gpus])
            # An adopted start is in the middle of it: it takes its place in line but cannot wait any more.
            if not self._adopted:
                if not self._ticket.entered.done():
                    self.at_rest.set()
                await self._unless_stopped(self._ticket.entered)
                self.at_rest.clear()
        self.progress.started_at = self.progress.moved_at = time.monotonic()
        if not self._adopted:
            await self._start()
        self.at_rest.set()
        watchers = [asyncio.create_task(self._watch_or_give_up()), asyncio.create_task(self._follow_start())]
        try:
            return await self._until_dead()
        finally:
            helpers = [*watchers, *self._stopping.values(), *([self._resting] if self._resting else [])]
            for task in helpers:
                task.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)

    async def _unless_stopped(self, waiting: asyncio.Future[None]) -> None:
        stop = asyncio.ensure_future(self.stopping.wait())
        either: set[asyncio.Future[Any]] = {waiting, stop}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
        if self.stopping.is_set():
            waiting.cancel()
            raise StoppedBeforeStart

    async def _start(self) -> None:
        deps, placement = self.deps, self.placement
        self.progress.on_phase(STARTING, time.monotonic())
        self.baseline = await deps.gpus.measure(self.launch_id, placement)
        await deps.store.save_attempt(
            self.launch_id, self.number, started_at=time.time(), baseline=self.baseline, placement=asdict(placement)
        )
        needs_port = self.engine.needs_port(self.spec)
        run_dir = deps.host.run_dir(self.launch_id, self.number)
        context = deps.contexts.make(self.launch_id, self.number, run_dir, needs_port=needs_port)
        command = self.engine.command(self.spec, placement, context)
        self.endpoint = command.endpoint
        self.traits = self.engine.traits(self.spec)
        described = row_of(command.endpoint, self.traits)
        await deps.store.save_attempt(self.launch_id, self.number, endpoint=described)
        if command.argv is None:
            return
        shim = await deps.host.spawn(self.launch_id, self.number)
        self.shim_pid = shim.handle.identity.pid
        await deps.store.save_attempt(self.launch_id, self.number, handle=asdict(shim.handle))
        if self.stopping.is_set():
            self._shim = shim
            self._send_stop(shim)
            return
        identity = await shim.go(self._order(command, context))
        self.pid, self._shim = identity.pid, shim
        await deps.store.save_attempt(self.launch_id, self.number, engine=asdict(identity))
        if self.stopping.is_set():
            self._send_stop(shim)

    def _order(self, command: EngineCommand, context: EngineContext) -> StartOrder:
        config, placement = self.deps.config, self.placement
        lockable = tuple(gpu.uuid for gpu in placement.gpus) if placement.kind == "cuda" else ()
        assert command.argv is not None  # noqa: S101 - callers have checked; narrows the type
        return StartOrder(
            argv=command.argv,
            env=command.env,
            cwd=command.cwd or context.run_dir,
            log_dir=str(config.log_base / self.launch_id / str(self.number)),
            log_segment_bytes=config.log_segment_bytes,
            log_max_bytes=config.log_max_bytes,
            tmp_dir=context.tmp_dir,
            secrets=command.secrets,
            lock_dir=str(config.lock_dir),
            gpu_locks=lockable,
            lock_owner=config.state_id,
            shared=placement.share_milli < 1000,
            uid=config.uid,
            gid=config.gid,
        )

    def _send_stop(self, shim: Shim) -> None:
        wish = "force" if self._force else "stop"
        if wish not in self._stopping:
            self._stopping[wish] = asyncio.create_task(self._stop_shim(shim, force=self._force))

    async def _stop_shim(self, shim: Shim, *, force: bool) -> None:
        """Ask until the shim has heard it. A shim that is gone is noticed by ``wait``; there is nobody left to ask."""
        while not shim.main_exited.done():
            try:
                await shim.stop(self.deps.config.stop_grace_s, force=force)
            except ShimLost:
                await asyncio.sleep(STOP_RETRY_S)
            else:
                return

    async def _until_dead(self) -> ExitRecord | None:
        shim = self._shim
        if shim is None:  # an external engine: no process of ours
            await self.stopping.wait()
            return ExitRecord(None, None, forced=False, stop_requested=True, ended_at=time.time())
        shim.main_exited.add_done_callback(lambda _: self.post(Post(self.number, Event.MAIN_EXITED)))
        record = await shim.wait()
        if record is None:
            self._give_up(FailureClass.SHIM_LOST, "The process that supervised the engine was killed.")
        return record

    def _give_up(self, kind: FailureClass, message: str) -> None:
        self.trouble = (kind, message)
        self.post(Post(self.number, Event.SHIM_LOST, detail={"class": kind.value, "message": message}))

    async def _release(self, record: ExitRecord | None) -> None:
        deps, self._record = self.deps, record
        forced = record.forced if record is not None else False
        rebooted = self._lost is not None and self._lost[0] is FailureClass.HOST_REBOOTED
        if not rebooted and self.placement.kind != "none":
            forced = await deps.host.kill_marked(self.launch_id, self.number) or forced
        if self._shim is not None:
            self._shim.close()
        unsettled = await deps.gpus.settle(self.launch_id, self.placement, self.baseline)
        ran_s = time.monotonic() - self.ready_since if self.ready_since is not None else 0.0
        was_ready, asleep = self.ready_since is not None, self.sleep is not None
        outcome = Outcome(record, forced, unsettled, self.trouble, was_ready, ran_s, asleep)
        self.post(Post(self.number, Event.RELEASED, outcome=outcome))

    async def bury(self) -> None:
        """Note the end in the attempt's own row and remove its folder. Called once the launch's new state is on disk:
        until then the exit record in that folder is what tells the next daemon."""
        deps, record = self.deps, self._record
        if record is not None:
            ended = {"ended_at": record.ended_at, "exit": asdict(record)}
            await durably(self.launch_id, lambda: deps.store.save_attempt(self.launch_id, self.number, **ended))
        await asyncio.to_thread(deps.host.cleanup, self.launch_id, self.number)

    # -- watching -----------------------------------------------------------------------------------------------

    async def _follow_start(self) -> None:
        blobs = blobs_dir(self.spec.model, self.deps.config.hf_home)
        reader, is_ready = self.log_reader(), lambda: self.ready_since is not None
        await observing.follow_start(reader, self.engine, self.progress, blobs, is_ready)

    async def _watch_or_give_up(self) -> None:
        try:
            await self._watch()
        except Exception as exc:
            log.exception("launch %s attempt %d cannot be watched", self.launch_id, self.number)
            self._give_up(FailureClass.SPAWN_FAILED, f"The engine could not be watched: {type(exc).__name__}: {exc}")
            self.request_stop(force=False)

    async def _watch(self) -> None:
        if self.ready_since is None and not await watching.until_ready(self):
            return
        self._leave_gate()
        while not self.stopping.is_set() and await watching.while_awake(self):
            await self.awake.wait()


def _how_it_ended(record: ExitRecord) -> Event:
    # A stop that was asked for but not yet written down when the daemon died is still the operator's wish.
    return Event.STOP_REQUESTED if record.stop_requested else Event.MAIN_EXITED
