"""Batches on a real vLLM for the CPU, beside the same engine driven directly at the same concurrency.

With two cores the model runs on one of them; API server, daemon and bench share the other.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

from bench.batches.box import CHAT, COMPLETIONS, Box, chats, completions, write_input
from bench.common import median, table
from bench.cosched.engines import ENGINE_ENV, MODEL_CORE, ROOT, pin, tiny_model

SLOTS, TOKENS = 32, 32
BATCH_SLOTS = SLOTS - 1  # one stays free for realtime to come: both ways are driven at what batch may use


def run(home: Path, *, lines: int, rounds: int) -> None:
    model = tiny_model(home)
    chat = write_input(home / "engine-chat.jsonl", chats(lines, "tiny", TOKENS), CHAT)
    plain = write_input(home / "engine-plain.jsonl", completions(lines, "tiny", TOKENS), COMPLETIONS)
    found: dict[str, list[float]] = {name: [] for name in ("direct", "batch", "one by one", "joined")}
    for size in (1, 8):
        with vllm(size) as box:
            launched = box.daemon.launch(
                str(model), engine="vllm", served_model_name="tiny", max_model_len=1024, max_num_seqs=SLOTS,
                dtype="float32", enforce_eager=True, gpu_count=1,
            )  # fmt: skip
            box.launch_id = launched
            # As in the co-scheduling bench: vLLM's processes spin while they wait, and keep all else from running.
            pin(box.daemon.wait_state(launched, "ready", timeout_s=240)["pid"])
            for _ in range(rounds):
                if size == 1:
                    found["direct"].append(asyncio.run(directly(engine_socket(box), chat, lines)))
                    found["batch"].append(box.run(chat, CHAT).rate)
                found["one by one" if size == 1 else "joined"].append(box.run(plain, COMPLETIONS).rate)
    best = median(found["direct"])
    rows = [
        [name, f"{median(rates):.1f}", f"{100 * median(rates) / best:.0f} %" if name == "batch" else ""]
        for name, rates in found.items()
    ]
    print(f"\nvLLM (CPU build), {lines} lines of {TOKENS} tokens, {SLOTS} sequence slots, medians of {rounds} rounds\n")
    print(table(["", "lines/s", "of direct"], rows), flush=True)


def vllm(size: int) -> Box:
    env = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **MODEL_CORE}
    passed = ",".join(MODEL_CORE)
    python = ENGINE_ENV / "bin" / "python"
    return Box(
        env=env, devices="cpu", engine_python=python, engine_env_passthrough=passed, batch_max_size=size,
        realtime_reserve=0,
    )  # fmt: skip


def engine_socket(box: Box) -> Path:
    """Where the engine listens; nothing but the bench goes there past the daemon."""
    found = [path for path in box.daemon.runtime_dir.rglob("*") if path.is_socket() and "engine" in path.name]
    if not found:
        raise SystemExit(f"no engine socket below {box.daemon.runtime_dir}")
    return found[0]


async def directly(socket: Path, path: Path, lines: int) -> float:
    """Lines a second, ``BATCH_SLOTS`` at a time on kept connections."""
    bodies = iter([json.dumps(json.loads(line)["body"]).encode() for line in path.read_text().splitlines()])
    began = time.monotonic()
    await asyncio.gather(*(_worker(socket, bodies) for _ in range(BATCH_SLOTS)))
    return lines / (time.monotonic() - began)


async def _worker(socket: Path, bodies: Iterator[bytes]) -> None:
    reader, writer = await asyncio.open_unix_connection(str(socket))
    for body in bodies:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        writer.write(head.encode() + b"\r\n\r\n" + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        if b" 200 " not in answer.split(b"\r\n")[0]:
            raise SystemExit(answer.decode())
    writer.close()
