"""What the co-scheduling bench runs against: an engine of its own with its default flags, and a daemon's launch.

On two or more cores the model runs on core 1; the engine's API server, the daemon and the load share core 0. Both
engines are there all the time, so that contenders can take turns; only one of them ever has work.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

from bench.common import free_port
from tests.support.daemon import DaemonProcess

ROOT = Path(__file__).resolve().parents[2]
ENGINE_ENV = ROOT / os.environ.get("VLLM_ENGINE_ENV", ".engine")
START_S = 180.0
# What vLLM itself would take: 256 on a CPU and smaller GPUs, 1,024 on a large one.
SIMULATOR_SLOTS = {"vllm-cpu-tiny": 256, "h200-8b": 512}
MAX_MODEL_LEN = 1024
REALTIME_KEY, BATCH_KEY = "bench-realtime-0123456789", "bench-batch-0123456789"
CORES = os.cpu_count() or 1
MODEL_CORE = {"VLLM_CPU_OMP_THREADS_BIND": "1"} if CORES > 1 else {}


def tiny_model(folder: Path, size: str = "tiny") -> Path:
    """The tiny model of the tests, or its ``small`` sibling, made on the spot."""
    script = ROOT / "tests" / "vllm" / "make_tiny_model.py"
    command = [ENGINE_ENV / "bin" / "python", script, folder / "tiny", "7", size]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "tiny"


def pin(pid: int, *, model: bool = False) -> None:
    """An engine's first process to core 0 (``model``: to core 1, because it has no other), those below it to core 1."""
    if CORES < 2 or shutil.which("taskset") is None:
        return
    for one in [pid, *descendants(pid)]:
        core = "0" if one == pid and not model else "1"
        subprocess.run(["taskset", "-apc", core, str(one)], check=False, stdout=subprocess.DEVNULL)


def descendants(pid: int) -> list[int]:
    children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [found for child in children for found in descendants(child)]


class Direct:
    """An engine that the bench starts itself, reached on a port. ``alone``: it has one process."""

    def __init__(self, log: Path, port: int, command: list[str], env: dict[str, str], *, alone: bool = False) -> None:
        self.port, self._alone = port, alone
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, env={**os.environ, **env}, stdout=out, stderr=out)

    def __enter__(self) -> Self:
        deadline = time.monotonic() + START_S
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise SystemExit("the engine that is driven directly did not start")
            time.sleep(0.2)
        pin(self.process.pid, model=self._alone)
        return self

    def _is_up(self) -> bool:
        try:
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1).status == 200)
        except OSError:
            return False

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(30)


def default_vllm(home: Path, model: Path) -> Direct:
    """vLLM as it comes: no flag that has to do with scheduling."""
    port = free_port()
    flags = [
        "--model", str(model), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager",
        "--max-model-len", str(MAX_MODEL_LEN), "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    env = {
        **MODEL_CORE, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_RPC_BASE_PATH": str(home),
    }  # fmt: skip
    python = str(ENGINE_ENV / "bin" / "python")
    return Direct(home / "direct.log", port, [python, "-m", "vllm.entrypoints.openai.api_server", *flags], env)


def simulator(home: Path, profile: str) -> Direct:
    """The simulator in the time of one of its profiles."""
    port = free_port()
    flags = [
        "--model", "sim", "--served-model-name", "tiny", "--port", str(port), "--profile", profile,
        "--max-num-seqs", str(SIMULATOR_SLOTS[profile]),
    ]  # fmt: skip
    command = [sys.executable, "-m", "vllm_bootstrap.engines.simulator", *flags]
    return Direct(home / f"simulator-{profile}.log", port, command, {"PYTHONPATH": str(ROOT)}, alone=True)


class Ours:
    """A daemon with one launch, of vLLM or (``profile``) the simulator. ``direct`` says how its engine is reached
    without the daemon."""

    def __init__(self, profile: str | None, home: Path, queue: int) -> None:
        self._profile = profile
        self._levers = home / "levers"
        self._levers.touch()
        keys = home / "keys.json"
        keys.write_text(_keys())
        vllm = profile is None
        env = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **(MODEL_CORE if vllm else {})}
        settings: dict[str, Any] = {"devices": "cpu" if vllm else "mock:1", "auth_keys_file": keys}
        settings |= {"max_in_flight_requests": queue, "probe_interval_s": 2, "probe_timeout_s": 5, "stop_grace_s": 7}
        if vllm:
            settings |= {"engine_python": ENGINE_ENV / "bin" / "python", "engine_env_passthrough": ",".join(MODEL_CORE)}
        command = [sys.executable, "-m", "bench.cosched.daemon", str(self._levers)]
        self.daemon = DaemonProcess(env=env, command=command, key=REALTIME_KEY, **settings)
        self.launch_id = ""

    def __enter__(self) -> Self:
        self.daemon.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.daemon.close()

    def launch(self, model: str, **fields: Any) -> None:
        body = {"model": model, "served_model_name": "tiny", "max_model_len": MAX_MODEL_LEN, **fields}
        if self._profile is not None:
            knobs, slots = {"profile": self._profile}, SIMULATOR_SLOTS[self._profile]
            extra = {**body.get("extra_args", {}), **knobs}
            body |= {"engine": "simulator", "gpu_count": 1, "max_num_seqs": slots, "extra_args": extra}
        answer = self.daemon.request("POST", "/launch", body)
        if answer.status != 201:
            raise SystemExit(answer.body.decode())
        self.launch_id = str(answer.json()["launch_id"])
        self._until_ready()
        pin(self.pid, model=self._profile is not None)
        self._pin_daemon()

    def _until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while (status := self.daemon.status(self.launch_id))["state"] != "ready":
            if status["state"] == "failed" or time.monotonic() > deadline:
                raise SystemExit(f"the launch is {status['state']}: {status['failure']}")
            time.sleep(0.2)

    def _pin_daemon(self) -> None:
        if CORES > 1 and shutil.which("taskset"):
            subprocess.run(["taskset", "-apc", "0", str(self.daemon.pid)], check=False, stdout=subprocess.DEVNULL)

    def use(self, off: tuple[str, ...]) -> None:
        """Have these levers off; where that is a change, with a new daemon on the running engine."""
        if self._levers.read_text() != " ".join(off):
            self._levers.write_text(" ".join(off))
            self.daemon.restart()
            self._until_ready()
            self._pin_daemon()

    @property
    def pid(self) -> int:
        """The engine's first process, which outlives daemons and so is nobody's child."""
        return int(self.daemon.status(self.launch_id)["pid"])

    @property
    def slots(self) -> int:
        return int(self.daemon.status(self.launch_id)["load"]["capacity"])

    @property
    def direct(self) -> dict[str, str]:
        sockets = list(self.daemon.runtime_dir.glob(f"**/{self.launch_id}/**/engine.sock"))
        sockets += [one for one in self.daemon.runtime_dir.glob("**/engine.sock") if one not in sockets]
        return {"uds": str(sockets[0])}


def _keys() -> str:
    most = {"max_parallel": 100_000, "models": ["*"]}
    return json.dumps(
        {
            "keys": [
                {"name": "chat", "token": REALTIME_KEY, "scopes": ["admin", "realtime"], **most},
                {"name": "jobs", "token": BATCH_KEY, "scopes": ["batch"], "max_class": "batch", **most},
            ]
        }
    )


def short_home() -> Path:
    return Path(tempfile.mkdtemp(prefix="vbco", dir="/tmp"))
