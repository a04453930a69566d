"""The simulator's options: one frozen value, from which its command line and the launch knobs are derived.

Invariant: an option exists once, here; the parser, the check of a launch's ``extra_args`` and the list of knobs in
the docs come from it. It must not know how an option works. The daemon imports this module: keep it light.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from vllm_bootstrap.engines.simulator.deaths import DEATHS
from vllm_bootstrap.engines.simulator.stepcost import BadProfile, Profile, profile_of
from vllm_bootstrap.errors import BadRequest, UnknownField

T = TypeVar("T")
PROFILES = ("vllm-cpu-tiny", "h200-8b")
PROFILE_FOLDER = Path(__file__).parent / "profiles"
TASKS = ("generate", "embed", "score", "transcription", "realtime")
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)([kKmMgG]?)")


def _option(default: T, text: str, *, choices: tuple[str, ...] = (), knob: bool = True) -> T:
    """A field with its help. ``knob``: a launch may set it through ``extra_args``."""
    metadata = {"help": text, "choices": choices, "knob": knob}
    made: T = field(default=default, metadata=metadata)
    return made


def _vllm(default: T, text: str) -> T:
    """An option under vLLM's own name; a launch sets it through its typed fields."""
    return _option(default, text, knob=False)


@dataclass(frozen=True, slots=True)
class Options:
    """Times in seconds, sizes in bytes. ``None`` or 0 turns a behaviour off, unless its help says otherwise."""

    model: str = _vllm("", "model name, only shown")
    served_model_name: tuple[str, ...] = _vllm((), "names that requests may use (default: the model)")
    uds: str | None = _vllm(None, "listen on this Unix socket instead of host and port")
    host: str = _vllm("127.0.0.1", "address to listen on")
    port: int = _vllm(8000, "port to listen on, 0 for any")
    tensor_parallel_size: int = _vllm(1, "number of pretended workers")
    pipeline_parallel_size: int = _vllm(1, "multiplies the number of workers")
    max_num_seqs: int = _vllm(32, "sequences that run at once")
    max_model_len: str = _vllm("32768", "context length in tokens; 8k and auto are understood")
    shutdown_timeout: float = _vllm(0.0, "seconds to let running requests finish on SIGTERM")
    scheduling_policy: str = _vllm("priority", "fcfs ignores priorities")
    dtype: str = _vllm("auto", "only shown")
    gpu_memory_utilization: float = _vllm(0.9, "only shown")
    kv_cache_memory_bytes: int | None = _vllm(None, "only shown")
    max_num_batched_tokens: int | None = _vllm(None, "tokens of one step (with a profile; default: the profile's)")
    long_prefill_token_threshold: int = _option(0, "of them for one prompt, unless it is all there is (0: no limit)")
    quantization: str | None = _vllm(None, "only shown")
    kv_cache_dtype: str = _vllm("auto", "only shown")
    revision: str | None = _vllm(None, "only shown")
    tokenizer: str | None = _vllm(None, "only shown")
    seed: str | None = _vllm(None, "only shown")
    enforce_eager: bool = _vllm(False, "leave out the phase of graph capturing")
    enable_sleep_mode: bool = _vllm(False, "have the routes that put it to sleep")
    enable_prefix_caching: bool = _vllm(True, "remember the KV blocks of prompts (with a profile)")

    tasks: str = _option("all", f"comma list of what it can do: {', '.join(TASKS)}")
    tokens_per_second: float = _option(100.0, "speed of each sequence, 0 for at once; without a profile")
    prefill_tokens_per_second: float = _option(20_000.0, "speed of reading a prompt, likewise")
    profile: str | None = _option(
        None, f"batch as vLLM does, in the time of this engine: {', '.join(PROFILES)}, or a JSON file (not at launch)"
    )
    num_gpu_blocks_override: int = _option(0, "KV blocks, instead of the profile's")
    embedding_size: int = _option(32, "dimensions of embeddings")
    keep_alive_timeout: float = _option(5.0, "idle connections are closed after so many seconds")
    health_delay: float = _option(0.0, "seconds before /health answers")
    echo_headers: bool = _option(False, "serve what was received under /debug/last_request and /debug/requests")

    boot_delay: float = _option(0.0, "seconds from start to ready, spread over vLLM's phases")
    download_seconds: float = _option(0.0, "pretend a download into HF_HOME for so long")
    download_bytes: int = _option(4 * 1024 * 1024, "size of that download")
    never_ready: bool = _option(False, "stay in the loading phase for ever")
    die_at_boot: str | None = _option(None, "fail while starting, as the named class does", choices=tuple(DEATHS))
    log_bytes_per_second: int = _option(0, "noise in the log")
    log_secret: bool = _option(False, "print HF_TOKEN and VLLM_API_KEY to the log, as careless code does")
    mock_memory_bytes: int = _option(0, "memory to claim on each mock GPU while running")
    mock_memory_file: str | None = _option(None, "JSON file that holds the use of mock GPUs", knob=False)

    sleep_seconds: float = _option(0.0, "seconds that falling asleep takes")
    sleep_frees: float = _option(0.95, "part of mock_memory_bytes that a sleep gives up, 0 to 1")
    wake_seconds: float = _option(0.0, "seconds that waking takes")
    wake_fails: str | None = _option(
        None, "waking answers with an error, never, or leaves garbage", choices=("error", "hang", "garbled")
    )

    crash_after_requests: int = _option(0, "exit with 1 after so many answered requests, leaving children behind")
    exit_zero_after: int = _option(0, "lose the engine process after so many answered requests, then exit with 0")
    poison: str | None = _option(None, "lose the engine process when a request holds this text, then exit with 0")
    hang_after: int = _option(0, "stop producing tokens after so many accepted requests; /health stays 200")
    ignore_sigterm: bool = _option(False, "only SIGKILL ends it")
    slow_stop: float = _option(0.0, "seconds that stopping takes")
    fork_setsid_child: bool = _option(False, "start a daemonised child in a session of its own")

    @property
    def names(self) -> tuple[str, ...]:
        return self.served_model_name or (self.model,)

    @property
    def context_length(self) -> int:
        """``max_model_len`` as a number. Raises ``ValueError``."""
        if self.max_model_len == "auto":
            return 32768
        match = _LENGTH.fullmatch(self.max_model_len)
        if match is None:
            raise ValueError(f"not a length: {self.max_model_len!r}")
        factor = {"": 1, "k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2, "g": 1000**3, "G": 1024**3}[match[2]]
        return max(1, int(float(match[1]) * factor))

    @property
    def task_set(self) -> frozenset[str]:
        return frozenset(TASKS if self.tasks == "all" else self.tasks.split(","))

    def load_profile(self) -> Profile | None:
        """The profile that was asked for, read. Raises ``OSError`` and ``BadProfile``."""
        if self.profile is None:
            return None
        shipped = self.profile in PROFILES
        return profile_of((PROFILE_FOLDER / f"{self.profile}.json" if shipped else Path(self.profile)).read_text())

    @property
    def cache_tokens(self) -> int:
        """Tokens that fit into the KV cache; without a profile always enough."""
        profile = self.load_profile()
        if profile is None:
            return self.context_length * self.max_num_seqs
        return (self.num_gpu_blocks_override or profile.kv_blocks) * profile.block_size

    def changed(self) -> dict[str, object]:
        """What differs from the defaults, as vLLM shows it at start."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


FIELDS: Mapping[str, Field[Any]] = {f.name: f for f in fields(Options)}
KNOBS: Mapping[str, Field[Any]] = {name: f for name, f in FIELDS.items() if f.metadata["knob"]}
_OURS_TO_SET = {
    "model",
    "served_model_name",
    "uds",
    "host",
    "port",
    "shutdown_timeout",
    "scheduling_policy",
    "enable_sleep_mode",
}


def _base_type(option: Field[Any]) -> str:
    # The annotations are text (postponed evaluation); an optional value is its type or absent.
    return str(option.type).removesuffix(" | None")


def parser() -> argparse.ArgumentParser:
    """The command line. Unknown flags and abbreviations are refused with exit code 2, as in vLLM."""
    made = argparse.ArgumentParser(
        prog="simulator", description="A pretended OpenAI-shaped engine.", allow_abbrev=False
    )
    for name, option in FIELDS.items():
        flags = [f"--{name.replace('_', '-')}"]
        kind, text = _base_type(option), option.metadata["help"].replace("%", "%%")
        if kind == "bool":
            made.add_argument(*flags, action=argparse.BooleanOptionalAction, default=option.default, help=text)
        elif kind.startswith("tuple"):
            made.add_argument(*flags, nargs="+", action="extend", help=text)
        else:
            made.add_argument(
                *flags,
                type={"int": _positive(int), "float": _positive(float)}.get(kind, str),
                choices=option.metadata["choices"] or None,
                default=option.default,
                required=name == "model",
                help=text,
            )
    return made


def _positive(kind: type[int | float]) -> Any:
    def convert(text: str) -> int | float:
        value = kind(text)
        if not 0 <= value < float("inf"):
            raise ValueError(text)
        return value

    convert.__name__ = kind.__name__  # argparse names the type in its message
    return convert


def parse(argv: Sequence[str]) -> Options:
    """Options from a command line. Exits with 2 and a message on stderr when it is wrong."""
    made = parser()
    values = vars(made.parse_args(argv))
    values["served_model_name"] = tuple(values["served_model_name"] or ())
    options = Options(**values)
    try:
        unknown = options.task_set - set(TASKS)
        if unknown or options.context_length < 1:
            raise ValueError(f"not a task: {', '.join(sorted(unknown))}")
        _check_profile(options)
    except (ValueError, OSError) as exc:
        made.error(str(exc))
    if not options.max_num_seqs or not options.tensor_parallel_size or not options.pipeline_parallel_size:
        made.error("--max-num-seqs and parallel sizes must be at least 1")
    return options


def _check_profile(options: Options) -> None:
    try:
        profile = options.load_profile()
    except BadProfile as exc:
        raise ValueError(f"--profile {options.profile}: {exc}") from None
    if profile is None and options.num_gpu_blocks_override:
        raise ValueError("--num-gpu-blocks-override needs --profile")
    if not 0 <= options.long_prefill_token_threshold <= options.context_length:
        raise ValueError("--long-prefill-token-threshold must be between 0 and --max-model-len")
    if profile is not None and options.max_num_batched_tokens == 0:
        raise ValueError("--max-num-batched-tokens must be at least 1")


def launch_arguments(extra: Mapping[str, Any]) -> tuple[str, ...]:
    """A launch's ``extra_args`` as arguments. Names may be written with ``-`` or ``_``.

    Raises ``UnknownField`` for what is no knob and ``BadRequest`` for a value of the wrong type, naming the field.
    """
    made: list[str] = []
    for given, value in extra.items():
        name = given.removeprefix("--").replace("-", "_")
        if name not in KNOBS:
            known = ", ".join(sorted(KNOBS))
            raise UnknownField(f"the simulator has no knob {given!r}; it has {known}", param=f"extra_args.{given}")
        made.append(_argument(given, KNOBS[name], value))
    return tuple(made)


def _argument(given: str, option: Field[Any], value: Any) -> str:
    flag = option.name.replace("_", "-")
    kind, choices = _base_type(option), option.metadata["choices"]
    if kind == "bool" and isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if kind in ("int", "float") and isinstance(value, int | float) and not isinstance(value, bool):
        whole = kind == "float" or isinstance(value, int)
        if whole and 0 <= value < float("inf"):
            return f"--{flag}={value}"
    if kind == "str" and isinstance(value, str) and (not choices or value in choices) and _fits(option.name, value):
        return f"--{flag}={value}"
    wanted = f"one of {', '.join(choices)}" if choices else {"str": "text", "bool": "true or false"}.get(kind, kind)
    raise BadRequest(f"{given!r} must be {wanted}, not {value!r}", param=f"extra_args.{given}")


def _fits(name: str, value: str) -> bool:
    if name == "profile":
        return value in PROFILES  # files are for the command line: a launch must not have the engine read any
    return name != "tasks" or value == "all" or set(value.split(",")) <= set(TASKS)


def field_arguments(given: Mapping[str, Any]) -> tuple[str, ...]:
    """A launch's typed engine fields as arguments; None is left out.

    Raises ``UnknownField`` for a field the simulator does not have.
    """
    made: list[str] = []
    for name, value in given.items():
        option = FIELDS.get(name)
        if option is None or option.metadata["knob"] or name in _OURS_TO_SET:
            raise UnknownField(f"the simulator does not take {name!r}", param=name)
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            made.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            made.append(f"--{flag}={value}")
    return tuple(made)
