"""The clients of the soak: a thread with an event loop in which actors talk to the daemon, politely and otherwise.

Invariant: every request they begin they end in the book, with what the client saw; none waits longer than PATIENCE_S.
``pause`` returns once all have ended and every connection is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from bench.soak.verdicts import Book

PATIENCE_S = 60.0
STEADY, SHAKY = "steady", "sim"
LOST = (httpx.TransportError, OSError)

Actor = Callable[["Client"], Awaitable[None]]


class Client:
    """One actor's connections, keys and luck."""

    def __init__(self, url: str, keys: dict[str, str], steady_id: str, book: Book, seed: int) -> None:
        self.url, self.keys, self.steady_id, self.book, self.luck = url, keys, steady_id, book, random.Random(seed)
        self.http = httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False)

    def headers(self, key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[key]}"}

    def body(self, model: str, tokens: int, **fields: Any) -> dict[str, Any]:
        words = "word " * self.luck.choice([1, 10, 200])
        return {"model": model, "prompt": words, "max_tokens": tokens, "ignore_eos": True, **fields}

    async def whole(self, kind: str, path: str, body: Any, key: str, *, steady: bool, **headers: str) -> None:
        """One request whose answer comes in one piece."""
        began = self.book.begin()
        try:
            answer = await self.http.post(path, json=body, headers={**self.headers(key), **headers})
        except httpx.TimeoutException:
            self.book.end(kind, "hung", "no answer in time")
        except LOST as exc:
            self.book.lost(kind, began, type(exc).__name__, expected=not steady)
        else:
            if answer.status_code == 200:
                self.book.end(kind, "200", None if answer.json() else "an empty answer")
            else:
                retry_after = answer.headers.get("retry-after")
                self.book.refused(kind, began, answer.status_code, retry_after, answer.content, steady=steady)

    async def stream(
        self, kind: str, body: Any, key: str, *, steady: bool, leave_after: int | None = None, pause_s: float = 0
    ) -> None:
        """One stream, read to its end, left after some pieces, or read slowly."""
        began = self.book.begin()
        asked = {**body, "stream": True}
        try:
            async with self.http.stream("POST", "/v1/completions", json=asked, headers=self.headers(key)) as answer:
                if answer.status_code != 200:
                    content = await answer.aread()
                    retry_after = answer.headers.get("retry-after")
                    self.book.refused(kind, began, answer.status_code, retry_after, content, steady=steady)
                    return
                tail, pieces = b"", 0
                async for piece in answer.aiter_raw(64 if pause_s else None):
                    tail, pieces = (tail + piece)[-4096:], pieces + 1
                    if pieces == leave_after:
                        self.book.end(kind, "left")
                        return
                    await asyncio.sleep(pause_s)
        except httpx.TimeoutException:
            self.book.end(kind, "hung", "a silent stream")
        except LOST as exc:
            self.book.lost(kind, began, type(exc).__name__)
        else:
            self._judge_end(kind, began, tail, steady=steady)

    def _judge_end(self, kind: str, began: float, tail: bytes, *, steady: bool) -> None:
        """An engine that dies may itself end its stream with an error and [DONE]; our own errors end without."""
        events = [line[6:] for line in tail.split(b"\n") if line.startswith(b"data: ")]
        told = next((json.loads(event) for event in events if event.startswith(b'{"error"')), None)
        done = events[-1:] == [b"[DONE]"]
        if told is not None and done and told.get("src") == "vllm-bootstrap":
            self.book.end(kind, "event and [DONE]", "a false [DONE]")
        elif told is not None:
            own = told.get("src") == "vllm-bootstrap"
            code = told["error"]["code"] if own else "of the engine"
            self.book.broken_off(kind, began, str(code), steady=steady)
        elif done:
            self.book.end(kind, "200 [DONE]")
        else:
            self.book.end(kind, "no end", f"the stream just stopped: {tail[-200:]!r}")


# -- actors ------------------------------------------------------------------------------------------------------------


async def realtime(client: Client) -> None:
    model = client.luck.choice([STEADY, STEADY, SHAKY])
    body = client.body(model, client.luck.choice([1, 5, 40]))
    steady = model == STEADY
    choice = client.luck.randrange(4)
    if choice == 0:
        await client.stream(f"stream {model}", body, "realtime", steady=steady)
    elif choice == 1:
        await client.whole(f"completion {model}", "/v1/completions", {**body, "n": 2}, "realtime", steady=steady)
    elif choice == 2:
        chat = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
        await client.whole(f"chat {model}", "/v1/chat/completions", chat, "realtime", steady=steady)
    else:
        asked = {"model": model, "input": ["one", "two"]}
        await client.whole(f"embeddings {model}", "/v1/embeddings", asked, "realtime", steady=steady)


async def batch(client: Client) -> None:
    model = client.luck.choice([STEADY, STEADY, SHAKY])
    key, headers = client.luck.choice([("batch", {}), ("realtime", {"x-priority": "batch"})])
    asked = [client.body(model, client.luck.choice([10, 80])) for _ in range(client.luck.choice([1, 8]))]
    await asyncio.gather(
        *(
            client.whole(f"batch {model}", "/v1/completions", one, key, steady=model == STEADY, **headers)
            for one in asked
        )
    )


async def limited(client: Client) -> None:
    """More at once than the key may."""
    bodies = [client.body(STEADY, 5) for _ in range(5)]
    await asyncio.gather(*(client.whole("limited", "/v1/completions", one, "limited", steady=True) for one in bodies))


async def fickle(client: Client) -> None:
    model = client.luck.choice([STEADY, SHAKY])
    body = client.body(model, 400)
    if client.luck.random() < 0.6:
        leave = client.luck.choice([1, 3, 20])
        await client.stream(f"leaving {model}", body, "realtime", steady=model == STEADY, leave_after=leave)
        return
    kind = f"leaving before {model}"
    began = client.book.begin()
    try:
        async with asyncio.timeout(client.luck.random() * 0.3):
            answer = await client.http.post("/v1/completions", json=body, headers=client.headers("realtime"))
    except TimeoutError:
        client.book.end(kind, "left")
    except LOST as exc:
        client.book.lost(kind, began, type(exc).__name__, expected=model == SHAKY)
    else:
        if answer.status_code == 200:
            client.book.end(kind, "200")
            return
        client.book.refused(
            kind, began, answer.status_code, answer.headers.get("retry-after"), answer.content, steady=model == STEADY
        )


async def slow(client: Client) -> None:
    model = client.luck.choice([STEADY, SHAKY])
    await client.stream(f"slow {model}", client.body(model, 40), "realtime", steady=model == STEADY, pause_s=0.02)


BAD: tuple[tuple[str, dict[str, str], bytes, frozenset[int]], ...] = (
    ("/v1/completions", {}, b'{"model": "steady", "prompt"', frozenset({400})),
    ("/v1/completions", {}, b'{"model": "steady", "model": "sim", "prompt": "x"}', frozenset({400})),
    ("/v1/completions", {}, b'{"model": "nobody", "prompt": "x"}', frozenset({404})),
    ("/v1/completions", {"authorization": "Bearer wrong"}, b"{}", frozenset({401})),
    ("/v1/completions", {"x-api-version": "v9"}, b'{"model": "steady", "prompt": "x"}', frozenset({400})),
    ("/launch", {}, b'{"model": "sim"}', frozenset({403})),
    ("/proxy/nobody/v1/completions", {}, b'{"model": "steady", "prompt": "x"}', frozenset({404})),
    ("/v1/completions", {"x-filler": "y" * 200_000}, b"{}", frozenset({431})),
    ("/v1/%2e%2e/launch", {}, b"{}", frozenset({400, 404})),
)  # fmt: skip
GARBAGE = (b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\nHost: a\nHost: b\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n")


async def bad(client: Client) -> None:
    path, headers, body, statuses = client.luck.choice(BAD)
    began = client.book.begin()
    kind = "bad request"
    sent = {**client.headers("realtime"), "content-type": "application/json", **headers}
    try:
        answer = await client.http.post(path, content=body, headers=sent)
    except LOST as exc:
        # A head that is too large is answered while it is still being sent; not every client reads that answer.
        client.book.lost(kind, began, type(exc).__name__, expected=431 in statuses)
        return
    told = answer.status_code in statuses or client.book.excused(began)
    problem = None if told else f"{path}: {answer.status_code} {answer.text[:200]}"
    client.book.end(kind, str(answer.status_code), problem)


async def garbage(client: Client) -> None:
    began = client.book.begin()
    address = httpx.URL(client.url)
    try:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(client.luck.choice(GARBAGE))
        await asyncio.sleep(client.luck.choice([0, 0.2]))
        writer.close()
        async with asyncio.timeout(PATIENCE_S):
            await reader.read()
    except TimeoutError:
        client.book.end("garbage", "hung", "the connection was not closed")
    except OSError as exc:
        client.book.lost("garbage", began, type(exc).__name__, expected=True)
    else:
        client.book.end("garbage", "closed")


async def look(client: Client) -> None:
    """What dashboards do."""
    paths = ("/metrics", "/launches?all=true", "/gpus", "/stats", f"/status/{client.steady_id}", "/requests",
             "/activity", f"/logs/{client.steady_id}?tail=20", "/v1/models", "/healthz")  # fmt: skip
    path = client.luck.choice(paths)
    began = client.book.begin()
    kind = "look at " + path.partition("?")[0].replace(client.steady_id, "{id}")
    try:
        answer = await client.http.get(path, headers=client.headers("eyes"))
    except httpx.TimeoutException:
        client.book.end(kind, "hung", "no answer in time")
    except LOST as exc:
        client.book.lost(kind, began, type(exc).__name__)
    else:
        fine = answer.status_code == 200 or client.book.excused(began)
        client.book.end(kind, str(answer.status_code), None if fine else answer.text[:200])


async def follow(client: Client) -> None:
    """A page that watches a log for a while."""
    began = client.book.begin()
    headers = {**client.headers("eyes"), "accept": "text/event-stream"}
    try:
        async with client.http.stream("GET", f"/logs/{client.steady_id}?tail=5", headers=headers) as answer:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(client.luck.choice([0.5, 3])):
                    async for _ in answer.aiter_raw():
                        pass
    except LOST as exc:
        client.book.lost("follow", began, type(exc).__name__)
    else:
        client.book.end("follow", "left")


ACTORS: tuple[tuple[Actor, float], ...] = (
    (realtime, 0.1), (realtime, 0.1), (realtime, 0.3), (batch, 0.3), (batch, 0.3), (limited, 2.0), (fickle, 0.2),
    (fickle, 0.2), (slow, 0.5), (slow, 0.5), (bad, 0.3), (garbage, 1.0), (look, 0.3), (look, 0.3), (follow, 1.0),
)  # fmt: skip
"""Each with its mean pause between two requests, seconds."""


class Traffic(threading.Thread):
    """All actors on an event loop of their own. Starts paused."""

    def __init__(self, url: str, keys: dict[str, str], steady_id: str, book: Book, seed: int) -> None:
        super().__init__(daemon=True)
        self._clients = [Client(url, keys, steady_id, book, seed * 1000 + n) for n in range(len(ACTORS))]
        self._book = book
        self._going, self._over = threading.Event(), threading.Event()
        self._busy = len(ACTORS)
        self._lock = threading.Lock()

    def run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        await asyncio.gather(*(self._act(*pair) for pair in zip(self._clients, ACTORS, strict=True)))

    async def _act(self, client: Client, what: tuple[Actor, float]) -> None:
        actor, pause_s = what
        while not self._over.is_set():
            if not self._going.is_set():
                await client.http.aclose()
                self._count(-1)
                while not self._going.is_set() and not self._over.is_set():
                    await asyncio.sleep(0.05)
                self._count(1)
                client.http = httpx.AsyncClient(base_url=client.url, timeout=PATIENCE_S, trust_env=False)
                continue
            try:
                await actor(client)
            except Exception as exc:  # noqa: BLE001 - a mistake of the soak's own must show, not end the traffic
                self._book.end(actor.__name__, type(exc).__name__, f"the soak itself failed: {exc!r}")
            await asyncio.sleep(client.luck.expovariate(1 / pause_s))
        await client.http.aclose()

    def _count(self, change: int) -> None:
        with self._lock:
            self._busy += change

    def go(self) -> None:
        self._going.set()

    def pause(self) -> None:
        self._going.clear()
        deadline = time.monotonic() + PATIENCE_S + 30
        while self._busy:
            if time.monotonic() > deadline:
                self._book.problems.append(f"{self._busy} clients did not come to an end")
                return
            time.sleep(0.05)

    def close(self) -> None:
        self._over.set()
        self.join(PATIENCE_S + 30)
