"""What is done about an idle box: a command of the operator's is run, an address of the operator's is told.

Invariants: the command is run without a shell, in a session and with an environment of its own (an allow-list: neither
settings nor keys of the daemon are in it), for ``COMMAND_LIMIT_S`` at most; whatever ends the wait for it, its process
group is ended too. An action says how it went and raises nothing but cancellation. When and how often is not decided
here (``idle_alarm``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol, Self
from urllib.parse import urlsplit

from vllm_bootstrap.batches.posting import NotAllowed, NotReached
from vllm_bootstrap.batches.webhooks import Post, headers_of_event

log = logging.getLogger(__name__)

COMMAND_LIMIT_S = 300.0
GRACE_S = 3.0
LAST_WORDS_S = 0.5
SAID_BYTES = 2000
# What the tools of hosts that are rented by the hour need to know who they are.
CLOUD_PREFIXES = ("RUNPOD_", "VAST_", "CONTAINER_", "AWS_", "CLOUDSDK_", "GOOGLE_", "AZURE_", "LAMBDA_", "KUBERNETES_")


@dataclass(frozen=True, slots=True)
class IdleFacts:
    """What an action is told. ``since``: unix time when the box became idle, as far as that was seen. ``event_id``
    stays the same over all attempts of one spell of idleness."""

    event_id: str
    idle_s: float
    since: float
    after_s: float
    attempt: int
    node_id: str
    gpus: int


class Action(Protocol):
    name: str

    async def run(self, facts: IdleFacts) -> str | None:
        """Do it. Returns why it failed, None when it worked. Cancelled: what it began is ended first."""


def command_environment(inherited: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """What the command finds in its environment besides the facts: ``inherited`` (what engines may inherit, too), and
    what the tools of the host's landlord need."""
    return {**inherited, **{name: value for name, value in environ.items() if name.startswith(CLOUD_PREFIXES)}}


def facts_in_environment(facts: IdleFacts) -> dict[str, str]:
    since = datetime.fromtimestamp(facts.since, UTC)
    return {
        "VLLM_BOOTSTRAP_IDLE_S": str(int(facts.idle_s)),
        "VLLM_BOOTSTRAP_IDLE_SINCE": f"{since:%Y-%m-%dT%H:%M:%SZ}",
        "VLLM_BOOTSTRAP_IDLE_AFTER_S": f"{facts.after_s:g}",
        "VLLM_BOOTSTRAP_IDLE_ATTEMPT": str(facts.attempt),
        "VLLM_BOOTSTRAP_NODE_ID": facts.node_id,
        "VLLM_BOOTSTRAP_GPUS": str(facts.gpus),
    }


class Command:
    """``argv`` is run as it is. ``env``: see ``command_environment``."""

    name = "command"

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], *, limit_s: float = COMMAND_LIMIT_S) -> None:
        self._argv, self._env, self._limit_s = tuple(argv), dict(env), limit_s

    async def run(self, facts: IdleFacts) -> str | None:
        """Run it to its end."""
        async with _Tail() as said:
            return await self._run(facts, said)

    async def _run(self, facts: IdleFacts, said: _Tail) -> str | None:
        try:
            child = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=said.end,
                stderr=said.end,
                env={**self._env, **facts_in_environment(facts)},
                start_new_session=True,
            )
        except (OSError, ValueError) as exc:
            return f"{self._argv[0]} cannot be run: {getattr(exc, 'strerror', None) or exc}"
        try:
            async with asyncio.timeout(self._limit_s):
                status = await child.wait()
        except TimeoutError:
            return f"{self._argv[0]} did not end within {self._limit_s:g} s and was ended"
        finally:
            if child.returncode is None:
                await _end(child)
        if status == 0:
            return None
        await said.ended()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"{self._argv[0]} {how}" + (f": {said.last_line}" if said.last_line else "")


class _Tail(asyncio.Protocol):
    """The end of what a child says. A pipe of our own, because waiting for a child with a pipe of asyncio's is waiting
    for all that hold on to the pipe: also for what the child leaves running."""

    async def __aenter__(self) -> Self:
        """``end`` is where the child is to write."""
        self._tail, self._over = b"", asyncio.Event()
        ours, self.end = os.pipe()
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.connect_read_pipe(lambda: self, os.fdopen(ours, "rb", buffering=0))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._let_go()
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-SAID_BYTES:]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the interface's
        self._over.set()

    def _let_go(self) -> None:
        if self.end >= 0:
            os.close(self.end)
            self.end = -1

    async def ended(self) -> None:
        """Until nobody writes any more, or for a moment."""
        self._let_go()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._over.wait()

    @property
    def last_line(self) -> str:
        last = self._tail.decode(errors="replace").strip().rpartition("\n")[2]
        return "".join(char for char in last if char.isprintable())


async def _end(child: asyncio.subprocess.Process) -> None:
    """Its whole group: asked first, and killed when the child has gone, or does not go."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await child.wait()


class Webhook:
    """``secret`` empty: it goes unsigned. The address is the operator's own, so private ones are fine."""

    name = "webhook"

    def __init__(self, url: str, secret: str, post: Post, clock: Callable[[], float]) -> None:
        self._url, self._secret, self._post, self._clock = url, secret, post, clock

    async def run(self, facts: IdleFacts) -> str | None:
        """Post it once."""
        now = self._clock()
        data = {
            "node_id": facts.node_id, "idle_s": round(facts.idle_s, 3), "idle_since": int(facts.since),
            "idle_after_s": facts.after_s, "attempt": facts.attempt, "gpus": facts.gpus,
        }  # fmt: skip
        event = {"id": facts.event_id, "object": "event", "type": "box.idle", "created_at": int(now), "data": data}
        payload = json.dumps(event, separators=(",", ":"))
        try:
            headers = headers_of_event(facts.event_id, payload, self._secret, now)
            status = await self._post(self._url, payload.encode(), headers, allow_private=True)
        except (NotAllowed, NotReached, ValueError) as exc:
            return f"{urlsplit(self._url).hostname}: {exc}"
        return None if 200 <= status <= 299 else f"{urlsplit(self._url).hostname} answered {status}"
