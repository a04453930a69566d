"""Inputs of batches, and line databases made of them the way the product makes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_bootstrap.batches.indexing import Indexing, Outcome, Task
from vllm_bootstrap.batches.linestore import LineStore

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def line(custom_id: Any = "a", *, model: Any = "m", url: Any = COMPLETIONS, **body: Any) -> bytes:
    """One line of an input, without its end."""
    body = {"model": model, "prompt": "hello", **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}).encode()


def lines(count: int, **body: Any) -> list[bytes]:
    return [line(f"id-{number}", **body) for number in range(1, count + 1)]


def task(folder: Path, content: bytes | Iterable[bytes], **changed: Any) -> Task:
    """An input on disk, and what is to be done with it."""
    data = content if isinstance(content, bytes) else b"".join(item + b"\n" for item in content)
    path = folder / "batch_b1.jsonl"
    path.write_bytes(data)
    fields = {"endpoint": COMPLETIONS, "max_lines": 1000, "max_line_bytes": 10_000, **changed}
    return Task(str(path), str(folder / "batch_b1.db"), **fields)


def indexed(wanted: Task) -> Outcome:
    """Judged and written by this process."""
    return Indexing(wanted, lambda _said: None).run()


def line_store(folder: Path, content: Iterable[bytes], **changed: Any) -> LineStore:
    wanted = task(folder, content, **changed)
    outcome = indexed(wanted)
    assert not outcome.errors, outcome.errors
    return LineStore.open(Path(wanted.database), Path(wanted.input))
