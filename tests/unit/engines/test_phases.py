"""Log lines to phases: a captured start of a real engine, and the wordings of other releases from their sources."""

from pathlib import Path

import pytest

from vllm_bootstrap.engines import loglines
from vllm_bootstrap.engines.base import Progress
from vllm_bootstrap.engines.phases import PHASES, parse_progress

INFO = "INFO 01-02 03:04:05 [somewhere.py:12] "
LOGS = Path(__file__).resolve().parents[2] / "fixtures/engine_logs"


def test_a_real_start_goes_through_the_phases_in_order():
    lines = (LOGS / "good_start.log").read_text().splitlines()
    seen = [found for line in lines if (found := parse_progress(line)) is not None]
    phases = [progress.phase for progress in seen]
    assert phases == sorted(phases, key=PHASES.index)
    assert list(dict.fromkeys(phases)) == ["boot", "configure", "load", "weights", "profile", "warm_up", "serve"]
    assert [p.fraction for p in seen if p.phase == "weights"] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("line", "phase", "fraction"),
    [
        ("INFO 05-01 12:00:00 [api_server.py:1043] vLLM API server version 0.8.5", "boot", None),
        ("(EngineCore pid=7) " + INFO + "Initializing a V1 LLM engine (v0.9.2) with config: x", "configure", None),
        ("(EngineCore_0 pid=7) " + INFO + "Starting to load model org/x...", "load", None),
        ("Loading model from scratch...", "load", None),
        (INFO + "Time spent downloading weights for org/x: 12.5 seconds", "load", None),
        ("Loading safetensors checkpoint shards:  25% Completed | 1/4 [00:01<00:03,  1.05s/it]", "weights", 0.25),
        ("(Worker_TP0 pid=3) Loading pt checkpoint shards: 100% Completed | 4/4 [00:01<00:00]", "weights", 1.0),
        ("\rLoading safetensors checkpoint shards:   0% Completed | 0/0 [00:00<?, ?it/s]", "weights", None),
        (INFO + "Loading weights took 2.31 seconds", "weights", 1.0),
        (INFO + "Model loading took 14.99 GiB and 3.4 seconds", "weights", 1.0),
        (INFO + "Using cache directory: /c/x for vLLM's torch.compile", "compile", None),
        (INFO + "Dynamo bytecode transform time: 4.2 s", "compile", None),
        (INFO + "Compiling a graph for compile range (1, 8192) takes 9.1 s", "compile", None),
        (INFO + "Directly load the compiled graph(s) from the cache", "compile", None),
        (INFO + "torch.compile takes 12.3 s in total", "compile", None),
        (INFO + "Available KV cache memory: 50.1 GiB", "profile", None),
        (INFO + "GPU KV cache size: 400,000 tokens", "profile", None),
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  50%|###   | 10/20 [00:01<00:01]", "capture", 0.5),
        ("Capturing CUDA graph shapes: 100%|##########| 35/35 [00:20<00:00,  1.70it/s]", "capture", 1.0),
        (INFO + "Graph capturing finished in 3 secs, took 0.5 GiB", "capture", 1.0),
        (INFO + "init engine (profile, create kv cache, warmup model) took 40.2 seconds", "warm_up", None),
        (INFO + "Starting vLLM API server 0 on http://127.0.0.1:8100", "serve", None),
        ("\x1b[32mINFO\x1b[0m:     Application startup complete.", "serve", None),
    ],
)
def test_lines_and_their_phases(line, phase, fraction):
    found = parse_progress(line.lstrip("\r"))
    assert found is not None
    assert (found.phase, found.fraction) == (phase, fraction)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "hello",
        "(APIServer pid=1) WARNING 11-21 08:21:58 [vllm.py:1703] Enforce eager set, disabling torch.compile",
        "(Worker_TP1 pid=3) INFO 01-02 03:04:05 [gpu_model_runner.py:2] Starting to load model org/x...",
        "(Worker_PP1_TP0 pid=3) Loading safetensors checkpoint shards:  25% Completed | 1/4 [00:01<00:03,  1.05s/it]",
        "a user wrote: Application startup complete.",
        'INFO:      - "GET /health HTTP/1.1" 200 OK',
    ],
)
def test_lines_that_say_nothing(line):
    assert parse_progress(line) is None


def test_details_are_short():
    short = parse_progress("vLLM server version 0.32.0, serving model m")
    assert short == Progress("boot", None, "vLLM server version 0.32.0, serving model m")
    assert parse_progress(f"vLLM server version 0.32.0, serving model {'m' * 200}").detail is None


def test_decoration_is_taken_off():
    line = loglines.parse("(EngineCore pid=12) ERROR 11-21 08:24:21 [core.py:1510] ValueError: x  ")
    assert line == loglines.LogLine("ValueError: x", "EngineCore", "ERROR")
    assert loglines.parse("INFO:     up") == loglines.LogLine("up", None, "INFO")
    assert len(loglines.parse("x" * 100_000).text) == loglines.MAX_LINE
