"""What a line of vLLM's log says about its start. PURE and best effort: never readiness, never a reason to act.

Wording differs between releases; the patterns hold the stable core of each line (0.8 to 0.33). Lines that say nothing
give None, and of several workers only the first is listened to, so that phases do not jump back and forth.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vllm_bootstrap.engines import loglines
from vllm_bootstrap.engines.base import Progress

# In the order in which a start goes through them.
PHASES: Sequence[str] = ("boot", "configure", "load", "weights", "compile", "profile", "capture", "warm_up", "serve")

# Bars are written without decoration of their own and may be glued behind that of another line.
_SHARDS = re.compile(r"Loading \S+ checkpoint shards:\s.*?(\d+)/(\d+) \[")
_CAPTURE = re.compile(r"Capturing CUDA graphs?\b.*?(\d+)/(\d+) \[")

_LINES: Sequence[tuple[str, re.Pattern[str]]] = (
    ("boot", re.compile(r"vLLM (?:API )?server version \S+")),
    ("configure", re.compile(r"Initializing an? (?:V\d )?LLM engine \(v")),
    ("load", re.compile(r"Starting to load model |Loading model from scratch|Time spent downloading weights ")),
    ("weights", re.compile(r"Loading weights took [\d.]+ |Model loading took [\d.]+ ")),
    (
        "compile",
        re.compile(
            r"Starting torch\.compile|torch\.compile takes? |torch\.compile took |Dynamo bytecode transform |"
            r"Compiling a graph for |Directly load the (?:compiled|\d+-th) |Cache the graph |"
            r"Using cache directory: .* for vLLM's torch\.compile|Initial profiling/warmup run took "
        ),
    ),
    ("profile", re.compile(r"Available KV cache memory: |(?:GPU |CPU )?KV cache size: |Memory profiling takes ")),
    ("capture", re.compile(r"Graph capturing finished in ")),
    ("warm_up", re.compile(r"init engine \(profile, create kv cache, warmup model\) took ")),
    ("serve", re.compile(r"Starting vLLM (?:API )?server|Supported tasks: |Application startup complete")),
)
_FINISHED = re.compile(r"Loading weights took |Model loading took |Graph capturing finished ")


def parse_progress(line: str) -> Progress | None:
    """The phase that ``line`` belongs to, with the fraction of it where the line says so."""
    parsed = loglines.parse(line)
    if parsed.is_repetition:
        return None
    for phase, bar in (("weights", _SHARDS), ("capture", _CAPTURE)):
        match = bar.search(parsed.text)
        if match is not None:
            done, total = int(match[1]), int(match[2])
            return Progress(phase, min(1.0, done / total) if total else None, f"{done} of {total}")
    for phase, pattern in _LINES:
        if pattern.match(parsed.text):
            return Progress(phase, 1.0 if _FINISHED.match(parsed.text) else None, _detail(parsed.text))
    return None


def _detail(text: str) -> str | None:
    """The line itself where it is short enough to be shown."""
    return text if len(text) <= 160 else None
