"""Deaths explained. Captured logs of a real vLLM 0.32.0 decide; what was not captured is listed as unverified."""

from pathlib import Path

import pytest

from vllm_bootstrap.engines.base import ExitFacts, FailureClass
from vllm_bootstrap.engines.causes import CAUSES
from vllm_bootstrap.engines.failures import MAX_TELLING, explain

LOGS = Path(__file__).resolve().parents[2] / "fixtures/engine_logs"

# Captured log, exit code seen, class, permanent, cause.
CAPTURED = [
    ("bad_flag", 2, FailureClass.BAD_FLAG, True, "bad flag"),
    ("bad_value", 2, FailureClass.BAD_FLAG, True, "bad flag"),
    ("bad_model_path", 1, FailureClass.MODEL_NOT_FOUND, True, "model not found"),
    ("no_config", 1, FailureClass.MODEL_NOT_FOUND, True, "model not found"),
    ("bad_repo_offline", 1, FailureClass.MODEL_NOT_FOUND, True, "downloads turned off"),
    ("bad_repo_online", 1, FailureClass.MODEL_NOT_FOUND, False, "hub unreachable"),
    ("no_weights", 1, FailureClass.MODEL_NOT_FOUND, True, "incomplete model"),
    ("no_tokenizer", 1, FailureClass.MODEL_NOT_FOUND, True, "incomplete model"),
    ("corrupt_weights", 1, FailureClass.MODEL_NOT_FOUND, True, "damaged weights"),
    ("kv_too_small", 1, FailureClass.KV_CACHE_TOO_SMALL, True, "KV cache too small"),
    ("kv_none_at_all", 1, FailureClass.KV_CACHE_TOO_SMALL, True, "no KV cache"),
    ("cpu_memory", 1, FailureClass.GPU_OUT_OF_MEMORY, False, "host memory too small"),
    ("port_in_use", 1, FailureClass.ADDRESS_IN_USE, False, "address in use"),
    ("uds_in_use", 1, FailureClass.ADDRESS_IN_USE, False, "address in use"),
    ("unknown_architecture", 1, FailureClass.INCOMPATIBLE_LIBRARY, True, "unknown architecture"),
    ("serve_no_metadata", 1, FailureClass.INCOMPATIBLE_LIBRARY, True, "not the vllm distribution"),
    ("max_len_too_large", 1, FailureClass.BAD_FLAG, True, "max_model_len too large"),
    ("heads_not_divisible", 1, FailureClass.BAD_FLAG, True, "heads not divisible"),
    ("bad_quant", 1, FailureClass.BAD_FLAG, True, "bad configuration"),
    ("engine_killed_boot", 1, FailureClass.ENGINE_DIED, False, None),
]

# Wordings from the sources or from public reports, never seen here: they need a GPU, a gated account or old releases.
UNVERIFIED = [
    (
        "KV cache too small, old wording",
        FailureClass.KV_CACHE_TOO_SMALL,
        (
            "ValueError: The model's max seq len (32768) is larger than the maximum number of tokens that can be "
            "stored in KV cache (13664). Try increasing `gpu_memory_utilization`"
        ),
    ),
    (
        "GPU already in use",
        FailureClass.GPU_OUT_OF_MEMORY,
        (
            "ValueError: Free memory on device cuda:0 (10.3/79.11 GiB) on startup is less than desired GPU memory "
            "utilization (0.9, 71.2 GiB)."
        ),
    ),
    (
        "GPU out of memory",
        FailureClass.GPU_OUT_OF_MEMORY,
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB.",
    ),
    (
        "memory changed while measuring",
        FailureClass.GPU_OUT_OF_MEMORY,
        "AssertionError: Error in memory profiling. Initial free memory 70 GiB, current free memory 72 GiB.",
    ),
    (
        "too few GPUs",
        FailureClass.TOO_FEW_GPUS,
        "ValueError: World size (4) is larger than the number of available GPUs (2) in this node.",
    ),
    (
        "gated repository",
        FailureClass.GATED_REPOSITORY,
        "huggingface_hub.errors.GatedRepoError: 401 Client Error. Cannot access gated repo for url https://hub/x",
    ),
    (
        "model not downloaded",
        FailureClass.MODEL_NOT_FOUND,
        "huggingface_hub.errors.LocalEntryNotFoundError: An error happened while trying to locate the files on the Hub",
    ),
    (
        "token refused",
        FailureClass.GATED_REPOSITORY,
        "huggingface_hub.errors.HfHubHTTPError: 401 Client Error: Unauthorized for url: https://hub/api",
    ),
    (
        "tokenizer library",
        FailureClass.INCOMPATIBLE_LIBRARY,
        "AttributeError: Qwen2Tokenizer has no attribute all_special_tokens_extended.",
    ),
    (
        "tqdm library",
        FailureClass.INCOMPATIBLE_LIBRARY,
        "TypeError: tqdm.asyncio.tqdm_asyncio.__init__() got multiple values for keyword argument 'disable'",
    ),
    (
        "driver too old",
        FailureClass.INCOMPATIBLE_LIBRARY,
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12020).",
    ),
    ("broken import", FailureClass.INCOMPATIBLE_LIBRARY, "ImportError: cannot import name 'x' from 'y'"),
    (
        "engine too slow",
        FailureClass.START_TIMEOUT,
        "RuntimeError: Timed out waiting for engine core processes to start.",
    ),
    ("disk full", FailureClass.ENGINE_DIED, "OSError: [Errno 28] No space left on device"),
]


def log(name):
    return (LOGS / f"{name}.log").read_text().splitlines()


def died(lines, *, exit_code=1, signal=None, ready=False):
    return explain(ExitFacts(exit_code, signal, ready), lines)


@pytest.mark.parametrize(("name", "exit_code", "kind", "permanent", "cause"), CAPTURED)
def test_captured_deaths(name, exit_code, kind, permanent, cause):
    failure = died(log(name), exit_code=exit_code)
    assert failure.failure_class is kind
    assert failure.permanent == permanent
    assert failure.exit_code == exit_code
    assert failure.hint
    assert failure.lines
    assert len(failure.lines) <= MAX_TELLING
    if cause is not None:
        pattern = next(c.pattern for c in CAUSES if c.name == cause)
        assert any(pattern.search(line) for line in failure.lines), "the line that names the cause is shown"


@pytest.mark.parametrize(("cause", "kind", "line"), UNVERIFIED)
def test_wordings_that_were_not_captured(cause, kind, line):
    prefix = "(EngineCore pid=9) ERROR 01-02 03:04:05 [core.py:1] "
    failure = died(
        ["INFO 01-02 03:04:05 [a.py:1] calm", prefix + line, "RuntimeError: Engine core initialization failed"]
    )
    assert failure.failure_class is kind
    first = next(c for c in CAUSES if c.pattern.search(line))
    assert first.name == cause
    assert failure.permanent == first.permanent


def test_every_cause_is_either_captured_or_marked_as_unverified():
    captured = {cause for *_, cause in CAPTURED if cause}
    unverified = {cause for cause, *_ in UNVERIFIED}
    assert captured | unverified == {cause.name for cause in CAUSES}
    assert not captured & unverified


def test_the_hint_names_the_length_that_fits():
    assert "max_model_len 384 or less" in died(log("kv_too_small")).hint
    assert "max_model_len 2048 or less" in died(log("max_len_too_large")).hint
    old = died([UNVERIFIED[0][2]])
    assert "max_model_len 13664 or less" in old.hint


@pytest.mark.parametrize("longest", ["0", None])
def test_no_length_is_suggested_where_none_fits(longest):
    line = "ValueError: To serve at least one request with the models's max seq len (2048), 1 GiB is needed"
    line += f", the estimated maximum model length is {longest}." if longest else "."
    assert "Give the launch more memory" in died([line]).hint


def test_a_length_limit_that_cannot_be_read():
    line = "Value error, User-specified max_model_len (9) is greater than the derived max_model_len (unknown)"
    assert "max_model_len a smaller one" in died([line]).hint


@pytest.mark.parametrize("name", ["engine_killed", "worker_killed"])
def test_an_engine_that_dies_in_service_with_exit_code_0_has_died(name):
    failure = died(log(name), exit_code=0, ready=True)
    assert failure.failure_class is FailureClass.ENGINE_DIED
    assert "exit code 0 while it was serving" in failure.message
    assert not failure.permanent
    assert any("EngineDeadError" in line for line in failure.lines)


def test_calm_lines_are_no_causes():
    calm = "(APIServer pid=1) WARNING 11-21 08:24:03 [a.py:1] fails with `OSError: [Errno 98] Address already in use`"
    source = '(EngineCore pid=1) ERROR 11-21 08:24:03 [a.py:1]     raise RepositoryNotFoundError("x")'
    failure = died([calm, source, "INFO:     GatedRepoError"])
    assert failure.failure_class is FailureClass.ENGINE_DIED


def test_causes_of_failed_starts_are_not_looked_for_in_service():
    failure = died(["ERROR 01-02 03:04:05 [a.py:1] prompt: RepositoryNotFoundError secret"], exit_code=0, ready=True)
    assert failure.failure_class is FailureClass.ENGINE_DIED
    assert "secret" not in failure.message


def test_running_out_of_memory_in_service():
    failure = died(
        ["ERROR 01-02 03:04:05 [a.py:1] torch.OutOfMemoryError: CUDA out of memory. secret prompt"], ready=True
    )
    assert failure.failure_class is FailureClass.GPU_OUT_OF_MEMORY
    assert "secret" not in failure.message


@pytest.mark.parametrize(
    ("number", "name", "advice"),
    [
        (9, "SIGKILL", "out-of-memory killer"),
        (11, "SIGSEGV", "native code"),
        (7, "SIGBUS", "/dev/shm"),
        (15, "SIGTERM", "outside"),
        (63, "signal 63", "outside"),
    ],
)
def test_signals(number, name, advice):
    failure = died(["last words"], exit_code=None, signal=number, ready=True)
    assert failure.failure_class is FailureClass.KILLED_BY_SIGNAL
    assert f"ended by {name} while it was serving" in failure.message
    assert advice in failure.hint
    assert failure.signal == number
    assert failure.lines == ("last words",)


def test_a_cause_in_the_log_says_more_than_the_signal():
    assert (
        died(["torch.OutOfMemoryError: CUDA out of memory"], exit_code=None, signal=6).failure_class
        is FailureClass.GPU_OUT_OF_MEMORY
    )


def test_an_unknown_death_before_readiness_shows_the_root():
    lines = [
        "(Worker pid=1) ERROR 01-02 03:04:05 [a.py:1] KeyError: 'rope'",
        "Exception: WorkerProc initialization failed due to x",
    ]
    failure = died(lines)
    assert failure.message == "The engine ended by itself with exit code 1 before it was ready. KeyError: 'rope'"
    assert failure.lines == ("KeyError: 'rope'", "Exception: WorkerProc initialization failed due to x")


def test_a_death_without_words():
    failure = died([], exit_code=None)
    assert "unknown exit code" in failure.message
    assert failure.lines == ()


def test_many_exceptions_are_cut_in_the_middle():
    lines = [f"Error{n}Error: {n}" for n in range(40)]
    shown = died(lines).lines
    assert len(shown) == MAX_TELLING
    assert (shown[0], shown[-1]) == (lines[0], lines[-1])


def test_an_engine_that_died_asleep_was_not_serving():
    failure = explain(ExitFacts(None, 9, was_ready=True, asleep=True), [])
    assert failure.message == "The engine was ended by SIGKILL while it slept."
