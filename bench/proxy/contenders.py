"""Who takes part in the proxy bench, and how each is started on a core of its own in front of the same backend.

nginx comes from the system and is left out where there is none. sglang-router is installed by pip, on first use, into
an environment of its own below the cache directory; where that does not work it is left out with a line that says so.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

KEY = "bench-key-0123456789abcdef"
SGLANG_ROUTER = "sglang-router==0.3.2"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-bootstrap-bench"
NGINX_CONF = """
{user} daemon off; worker_processes 1; pid {home}/nginx.pid; error_log {home}/error.log;
worker_rlimit_nofile 8192;
events {{ worker_connections 4096; }}
http {{
  access_log {home}/access.log;
  client_body_temp_path {home}/a; proxy_temp_path {home}/b; fastcgi_temp_path {home}/c;
  uwsgi_temp_path {home}/d; scgi_temp_path {home}/e;
  upstream engine {{ server {backend}; keepalive 1024; }}
  server {{
    listen 127.0.0.1:{port}; keepalive_requests 1000000;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
      proxy_request_buffering off;
    }}
  }}
}}
"""


@dataclass
class Backend:
    """The same server on a port and on a Unix socket."""

    port: int
    path: Path


@dataclass
class Contender:
    """One way to the backend. ``process`` None: direct. ``slow``: a full load would take minutes."""

    name: str
    port: int
    process: subprocess.Popen[bytes] | None = None
    slow: bool = False
    idle_ms: list[float] = field(default_factory=list)
    request_us: list[float] = field(default_factory=list)
    numbered_us: list[float] = field(default_factory=list)
    chunk_us: dict[int, list[float]] = field(default_factory=dict)
    rate: dict[int, list[float]] = field(default_factory=dict)
    first_byte_ms: list[tuple[float, float]] = field(default_factory=list)
    idle_rss_mb: float = 0.0
    busy_rss_mb: float = 0.0

    def pids(self) -> list[int]:
        return [] if self.process is None else [self.process.pid, *children(self.process.pid)]


class Starter:
    """Starts processes in a folder of their own and ends them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.running: list[subprocess.Popen[bytes]] = []

    def spawn(
        self, argv: list[str], *, core: int, log: str, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with (self.home / f"{log}.output").open("ab") as output:
            process = subprocess.Popen([*pin(core), *argv], env=env, stdout=output, stderr=subprocess.STDOUT)
        self.running.append(process)
        return process

    def folder(self) -> Path:
        made = self.home / str(len(self.running))
        made.mkdir()
        return made

    def stop(self) -> None:
        for process in reversed(self.running):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self.running):
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def backend(self) -> Backend:
        made = Backend(free_port(), self.home / "backend.sock")
        self.spawn([sys.executable, "-m", "bench.proxy.backend", str(made.port), str(made.path)], core=1, log="backend")
        wait_for(made.port)
        return made

    def all(self, backend: Backend, only: tuple[str, ...]) -> list[Contender]:
        """Every contender that can be had here, the direct way first. ``only``: beginnings of names, none for all."""
        tcp, unix = f"127.0.0.1:{backend.port}", f"unix:{backend.path}"
        url, uds = {"url": f"http://127.0.0.1:{backend.port}"}, {"uds": str(backend.path)}
        makers: dict[str, Callable[[str], Contender | None]] = {
            "nginx": lambda name: self.nginx(name, tcp),
            SGLANG_ROUTER.replace("==", " "): lambda name: self.sglang_router(name, backend),
            "FastAPI + httpx": lambda name: self.naive(name, backend),
            "bare splice in Python": lambda name: self.splice(name, backend),
            "vllm-bootstrap": lambda name: self.ours(name, url),
            "vllm-bootstrap, interpreted": lambda name: self.ours(name, url, compiled=False),
            "nginx, Unix socket": lambda name: self.nginx(name, unix),
            "vllm-bootstrap, Unix socket": lambda name: self.ours(name, uds),
        }
        made = [make(name) for name, make in makers.items() if not only or name.startswith(only)]
        return [Contender("direct", backend.port), *(one for one in made if one is not None)]

    def nginx(self, name: str, upstream: str) -> Contender | None:
        program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
        if program is None:
            say(f"{name} is left out: no nginx is installed")
            return None
        port, home = free_port(), self.folder()
        conf = home / "nginx.conf"
        user = "" if os.getuid() else "user root;"  # else its worker may not open the backend's socket
        conf.write_text(NGINX_CONF.format(user=user, home=home, backend=upstream, port=port))
        process = self.spawn([program, "-c", str(conf), "-e", str(home / "error.log")], core=0, log="nginx")
        wait_for(port)
        return Contender(name, port, process)

    def sglang_router(self, name: str, backend: Backend) -> Contender | None:
        python = installed(SGLANG_ROUTER)
        if python is None:
            say(f"{SGLANG_ROUTER} is left out: pip could not install it")
            return None
        port = free_port()
        argv = [
            str(python), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port),
            "--worker-urls", f"http://127.0.0.1:{backend.port}", "--policy", "round_robin",
            "--prometheus-port", str(free_port()), "--max-concurrent-requests", "4096",
            "--log-level", "warn",  # a third cheaper than its default, and what somebody who counts would set
        ]  # fmt: skip
        process = self.spawn(argv, core=0, log="sglang-router")
        wait_for(port, within_s=60)
        wait_until_it_passes_on(name, port, within_s=60)  # it probes its workers first
        return Contender(name, port, process)

    def naive(self, name: str, backend: Backend) -> Contender:
        port = free_port()
        process = self.spawn(
            [sys.executable, "-m", "bench.proxy.naive", str(port), str(backend.port)], core=0, log="naive"
        )
        wait_for(port)
        return Contender(name, port, process, slow=True)

    def splice(self, name: str, backend: Backend) -> Contender:
        port = free_port()
        process = self.spawn(
            [sys.executable, "-m", "bench.proxy.splice", str(port), str(backend.port)], core=0, log="splice"
        )
        wait_for(port)
        return Contender(name, port, process)

    def ours(self, name: str, where: dict[str, str], *, compiled: bool = True) -> Contender:
        """With keys, scheduling, limits (of tokens too, settled by answers' usage), metrics and the access log on."""
        port, home = free_port(), self.folder()
        engine = {"kind": "external", "served_names": ["bench"], "slots": 1024, "keep_alive_s": 120, **where}
        (home / "engines.json").write_text(json.dumps({"engines": {"bench": engine}}))
        entry = {
            "name": "bench", "token": KEY, "scopes": ["admin", "realtime"], "models": ["*"], "max_parallel": 1024,
            "requests_per_minute": 10_000_000, "tokens_per_minute": 1_000_000_000_000,
        }  # fmt: skip
        (home / "keys.json").write_text(json.dumps({"keys": [entry]}))
        (home / "keys.json").chmod(0o600)
        env = {
            "PATH": os.environ["PATH"], "HOME": str(home), "VLLM_BOOTSTRAP_PORT": str(port), "AUTH_KEYS_FILE":
            str(home / "keys.json"), "VLLM_BOOTSTRAP_ENGINES_FILE": str(home / "engines.json"),
            "VLLM_BOOTSTRAP_STATE_DIR": str(home / "s"), "VLLM_BOOTSTRAP_RUNTIME_DIR": str(home / "r"),
            "VLLM_BOOTSTRAP_LOCK_DIR": str(home / "l"), "VLLM_BOOTSTRAP_LOG_FILE": str(home / "ours.log"),
            "VLLM_BOOTSTRAP_DEVICES": "cpu", "MAX_IN_FLIGHT_REQUESTS": "1024", "VLLM_BOOTSTRAP_COMPILED": str(compiled),
        }  # fmt: skip
        process = self.spawn([sys.executable, "-m", "vllm_bootstrap", "serve"], core=0, log="ours", env=env)
        wait_for(port)
        check_form(port, "compiled" if compiled else "interpreted")
        status, answer = post(port, "/launch", {"model": "bench", "engine": "bench"})
        if status not in (200, 201, 202):
            raise SystemExit(f"/launch: {status} {answer.decode()}")
        wait_until_it_passes_on(name, port, within_s=30)
        return Contender(name, port, process)


def check_form(port: int, wanted: str) -> None:
    """See that the daemon is what the table will say it is."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/version", timeout=30) as reply:
        form = json.load(reply)["data_plane"]
    if form != wanted:
        raise SystemExit(f"the daemon's data plane is {form}: make compiled")


def installed(package: str) -> Path | None:
    """The interpreter of an environment that holds ``package``, made on first use."""
    home = CACHE / package.replace("==", "-")
    python = home / "bin" / "python"
    done = home / "complete"
    if not done.exists():
        say(f"installing {package} into {home}")
        venv.create(home, clear=True, with_pip=True)
        command = [python, "-m", "pip", "-qq", "--disable-pip-version-check", "install", package]
        if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
            return None
        done.touch()
    return python


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def pin(core: int) -> list[str]:
    return ["taskset", "-c", str(core)] if shutil.which("taskset") and (os.cpu_count() or 1) > 1 else []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise SystemExit(f"nothing listens on {port}")


def wait_until_it_passes_on(name: str, port: int, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while True:
        status, answer = post(port, "/v1/completions", {"model": "bench", "prompt": "hello"})
        if status == 200:
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"{name} does not pass requests on: {status} {answer.decode()}")
        time.sleep(0.05)


def post(port: int, path: str, body: dict[str, object]) -> tuple[int, bytes]:
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(asked, timeout=30) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read()


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
