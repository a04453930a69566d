"""One shim, asked over its control socket. asyncio.

Invariant: ``wait`` ends exactly once, with the shim's exit record or, when the shim was killed, with None; it ends only
when the shim's process is gone, or has written its record and hangs. A lost connection to a living shim is made again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_bootstrap.launches.control import ControlConnection, Message, StrangerAnswers, connect
from vllm_bootstrap.launches.exit_watch import ExitWatch
from vllm_bootstrap.launches.shim import procfs, protocol
from vllm_bootstrap.launches.types import ExitRecord, ProcessIdentity, ShimHandle, StartOrder

START_S = 30.0
LINGER_S = 2.0
# Another program that takes locks is done within milliseconds.
GATE_PAUSES_S = (0.01, 0.05, 0.2, 0.5, 1.0)
RECONNECT_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0)


class ShimLost(ConnectionError):
    """The shim is dead or does not answer: ``ProcessHost.kill_marked`` ends what is left of its engine."""


class ShimRefused(Exception):
    """The shim did not do it: mostly, did not start the engine. ``kind``: ``gpu_locked``, ``spawn_failed``,
    ``stopping``, ``bad_order``, ``already_started``, ``unknown_op``, ``busy``. The text is a sentence for people."""

    def __init__(self, reason: str, kind: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class MainExit:
    """How the engine's main process ended. Both None: the shim was killed, and the kernel killed the engine for it."""

    exit_code: int | None
    signal: int | None


@dataclass(frozen=True, slots=True)
class Hello:
    """What a shim answers to hello, as far as it matters here."""

    protocol: int
    launch_id: str
    attempt: int
    identity: ProcessIdentity
    phase: str
    engine: ProcessIdentity | None
    main: MainExit | None
    can_unlock: bool = False


class Shim:
    """``handle`` finds it again; ``engine`` is its engine's main process once started; ``main_exited`` is done as soon
    as that process is dead (never, when none was started). ``can_unlock``: it can give up its GPUs' lock files while
    its engine sleeps; one that an earlier release left cannot."""

    def __init__(
        self, handle: ShimHandle, connection: ControlConnection, watch: ExitWatch, hello: Hello, answer_s: float
    ) -> None:
        loop = asyncio.get_running_loop()
        self.handle, self.can_unlock = handle, hello.can_unlock
        self._answer_s = answer_s
        self.engine: ProcessIdentity | None = None
        self.main_exited: asyncio.Future[MainExit] = loop.create_future()
        self._ended: asyncio.Future[ExitRecord | None] = loop.create_future()
        self._record: ExitRecord | None = None
        self._announced = asyncio.Event()
        self._connection, self._watch = connection, watch
        self._disconnected = False
        self._connected = asyncio.Event()
        self._connected.set()
        self._take_in(hello)
        connection.listen(self._on_event)
        self._following = asyncio.create_task(self._follow())

    # -- what the daemon asks -----------------------------------------------------------------------------------

    async def go(self, order: StartOrder) -> ProcessIdentity:
        """Start the engine; once. Raises ``ShimRefused`` (nothing runs), ``ShimLost`` (unknown: kill what is left)."""
        message = {field.name: getattr(order, field.name) for field in dataclasses.fields(order)}
        message["env"] = dict(order.env)
        try:
            answer = await self._connection.request("go", timeout_s=START_S, order=message)
        except (ConnectionError, TimeoutError) as exc:
            record = await self._ending_within(LINGER_S)
            if record is not None and record.stop_requested:
                raise ShimRefused("a stop was asked for before the start", "stopping") from exc
            raise ShimLost(f"the shim of launch {self.handle.launch_id} was lost during the start") from exc
        if not answer["ok"]:
            raise ShimRefused(answer["reason"], answer["kind"])
        self.engine = ProcessIdentity(**answer["engine"])
        return self.engine

    async def stop(self, grace_s: float, force: bool = False) -> None:
        """Begin the death of the tree: SIGTERM to the main process, SIGKILL to all after ``grace_s``, or at once with
        ``force``. Returns when accepted; idempotent, also when all is over. Raises ``ShimLost``."""
        try:
            await (self._ask("force") if force else self._ask("stop", grace_s=grace_s))
        except ShimLost:
            if self._record is None:
                raise

    async def status(self) -> Message:
        """What the shim says about itself (see ``shim.protocol``). Raises ``ShimLost``."""
        return await self._ask("status")

    async def unlock_gpus(self) -> None:
        """Give up the GPUs' lock files: the engine sleeps. Idempotent. Raises ``ShimLost``, ``ShimRefused``."""
        _accepted(await self._ask("unlock"))

    async def lock_gpus(self) -> None:
        """Take them again. Idempotent. Raises ``ShimLost``, ``ShimRefused`` (``gpu_locked``)."""
        for pause in GATE_PAUSES_S:
            answer = await self._ask("lock")
            if answer["ok"] or answer["kind"] != "busy":
                break
            await asyncio.sleep(pause)
        _accepted(answer)

    async def wait(self) -> ExitRecord | None:
        """The exit record, once the tree is seen dead; None when the shim was killed instead."""
        return await asyncio.shield(self._ended)

    def close(self) -> None:
        """Disconnect without harming. Idempotent. ``wait`` and ``main_exited`` stay open for ever then."""
        self._disconnected = True
        self._following.cancel()
        self._connection.close()
        self._watch.close()

    # -- following it -------------------------------------------------------------------------------------------

    def _on_event(self, event: Message) -> None:
        """Take in what the shim announces. Unknown events are a later version's."""
        if event["event"] == "main_exited":
            self._main_ended(MainExit(event["exit_code"], event["signal"]))
        elif event["event"] == "ended":
            self._record = record_from(event["record"])
            self._announced.set()

    def _take_in(self, hello: Hello) -> None:
        self.engine = hello.engine
        if hello.main is not None:
            self._main_ended(hello.main)

    def _main_ended(self, how: MainExit) -> None:
        if not self.main_exited.done():
            self.main_exited.set_result(how)

    async def _follow(self) -> None:
        while not self._watch.gone.is_set() and not self._announced.is_set():
            await _first_of(self._watch.gone, self._announced, self._connection.closed)
            if self._connection.closed.is_set():
                self._connected.clear()
                await self._reconnect()
        # A shim that has written its record only has to exit; if a hung disk keeps it, that is not waited for.
        await _first_of(self._watch.gone, timeout_s=LINGER_S)
        self._conclude()

    async def _reconnect(self) -> None:
        for attempt in range(1_000_000):
            pause = RECONNECT_PAUSES_S[min(attempt, len(RECONNECT_PAUSES_S) - 1)]
            await _first_of(self._watch.gone, self._announced, timeout_s=pause)
            if self._watch.gone.is_set() or self._announced.is_set():
                return
            try:
                self._connection, hello = await _contact(self.handle, self._answer_s)
            except (OSError, TimeoutError):
                continue
            self._take_in(hello)
            self._connection.listen(self._on_event)
            self._connected.set()
            return

    def _conclude(self) -> None:
        handle = self.handle
        if self._record is None:
            self._record = exit_record_in(Path(handle.run_dir), handle.launch_id, handle.attempt)
        self._ended.set_result(self._record)
        if self.engine is not None:
            record = self._record
            self._main_ended(MainExit(record.exit_code, record.signal) if record else MainExit(None, None))
        self._connected.set()
        self._connection.close()
        self._watch.close()

    async def _ask(self, op: str, **fields: Any) -> Message:
        name = self.handle.launch_id
        try:
            async with asyncio.timeout(self._answer_s):
                while True:
                    await self._connected.wait()
                    if self._ended.done() or self._disconnected:
                        raise ShimLost(f"the shim of launch {name} has ended, or was let go of")
                    connection = self._connection
                    try:
                        return await connection.request(op, timeout_s=self._answer_s, **fields)
                    except ShimLost:
                        raise
                    except ConnectionError:
                        if connection is self._connection:
                            self._connected.clear()
        except TimeoutError:
            raise ShimLost(f"the shim of launch {name} does not answer") from None

    async def _ending_within(self, seconds: float) -> ExitRecord | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self.wait()
        return None


async def first_contact(
    sock: socket.socket, run_dir: Path, launch_id: str, attempt: int, pid: int, answer_s: float
) -> Shim:
    """The shim just spawned with ``sock`` as its inherited connection. Raises ``OSError``, ``TimeoutError``."""
    connection = await ControlConnection.over(sock)
    try:
        hello = await _hello(connection, START_S)
        if hello.identity.pid != pid:
            raise StrangerAnswers(f"process {hello.identity.pid} answers where shim {pid} should")
        handle = ShimHandle(launch_id, attempt, hello.identity, str(run_dir), hello.protocol)
        watch = ExitWatch(pid, hello.identity.start_ticks)
    except BaseException:
        connection.close()
        raise
    return Shim(handle, connection, watch, hello, answer_s)


async def adopt(handle: ShimHandle, answer_s: float) -> Shim | None:
    """See ``ProcessHost.adopt``."""
    identity = handle.identity
    if identity.boot_id != procfs.boot_id():
        return None
    loop = asyncio.get_running_loop()
    deadline = loop.time() + answer_s
    while (left := deadline - loop.time()) > 0 and procfs.is_alive(identity.pid, identity.start_ticks):
        try:
            connection, hello = await _contact(handle, left)
        except StrangerAnswers:
            return None
        except (OSError, TimeoutError):
            await asyncio.sleep(RECONNECT_PAUSES_S[0])
            continue
        if hello.phase == "waiting":
            connection.close()
            return None
        return Shim(handle, connection, ExitWatch(identity.pid, identity.start_ticks), hello, answer_s)
    return None


async def _contact(handle: ShimHandle, timeout_s: float) -> tuple[ControlConnection, Hello]:
    """A new connection to a shim and its answer to hello. Raises ``OSError``, ``TimeoutError``."""
    control_dir = Path(handle.run_dir) / protocol.CONTROL_DIR
    connection = await ControlConnection.over(connect(control_dir, pid=handle.identity.pid))
    try:
        hello = await _hello(connection, timeout_s)
        if (hello.launch_id, hello.attempt) != (handle.launch_id, handle.attempt):
            raise StrangerAnswers(f"the shim of launch {hello.launch_id} answers")
    except BaseException:
        connection.close()
        raise
    return connection, hello


async def _hello(connection: ControlConnection, timeout_s: float) -> Hello:
    answer = await connection.request("hello", timeout_s=timeout_s, protocol=protocol.PROTOCOL)
    try:
        main, engine = answer["main"], answer["engine"]
        hello = Hello(
            answer["protocol"],
            answer["launch_id"],
            answer["attempt"],
            ProcessIdentity(**answer["identity"]),
            answer["phase"],
            None if engine is None else ProcessIdentity(**engine),
            None if main is None else MainExit(main["exit_code"], main["signal"]),
            "locked" in answer,
        )
    except (KeyError, TypeError) as exc:
        raise StrangerAnswers(f"the answer to hello cannot be understood: {exc!r}") from None
    if hello.protocol not in protocol.SUPPORTED:
        raise StrangerAnswers(f"protocol {hello.protocol} is not supported")
    return hello


def _accepted(answer: Message) -> None:
    if not answer["ok"]:
        raise ShimRefused(answer["reason"], answer["kind"])


def exit_record_in(run_dir: Path, launch_id: str, attempt: int) -> ExitRecord | None:
    """The exit record of that attempt, None when there is none. Reads one small file."""
    found = protocol.read_json(str(run_dir / protocol.CONTROL_DIR / protocol.EXIT))
    if found is None or (found.get("launch_id"), found.get("attempt")) != (launch_id, attempt):
        return None
    return record_from(found)


def record_from(fields: Message) -> ExitRecord:
    """An exit record from its JSON form. Fields this version does not know are ignored."""
    known: dict[str, Any] = {field.name: fields.get(field.name) for field in dataclasses.fields(ExitRecord)}
    return ExitRecord(**known)


async def _first_of(*events: asyncio.Event, timeout_s: float | None = None) -> None:
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
