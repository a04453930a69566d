"""From start to listening: the phases of vLLM's start-up, their log lines, and the deaths that happen on the way.

Invariant: the socket is bound early and listens only when all is done, as with vLLM: until then a connection is
refused.
It must not import asyncio: it runs before any event loop, and children are forked here.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Mapping
from typing import NoReturn

from vllm_bootstrap.engines.simulator import hub, tree
from vllm_bootstrap.engines.simulator.deaths import DEATHS, Stage
from vllm_bootstrap.engines.simulator.knobs import Options
from vllm_bootstrap.engines.simulator.log import Log

VERSION = "0.32.0+simulator"
SHARDS = 4
GRAPH_SIZES = 5
# Parts of the boot delay.
IMPORTING, CONFIGURING, LOADING, COMPILING, CAPTURING = 0.2, 0.1, 0.4, 0.2, 0.1
TOO_SMALL = (
    "ValueError: To serve at least one request with the model's max seq len ({wanted}), more KV cache is needed than "
    "the available KV cache memory. Based on the available memory, the estimated maximum model length is {there}. Try "
    "increasing `gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine."
)


class Interrupted(BaseException):
    """SIGTERM or SIGINT while starting."""


class Died(Exception):
    """The start failed as a knob asked, or for real. ``code`` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def bind(options: Options) -> socket.socket:
    """The bound socket, not listening yet. Raises ``OSError``; a socket file that exists is in the way."""
    if options.uds:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address: str | tuple[str, int] = options.uds
    else:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address = (options.host, options.port)
    try:
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def location(options: Options, sock: socket.socket) -> str:
    """Where it listens, for people."""
    if options.uds:
        return f"unix:{options.uds}"
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Boot:
    """One start. ``core`` is the engine process once it exists."""

    def __init__(self, options: Options, env: Mapping[str, str]) -> None:
        self.core: tree.EngineProcess | None = None
        self._options = options
        self._env = env
        self._log = Log("APIServer", os.getpid())
        self._core_log = self._log

    def run(self) -> socket.socket:
        """All phases. Blocks. Raises ``Died`` and ``Interrupted``; ``core`` is the caller's to stop."""
        self._arguments()
        sock = self._bind()
        try:
            self._configure()
            self._load()
            self._warm_up()
        except BaseException:
            sock.close()
            raise
        return sock

    def _pass(self, part: float) -> None:
        if self._options.boot_delay:
            time.sleep(self._options.boot_delay * part)

    def _stage(self, stage: Stage) -> None:
        death = DEATHS.get(self._options.die_at_boot or "")
        if death is None or death.stage != stage:
            return
        if death.signal is not None:
            os.kill(os.getpid(), death.signal)
            signal.pause()
        if death.in_core:
            self._core_log.fail("core.py:1510", "EngineCore failed to start.")
            self._core_log.fail("core.py:1510", "Traceback (most recent call last):")
        for line in death.text.splitlines():
            (self._core_log if death.in_core else self._log).fail("core.py:1510", line)
        self._die(death.exit_code, death.last_line)

    def _die(self, code: int, last_line: str | None) -> NoReturn:
        if last_line:
            self._log.raw(f"Traceback (most recent call last):\n{last_line}")
        raise Died(code)

    def _arguments(self) -> None:
        self._pass(IMPORTING)
        self._stage("arguments")
        options = self._options
        self._log.say("api_utils.py:327", f"vLLM server version {VERSION}, serving model {options.model}")
        self._log.say("api_utils.py:286", f"non-default args: {options.changed()}")
        if options.log_secret:
            for name in ("HF_TOKEN", "VLLM_API_KEY"):
                self._log.warn("simulator.py:1", f"{name} is {self._env.get(name)}")

    def _bind(self) -> socket.socket:
        self._stage("bind")
        try:
            return bind(self._options)
        except OSError as exc:
            in_use = exc.errno == errno.EADDRINUSE
            text = f"OSError: [Errno {exc.errno}] {'Address already in use' if in_use else exc.strerror}"
            self._die(1, text)

    def _configure(self) -> None:
        options = self._options
        self._pass(CONFIGURING / 2)
        if options.die_at_boot and not DEATHS[options.die_at_boot].in_core:
            self._stage("config")
        workers = tree.worker_titles(options.tensor_parallel_size, options.pipeline_parallel_size)
        self.core = tree.EngineProcess(
            workers=workers,
            ignore_sigterm=options.ignore_sigterm,
            noise_bytes_per_second=options.log_bytes_per_second,
        )
        self._core_log = Log("EngineCore", self.core.start())
        if options.fork_setsid_child:
            tree.start_daemonised_child()
        self._core_log.say(
            "core.py:134", f"Initializing a V1 LLM engine (v{VERSION}) with config: model={options.model!r}"
        )
        self._stage("config")
        self._pass(CONFIGURING / 2)

    def _load(self) -> None:
        options, log = self._options, self._core_log
        log.say("gpu_model_runner.py:5040", f"Starting to load model {options.model}...")
        self._download()
        self._stage("load")
        if options.never_ready:
            while True:
                signal.pause()
        for shard in range(SHARDS + 1):
            if shard:
                self._pass(LOADING / SHARDS)
            log.raw(
                f"Loading safetensors checkpoint shards: {100 * shard // SHARDS:3d}% Completed "
                f"| {shard}/{SHARDS} [00:00<00:00,  4.00it/s]"
            )
        took = options.boot_delay * LOADING
        log.say("default_loader.py:502", f"Loading weights took {took:.2f} seconds")
        log.say("gpu_model_runner.py:5150", f"Model loading took 0.25 GiB memory and {took:.6f} seconds")

    def _download(self) -> None:
        options = self._options
        cache = hub.cache_dir(self._env)
        if not options.download_seconds or cache is None:
            return
        if hub.download(options.model, cache, size=options.download_bytes, seconds=options.download_seconds):
            seconds = f"{options.download_seconds:.6f} seconds"
            self._core_log.say("weight_utils.py:533", f"Time spent downloading weights for {options.model}: {seconds}")

    def _warm_up(self) -> None:
        options, log = self._options, self._core_log
        log.say("backends.py:1105", "Using cache directory: (none) for vLLM's torch.compile")
        self._pass(COMPILING)
        log.say("monitor.py:20", f"torch.compile took {options.boot_delay * COMPILING:.2f} s in total")
        self._stage("memory")
        tokens = options.cache_tokens
        if tokens < options.context_length:
            self._die(1, TOO_SMALL.format(wanted=options.context_length, there=tokens))
        log.say("gpu_worker.py:760", "Available KV cache memory: 4.00 GiB")
        log.say(
            "kv_cache_utils.py:2328",
            f"GPU KV cache size: {tokens:,} tokens, Maximum concurrency for {options.context_length:,} tokens per "
            f"request: {tokens / options.context_length:.2f}x",
        )
        if not options.enforce_eager:
            for graph in range(1, GRAPH_SIZES + 1):
                self._pass(CAPTURING / GRAPH_SIZES)
                log.raw(f"Capturing CUDA graphs (decode, FULL): {graph}/{GRAPH_SIZES} [00:00<00:00, 10.00it/s]")
            seconds = f"{options.boot_delay * CAPTURING:.0f} secs"
            log.say("gpu_model_runner.py:6582", f"Graph capturing finished in {seconds}, took 0.10 GiB")
        took = options.boot_delay * (1 - IMPORTING)
        log.say("core.py:403", f"init engine (profile, create kv cache, warmup model) took {took:.2f} s")
