"""What the benches of models run against: a daemon with a catalogue, and its CPU time by the kernel's own count."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.proxy.contenders import pin
from tests.support.daemon import DaemonProcess

KEY = "bench-key-0123456789abcdef"
MEASURED = (sys.executable, "-m", "bench.models.daemon")
ROOT = Path(__file__).resolve().parents[2]


def daemon(models: Mapping[str, Mapping[str, Any]], *, measured: bool = False, **settings: Any) -> DaemonProcess:
    """Not started yet; ``models`` as below that key in the catalogue. ``measured``: it writes down how long it looks at
    models, into ``looks.jsonl`` in its folder (see ``bench.models.daemon``)."""
    own: dict[str, Any] = {"command": MEASURED} if measured else {}
    made = DaemonProcess(env={"PYTHONPATH": str(ROOT), **settings.pop("env", {})}, **own, access_key=KEY, **settings)
    path = made.root / "models.yaml"
    path.write_text(json.dumps({"models": dict(models)}))
    made.configure(models_file=path, log_level="WARNING")
    return made


def pid_of(one: DaemonProcess) -> int:
    assert one.process is not None
    return one.process.pid


def pin_daemon(one: DaemonProcess) -> None:
    """To core 0 with all its threads, where ``taskset`` is there and there are two cores."""
    if pin(0):
        subprocess.run(["taskset", "-apc", "0", str(pid_of(one))], check=False, stdout=subprocess.DEVNULL)


def cpu_s(pid: int) -> float:
    """CPU time of all threads that live, from the scheduler's own count: ``stat`` knows hundredths only."""
    return sum(int(one.read_text().split()[0]) for one in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def models(count: int, **entry: Any) -> dict[str, dict[str, Any]]:
    """So many models of one mock GPU each."""
    return {f"model-{n}": {"source": f"org/model-{n}", "gpus": {"count": 1}, **entry} for n in range(count)}
