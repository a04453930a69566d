"""An engine to measure: a real vLLM (CPU build) with the tiny model of the tests, or the simulator, on a Unix socket.

Processes are pinned: what computes to one core, the API server and the load to the other, because a shared core moves
times to the first token by more than what is measured.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINE_CORE, LOAD_CORE = 1, 0
READY_WITHIN_S = 180.0
MODEL = "tiny"


@dataclass(frozen=True, slots=True)
class Running:
    """``pid`` is the process that serves HTTP."""

    uds: str
    pid: int
    kind: str

    def metrics(self) -> dict[str, float]:
        """Samples of ``/metrics`` without labels, summed; ``_bucket`` ones are left out."""
        found: dict[str, float] = {}
        for name, value in re.findall(r"^vllm:(\w+)\{[^}]*\} (\S+)$", get(self.uds, "/metrics"), re.MULTILINE):
            if not name.endswith("_bucket"):
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def cache(self) -> tuple[int, int]:
        """Block size and number of blocks of the KV cache, as the engine says."""
        text = get(self.uds, "/metrics")
        names = ("block_size", "num_gpu_blocks")
        values = [re.search(rf'cache_config_info{{.*?\b{name}="(\d+)"', text) for name in names]
        size, blocks = (int(value[1]) if value else 0 for value in values)
        return size, blocks

    def cpu_s(self) -> float:
        """CPU seconds of the API server so far, to the nanosecond."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def get(uds: str, path: str) -> str:
    connection = http.client.HTTPConnection("engine", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(uds)
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


@contextlib.contextmanager
def vllm(python: Path, flags: Sequence[str] = ()) -> Iterator[Running]:
    """A real engine, its EngineCore on a core of its own."""
    home = Path(tempfile.mkdtemp(prefix="sf", dir="/tmp"))
    model = home / "model"
    maker = ROOT / "tests" / "vllm" / "make_tiny_model.py"
    subprocess.run([python, maker, model], check=True, capture_output=True)
    argv = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", MODEL,
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--uds", home / "e.sock",
        "--scheduling-policy", "priority", "--max-num-seqs", "32", "--disable-uvicorn-access-log", *flags,
    ]  # fmt: skip
    env = {
        "PATH": os.environ["PATH"], "HOME": str(home), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": str(ENGINE_CORE),
        "TMPDIR": str(home), "VLLM_LOGGING_COLOR": "0",
    }  # fmt: skip
    with _started(home, argv, env, "vllm") as running:
        core = next(child for child in _children(running.pid) if b"EngineCore" in _title(child))
        _pin(core, ENGINE_CORE)
        for worker in _children(core):
            _pin(worker, ENGINE_CORE)
        _pin(running.pid, LOAD_CORE)
        yield running


@contextlib.contextmanager
def simulator(profile: str, flags: Sequence[str] = ()) -> Iterator[Running]:
    """The simulator with a profile, on the core that computes."""
    home = Path(tempfile.mkdtemp(prefix="sf", dir="/tmp"))
    argv = [
        sys.executable, "-m", "vllm_bootstrap.engines.simulator", f"--model={MODEL}", f"--uds={home}/e.sock",
        "--max-model-len=2048", "--max-num-seqs=32", f"--profile={profile}", *flags,
    ]  # fmt: skip
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT)}
    with _started(home, argv, env, "simulator") as running:
        _pin(running.pid, ENGINE_CORE)
        yield running


@contextlib.contextmanager
def _started(home: Path, argv: Sequence[object], env: dict[str, str], kind: str) -> Iterator[Running]:
    log = (home / "log").open("wb")
    process = subprocess.Popen([str(part) for part in argv], env=env, stdout=log, stderr=subprocess.STDOUT, cwd=home)
    try:
        uds = str(home / "e.sock")
        deadline = time.monotonic() + READY_WITHIN_S
        while not _answers(uds):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"no engine:\n{(home / 'log').read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        yield Running(uds, process.pid, kind)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        log.close()
        if "SIMFIT_KEEP_LOG" in os.environ:
            shutil.copy(home / "log", os.environ["SIMFIT_KEEP_LOG"])
        shutil.rmtree(home, ignore_errors=True)


def _answers(uds: str) -> bool:
    try:
        get(uds, "/health")
    except (OSError, http.client.HTTPException):
        return False
    return True


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _pin(pid: int, core: int) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def _title(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
