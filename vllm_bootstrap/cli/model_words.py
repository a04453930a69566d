"""Models in words: rows of the list, one in detail, what fits, what lies on the disk."""

from __future__ import annotations

from datetime import datetime

from vllm_bootstrap import wording
from vllm_bootstrap.cli import model_progress, output, text
from vllm_bootstrap.wire_models import AdapterInfo, FitInfo, ModelFiles, ModelStatus

HEADER = ("NAME", "STATE", "REQUESTS", "IDLE", "LOADS IN", "SOURCE")
SPARE = ("LOADS IN", "IDLE", "SOURCE")
ADAPTER_HEADER = ("NAME", "BASE", "RANK", "SIZE", "OWNER", "AGE")
_TELLING = frozenset({"loading", "waking", "failed", "unresponsive"})


def row(status: ModelStatus) -> list[str]:
    loads_in = text.duration(status.load_est_s) if status.load_est_s is not None else "-"
    idle = text.duration(status.idle_s) if status.idle_s is not None and status.launches else "-"
    return [status.name, state_of(status), requests_of(status) or "-", idle, loads_in, status.entry.source]


def state_of(status: ModelStatus) -> str:
    """The state, with what makes it more than a word."""
    state = wording.words(status.state)
    if status.state in {"loading", "waking"} and (look := model_progress.of_load(status)).fraction is not None:
        return f"{state} {text.percent(look.fraction)}"
    if status.state == "failed" and status.failure is not None:
        return f"{state} ({wording.words(status.failure.failure_class)})"
    return f"{state}, outdated" if status.outdated else state


def requests_of(status: ModelStatus) -> str:
    """What runs there and what waits for it."""
    waiting = sum(status.waiting.values())
    parts = (
        f"{status.in_flight} running" if status.in_flight else "",
        f"{waiting} waiting" if waiting else "",
        f"{status.batch_lines} batch lines" if status.batch_lines else "",
    )
    return ", ".join(part for part in parts if part)


def show(status: ModelStatus) -> None:
    """One model in detail."""
    entry, failure = status.entry, status.failure
    output.say(
        f"{output.styled(status.name, 'bold')}  {output.styled(state_of(status), output.style_of(status.state))}"
    )
    gpus = entry.gpus
    output.pairs([
        ("because", status.why or ""),
        ("progress", model_progress.of_load(status).rest if status.state in _TELLING else ""),
        ("requests", requests_of(status)),
        ("launches", ", ".join(f"{one.launch_id} ({one.state})" for one in status.launches)),
        ("loaded", _moment(status.loaded_at)),
        ("loads in", text.duration(status.load_est_s) if status.load_est_s is not None else ""),
        ("wakes in", text.duration(status.wake_est_s) if status.wake_est_s is not None else ""),
        ("source", entry.source + (f" at {entry.revision}" if entry.revision else "")),
        ("from", {"file": "the catalogue's file", "runtime": "models add", "setting": "MODEL_ID",
                  "request": "a request"}[status.origin]),
        ("aliases", ", ".join(entry.aliases)),
        ("adapters", ", ".join(entry.adapters)),
        ("engine", entry.engine or ""),
        ("arguments", ", ".join(f"{name}={value}" for name, value in {**entry.args, **entry.extra_args}.items())),
        ("GPUs", ", ".join(str(one) for one in gpus.ids) if gpus.ids else str(gpus.count or "")),
        ("GPU share", text.percent(gpus.share) if gpus.share is not None else ""),
        ("replicas", str(entry.replicas) if entry.replicas != 1 else ""),
        ("unloaded after", text.duration(entry.ttl) if entry.ttl else ""),
        ("kept", "pinned" if entry.pin else ""),
        ("priority", str(entry.priority or "")),
        ("about", entry.description or ""),
    ])  # fmt: skip
    if failure is not None:
        output.note(f"  {failure.message}")
        if failure.hint:
            output.note(f"  Hint: {failure.hint}")
        if failure.launch_id:
            output.note(f"  Log:  vllm-bootstrap logs {failure.launch_id}")


def fit(name: str, info: FitInfo) -> None:
    """Whether a model fits, and what would."""
    verdict = {True: ("fits", "green"), False: ("does not fit", "red"), None: ("unclear", "yellow")}[info.fits]
    output.say(f"{name}  {output.styled(*verdict)}: {info.why}")
    context = f"{info.max_tokens_in_cache} tokens at once" if info.max_tokens_in_cache is not None else ""
    output.pairs([
        ("GPUs", str(info.gpu_count or "")),
        ("weights", _bytes(info.weights_bytes)),
        ("cache", context + (f", {_bytes(info.kv_bytes_per_token)} each" if info.kv_bytes_per_token else "")),
        ("overhead", _bytes(info.overhead_bytes)),
        ("may use", _bytes(info.budget_bytes)),
        ("free now", _bytes(info.free_bytes)),
        ("longest context", str(info.max_model_len or "")),
    ])  # fmt: skip
    for one in info.suggestions:
        output.note(f"  {one.get('message') or one}")


def files(found: ModelFiles) -> str:
    """What lies on the disk, in one line."""
    if not found.bytes and not found.incomplete_bytes:
        return "nothing on the disk"
    whole = {True: "", False: ", incomplete", None: ""}[found.complete]
    cached = f", {text.size(found.cached_bytes)} of it in memory" if found.cached_bytes else ""
    return f"{text.size(found.bytes)} on the disk{whole}{cached}"


def adapter_row(info: AdapterInfo) -> list[str]:
    rank = "-" if info.rank is None else str(info.rank)
    return [info.name, info.base, rank, text.size(info.bytes), info.owner, text.age(info.created_at)]


def _bytes(count: int | None) -> str:
    return "" if count is None else text.size(count)


def _moment(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M:%S}Z"
