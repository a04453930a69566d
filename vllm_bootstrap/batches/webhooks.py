"""Tells others of the ends of batches: signed, tried again, and remembered until that has worked or was given up.

Invariant: what is to be told is a row that was stored with the end of the batch itself, and goes only when it was taken
(a status of 200 to 299) or given up. So an end is told at least once; the id stays the same over all attempts, and with
it a receiver knows what it has seen before. One task (``run``) owns the rows.

It decides nothing about batches. Secrets and addresses are never logged: only the address's host is.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import logging
import random
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from typing import Protocol
from urllib.parse import urlsplit

from vllm_bootstrap import __version__
from vllm_bootstrap.batches import posting
from vllm_bootstrap.batches.posting import NotAllowed, NotReached
from vllm_bootstrap.batches.types import Webhook
from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import StorageFailed, StorageFull, Unavailable
from vllm_bootstrap.ids import new_id

log = logging.getLogger(__name__)

CONCURRENT = 8
FIRST_DELAY_S, GROWTH, LONGEST_DELAY_S = 10.0, 3.0, 3600.0
LOOK_AGAIN_S = 60.0  # the wall clock may jump: no wait is longer
GONE = 410
BASE64_SECRET = "whsec_"  # noqa: S105  (how a secret begins that is written in base 64)


@dataclass(frozen=True, slots=True)
class WebhookRow:
    """An end to be told. ``payload`` is the exact body; ``secret`` empty: it goes unsigned."""

    id: str
    batch_id: str
    owner_id: str
    url: str
    secret: str
    payload: str
    next_at: float
    created_at: float
    attempts: int = 0
    last_error: str | None = None


_COLUMNS = ", ".join(field.name for field in fields(WebhookRow))
_INSERT = f"INSERT INTO webhooks ({_COLUMNS}) VALUES ({', '.join('?' * len(fields(WebhookRow)))})"  # noqa: S608
# A row that is due in longer than any delay was written by a clock that has been set back since.
_DUE = f"SELECT {_COLUMNS} FROM webhooks WHERE next_at <= ? OR next_at > ? ORDER BY next_at LIMIT ?"  # noqa: S608
_NEXT = "SELECT min(next_at) FROM webhooks WHERE next_at > ? AND next_at <= ?"


class Post(Protocol):
    """``posting.post``, with whatever its last arguments are to be."""

    async def __call__(self, url: str, body: bytes, headers: dict[str, str], *, allow_private: bool) -> int: ...


def announcement(batch_id: str, owner: str, wish: Webhook, state: str, at: float, entropy: bytes) -> WebhookRow:
    """What is to be told of a batch that has ended in ``state``. ``entropy``: as for ``ids.new_id``."""
    event_id = new_id("evt_", int(at * 1000), entropy)
    event = {
        "id": event_id,
        "object": "event",
        "type": f"batch.{state}",
        "created_at": int(at),
        "data": {"id": batch_id},
    }
    payload = json.dumps(event, separators=(",", ":"))
    return WebhookRow(event_id, batch_id, owner, wish.url, wish.secret, payload, next_at=at, created_at=at)


def insert(conn: sqlite3.Connection, row: WebhookRow) -> None:
    """Remember to tell; for the transaction that ends the batch. ``Webhooks.kick`` afterwards."""
    conn.execute(_INSERT, astuple(row))


def signing_key(secret: str) -> bytes:
    """The bytes that sign: what stands in base 64 behind ``whsec_``, else the secret itself. Raises ``ValueError``."""
    if not secret.startswith(BASE64_SECRET):
        return secret.encode()
    try:
        # Strictly: what a lenient decoder passes over would leave a key that is weaker than it looks, or empty.
        return base64.b64decode(secret.removeprefix(BASE64_SECRET), validate=True)
    except binascii.Error:
        raise ValueError(f"what follows {BASE64_SECRET} in a webhook's secret is not base 64") from None


def signed_headers(row: WebhookRow, at: float) -> dict[str, str]:
    """Headers as the Standard Webhooks specification has them. Raises ``ValueError`` for a secret that is none."""
    return headers_of_event(row.id, row.payload, row.secret, at)


def headers_of_event(event_id: str, payload: str, secret: str, at: float) -> dict[str, str]:
    """The same for an event of any kind. ``payload`` is the exact body, ``secret`` empty: unsigned."""
    stamp = str(int(at))
    headers = {
        "content-type": "application/json",
        "user-agent": f"vllm-bootstrap/{__version__}",
        "webhook-id": event_id,
        "webhook-timestamp": stamp,
    }
    if not secret:
        return headers
    signed = f"{event_id}.{stamp}.{payload}".encode()
    digest = hmac.new(signing_key(secret), signed, hashlib.sha256).digest()
    return {**headers, "webhook-signature": f"v1,{base64.b64encode(digest).decode()}"}


def delay_after(attempts: int, chance: float) -> float:
    """Seconds to wait after so many attempts. ``chance``, from 0 to 1, spreads those that failed together."""
    longest = min(LONGEST_DELAY_S, FIRST_DELAY_S * GROWTH ** min(attempts - 1, 20))
    return longest * (0.5 + chance / 2)


class Webhooks:
    """``run`` until ``close``. ``attempts``: after how many it gives up. ``clock`` gives unix seconds."""

    def __init__(
        self,
        db: Database,
        *,
        allow_private: bool,
        attempts: int,
        clock: Callable[[], float],
        post: Post = posting.post,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._db, self._allow_private, self._attempts = db, allow_private, attempts
        self._clock, self._post, self._chance = clock, post, chance
        self._news = asyncio.Event()
        self._closing = False
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._held: dict[str, float] = {}  # told or tried, but the database would not take it: not before then

    def kick(self) -> None:
        """There may be something new to tell."""
        self._news.set()

    async def run(self) -> None:
        """Deliver what is due, until ``close``."""
        try:
            while not self._closing:
                self._news.clear()
                pause = await self._begin_due()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), pause)
        except StorageFailed:
            log.error("webhooks: none is delivered any more, because the state database has failed")
        finally:
            await self._drop()

    async def close(self) -> None:
        """Break off what is being delivered (it stays to be told) and let ``run`` end. Idempotent."""
        self._closing = True
        self._news.set()
        await self._drop()

    async def _drop(self) -> None:
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _begin_due(self) -> float:
        """Begin as many deliveries as there is room for. Returns seconds until the next look."""
        if self._db.failed is not None:
            raise StorageFailed(str(self._db.failed))
        now = self._clock()
        self._held = {name: until for name, until in self._held.items() if until > now}
        # As it is before reading: what ends meanwhile may still be seen as it was.
        busy = self._under_way.keys() | self._held.keys()
        try:
            due = await self._db.read(lambda conn: _due(conn, now, CONCURRENT + len(busy)))
            following = await self._db.read(lambda conn: _next_after(conn, now))
        except (StorageFull, Unavailable) as exc:
            log.warning("webhooks: cannot look for what is due: %s", exc)
            return LOOK_AGAIN_S
        fresh = [row for row in due if row.id not in busy]
        for row in fresh[: CONCURRENT - len(self._under_way)]:
            task = asyncio.create_task(self._deliver(row), name=f"webhook {row.id}")
            self._under_way[row.id] = task
            task.add_done_callback(partial(self._ended, row.id))
        until = min(LOOK_AGAIN_S, following - now if following is not None else LOOK_AGAIN_S)
        return max(0.0, until)

    def _ended(self, row_id: str, _task: asyncio.Task[None]) -> None:
        self._under_way.pop(row_id, None)
        self._news.set()

    async def _deliver(self, row: WebhookRow) -> None:
        reason, final = await self._try(row)
        attempts = row.attempts + 1
        try:
            if reason is None:
                log.info("webhook %s of batch %s was delivered", row.id, row.batch_id)
                await self._db.write(lambda conn: _forget(conn, row.id))
            elif final or attempts >= self._attempts:
                log.warning(
                    "webhook %s of batch %s to %s is given up after %d attempts: %s",
                    row.id, row.batch_id, _host(row.url), attempts, reason,
                )  # fmt: skip
                await self._db.write(lambda conn: _forget(conn, row.id))
            else:
                again_at = self._clock() + delay_after(attempts, self._chance())
                log.info("webhook %s of batch %s: %s", row.id, row.batch_id, reason)
                await self._db.write(lambda conn: _put_off(conn, row.id, attempts, again_at, reason))
        except (StorageFull, StorageFailed, Unavailable) as exc:
            self._held[row.id] = self._clock() + LOOK_AGAIN_S
            log.warning("webhook %s: what became of it cannot be stored: %s", row.id, exc)

    async def _try(self, row: WebhookRow) -> tuple[str | None, bool]:
        """Why it did not work (None: it did), and whether it never will."""
        try:
            headers = signed_headers(row, self._clock())
            status = await self._post(row.url, row.payload.encode(), headers, allow_private=self._allow_private)
        except (NotAllowed, ValueError) as exc:
            return str(exc), True
        except NotReached as exc:
            return str(exc), False
        if 200 <= status <= 299:
            return None, True
        return f"it answered {status}", status == GONE


def _due(conn: sqlite3.Connection, now: float, most: int) -> Sequence[WebhookRow]:
    rows = conn.execute(_DUE, (now, now + 2 * LONGEST_DELAY_S, most)).fetchall()
    return [WebhookRow(**dict(row)) for row in rows]


def _next_after(conn: sqlite3.Connection, now: float) -> float | None:
    found = conn.execute(_NEXT, (now, now + 2 * LONGEST_DELAY_S)).fetchone()[0]
    return None if found is None else float(found)


def _forget(conn: sqlite3.Connection, row_id: str) -> None:
    conn.execute("DELETE FROM webhooks WHERE id = ?", (row_id,))


def _put_off(conn: sqlite3.Connection, row_id: str, attempts: int, until: float, reason: str) -> None:
    change = "UPDATE webhooks SET attempts = ?, next_at = ?, last_error = ? WHERE id = ?"
    conn.execute(change, (attempts, until, reason, row_id))


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or "?"
    except ValueError:
        return "?"
