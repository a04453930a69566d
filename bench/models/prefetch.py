"""What warming the page cache saves: reading a model's file cold and warmed, and loading it with a real vLLM.

    python -m bench.models.prefetch                         # the file alone
    python -m bench.models.prefetch --engine-python PATH    # and a real engine, on a CPU

Only the one file is dropped from the page cache (POSIX_FADV_DONTNEED), so nothing else on the machine is disturbed.
In a virtual machine "cold" means cold for the guest: the host may still have the blocks in its own memory, which makes
the difference smaller than on a machine of its own. The figure of the disk says which it was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import re
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.common import median, table
from vllm_bootstrap.models.prefetch import Prefetches
from vllm_bootstrap.models.residency import cached_bytes

MIB = 1024**2
_LOADED = re.compile(r"Loading weights took ([\d.]+) seconds")
# hidden size, layers: 24 layers of 1024 are about 300 million parameters, in bfloat16 600 MB.
HIDDEN, LAYERS, VOCABULARY = 1024, 24, 2048
LOAD = """
import sys
from vllm import LLM
LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, max_model_len=256, max_num_seqs=2, dtype="bfloat16")
"""


def make_model(folder: Path) -> Path:
    """A Llama of random numbers in one safetensors file; returns the file."""
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN], "model.norm.weight": [HIDDEN]}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{name}.self_attn.{part}.weight"] = [HIDDEN, HIDDEN]
        shapes[f"{name}.mlp.gate_proj.weight"] = shapes[f"{name}.mlp.up_proj.weight"] = [3 * HIDDEN, HIDDEN]
        shapes[f"{name}.mlp.down_proj.weight"] = [HIDDEN, 3 * HIDDEN]
        shapes[f"{name}.input_layernorm.weight"] = shapes[f"{name}.post_attention_layernorm.weight"] = [HIDDEN]
    shapes["lm_head.weight"] = [VOCABULARY, HIDDEN]
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        while end > 0:
            # Exponents near that of 0.01, so that an engine that runs it meets no infinities.
            piece = bytearray(os.urandom(min(end, MIB)))
            piece[1::2] = b"\x3c" * (len(piece) // 2)
            file.write(piece)
            end -= len(piece)
        os.fsync(file.fileno())
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": VOCABULARY,
        "num_hidden_layers": LAYERS, "intermediate_size": 3 * HIDDEN, "num_attention_heads": 16,
        "num_key_value_heads": 16, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "torch_dtype": "bfloat16", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return path


def drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    left = cached_bytes(path)
    if left is None or left > 8 * MIB:
        raise SystemExit(f"{left} bytes of {path} stay in the page cache: nothing can be measured here")


async def warm(path: Path) -> float:
    """Warm it as the daemon does; returns the seconds."""
    prefetches = Prefetches({"PATH": os.environ["PATH"]})
    prefetches.begin("bench", [path], path.stat().st_size)
    view = await prefetches.wait("bench")
    if view.state != "completed":
        raise SystemExit(f"the prefetch {view.state}: {view.error}")
    return view.seconds


def read_mapped(path: Path) -> float:
    """Go over the file as engines do: mapped, one copy of each part. Returns the seconds."""
    began = time.perf_counter()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        for start in range(0, len(mapped), 4 * MIB):
            bytes(mapped[start : start + 4 * MIB])
    return time.perf_counter() - began


def load(python: Path, folder: Path) -> tuple[float, float]:
    """Load it with a real vLLM on the CPU. Returns the seconds for the weights alone, by its own log, and for all."""
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    began = time.perf_counter()
    command = [str(python), "-c", LOAD, str(folder)]
    with tempfile.TemporaryDirectory(prefix="vb", dir="/tmp") as sockets:  # vLLM leaves its own behind
        env["VLLM_RPC_BASE_PATH"] = sockets
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600)
    found = _LOADED.search(done.stdout + done.stderr)
    if done.returncode != 0 or found is None:
        raise SystemExit(f"vLLM did not load the model:\n{(done.stdout + done.stderr)[-3000:]}")
    return float(found[1]), time.perf_counter() - began


def run(runs: int, engine_python: Path | None, engine_runs: int, folder: Path | None) -> Iterator[str]:
    """``folder``: where the model is made. Without ``engine_python`` the file is only read."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = make_model(Path(name))
        size = path.stat().st_size
        cold, warming, warmed = [], [], []
        for _ in range(runs):
            drop(path)
            cold.append(read_mapped(path))
            drop(path)
            warming.append(asyncio.run(warm(path)))
            warmed.append(read_mapped(path))
        yield f"{size / MIB:.0f} MiB; cold reads at {size / MIB / median(cold):.0f} MiB/s"
        rows = [["file mapped and copied", f"{median(cold):.2f}", f"{median(warmed):.2f}", f"{median(warming):.2f}"]]
        if engine_python is not None:
            rows += engine_rows(engine_python, path, engine_runs)
        yield table(["median s", "cold", "prefetched", "the prefetch itself"], rows)


def engine_rows(python: Path, path: Path, runs: int) -> list[list[str]]:
    """Cold and prefetched loads in turns."""
    loads: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
    load(python, path.parent)  # its caches of compiled code are not what is measured
    for _ in range(runs):
        drop(path)
        loads["cold"].append(load(python, path.parent))
        drop(path)
        asyncio.run(warm(path))
        loads["warm"].append(load(python, path.parent))
    rows = []
    for index, what in enumerate(("vLLM: loading weights", "vLLM: all of the start")):
        figures = [f"{median([one[index] for one in loads[state]]):.2f}" for state in ("cold", "warm")]
        rows.append([what, *figures, ""])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-python", type=Path, help="interpreter of an environment with vLLM")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the model is made (a disk, not memory)")
    asked = parser.parse_args()
    for line in run(asked.runs, asked.engine_python, asked.runs, asked.folder):
        print(line, flush=True)


if __name__ == "__main__":
    main()
