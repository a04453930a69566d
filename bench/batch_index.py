"""How long judging and indexing a batch's input takes, and how much memory: ``python -m bench.batch_index``.

Two inputs: a million lines of 300 bytes, half of which share a long system prompt with others when ``--shared``, and a
gigabyte of long lines. Prints one line for each: seconds, lines and megabytes a second, the helper's peak memory, the
size of the database. Nothing of the daemon runs beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import tempfile
import time
from pathlib import Path

from vllm_bootstrap.batches.indexer import Task, index

ENDPOINT = "/v1/chat/completions"
PREFIXES = 50


def line(number: int, prompt: str) -> bytes:
    messages = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": prompt}]
    body = {"model": "org/model", "messages": messages, "max_tokens": 16}
    request = {"custom_id": f"request-{number:07d}", "method": "POST", "url": ENDPOINT, "body": body}
    return json.dumps(request).encode() + b"\n"


def write(path: Path, lines: int, prompt_chars: int, *, shared: bool) -> None:
    with path.open("wb") as file:
        for number in range(lines):
            start = f"{number % PREFIXES if shared else number:08d} "
            file.write(line(number, (start * (prompt_chars // len(start) + 1))[:prompt_chars]))


async def measure(name: str, path: Path, folder: Path) -> None:
    task = Task(str(path), str(folder / "batch_bench.db"), ENDPOINT, max_lines=1_000_000, max_line_bytes=8 * 1024**2)
    before = time.perf_counter()
    outcome = await index(task)
    took = time.perf_counter() - before
    figures = {
        "input": name,
        "lines": outcome.lines,
        "errors": outcome.error_count,
        "input_mb": round(path.stat().st_size / 1e6),
        "seconds": round(took, 1),
        "lines_per_s": round(outcome.lines / took),
        "mb_per_s": round(path.stat().st_size / 1e6 / took),
        # Of the largest child so far, so the larger input must come last.
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        "database_mb": round(Path(task.database).stat().st_size / 1e6),
    }
    print(json.dumps(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--long-lines", type=int, default=10_000, help="of --prompt-chars each")
    parser.add_argument("--prompt-chars", type=int, default=100_000)
    parser.add_argument("--shared", action="store_true", help="long lines share their beginning with others")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        folder = Path(made)
        long, short = folder / "long.jsonl", folder / "short.jsonl"
        write(long, args.long_lines, args.prompt_chars, shared=args.shared)
        asyncio.run(measure("long lines", long, folder))
        long.unlink()
        write(short, args.lines, 90, shared=False)
        asyncio.run(measure("short lines", short, folder))


if __name__ == "__main__":
    main()
