"""Commands about launches: ``launch``, ``ps``, ``status``, ``stop``, ``rm``."""

from __future__ import annotations

import json
from typing import Annotated, Any, cast

import typer

from vllm_bootstrap import wording
from vllm_bootstrap.cli import groups, loads, output, progress, text
from vllm_bootstrap.cli.options import AsJson, Key, LaunchName, Url, UsageError, connect, resolve
from vllm_bootstrap.client import Client, LaunchFailed, LaunchFields
from vllm_bootstrap.ids import is_group_id
from vllm_bootstrap.wire import LaunchGroup, LaunchRequest, LaunchStatus, StopResult

# Fields of a launch request with options of their own, or that no single value can say.
NOT_BY_ARG = {"model", "gpu_ids", "extra_args", "env", "labels", "restart", "replicas"}

Wait = Annotated[bool, typer.Option("--wait", help="Wait until it is ready, showing phases.")]
Timeout = Annotated[
    float | None, typer.Option("--timeout", metavar="SECONDS", help="With --wait: stop waiting (it goes on starting).")
]
GpuIds = Annotated[
    list[str] | None, typer.Option("--gpu", metavar="GPU", help="Index or UUID of a GPU to take; repeatable.")
]
GpuCount = Annotated[int | None, typer.Option("--gpus", metavar="N", min=1, help="How many GPUs to take.")]
GpuShare = Annotated[
    float | None, typer.Option("--gpu-share", metavar="0-1", help="Share of each GPU, so that others fit beside it.")
]
ServedName = Annotated[
    str | None, typer.Option("--served-model-name", metavar="NAME", help="The name that requests use.")
]
EngineName = Annotated[
    str | None, typer.Option("--engine", metavar="NAME", help="vllm, simulator, or one that the operator defined.")
]
MaxModelLen = Annotated[
    str | None, typer.Option("--max-model-len", metavar="TOKENS", help="Longest context; 'auto' for what fits.")
]
TensorParallel = Annotated[
    int | None, typer.Option("--tensor-parallel-size", "--tp", metavar="N", min=1, help="GPUs for each layer.")
]
Arguments = Annotated[
    list[str] | None, typer.Option("--arg", metavar="NAME=VALUE", help="Any other engine option; repeatable.")
]
Environment = Annotated[
    list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="Environment of the engine; repeatable.")
]
Labels = Annotated[list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="A label; repeatable.")]
Restart = Annotated[str | None, typer.Option("--restart", metavar="POLICY", help="never (default) or on-failure.")]


def launch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face name or a local path.")],
    *,
    wait: Wait = False,
    timeout: Timeout = None,
    gpu: GpuIds = None,
    gpus: GpuCount = None,
    gpu_share: GpuShare = None,
    served_model_name: ServedName = None,
    engine: EngineName = None,
    max_model_len: MaxModelLen = None,
    tensor_parallel_size: TensorParallel = None,
    arg: Arguments = None,
    env: Environment = None,
    label: Labels = None,
    restart: Restart = None,
    replicas: groups.ReplicasOption = None,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Launch a model."""
    typed, extra = engine_options(arg or [])
    fields: dict[str, Any] = {
        "gpu_ids": [int(item) if item.isdigit() else item for item in gpu or []] or None,
        "gpu_count": gpus,
        "gpu_share": gpu_share,
        "served_model_name": served_model_name,
        "engine": engine,
        "max_model_len": int(max_model_len) if max_model_len and max_model_len.isdigit() else max_model_len,
        "tensor_parallel_size": tensor_parallel_size,
        "restart": restart,
        "extra_args": extra or None,
        "env": as_pairs("--env", env or []) or None,
        "labels": as_pairs("--label", label or []) or None,
        **typed,
    }
    with connect(url, key) as client:
        started = client.launch(model, replicas=groups.as_replicas(replicas), **cast("LaunchFields", fields))
        if isinstance(started, LaunchGroup):
            groups.tell_launched(client, started, wait=wait, timeout=timeout, as_json=as_json)
        elif wait:
            _wait(client, started, timeout, as_json=as_json)
        elif as_json:
            output.emit(started)
        elif output.on_terminal():
            output.say(f"Launching {started.model} on {gpus_of(started)}: {started.launch_id}")
            output.say(f"  vllm-bootstrap status {started.launch_id}")
        else:
            output.say(started.launch_id)


def _wait(client: Client, started: LaunchStatus, timeout: float | None, *, as_json: bool) -> None:
    try:
        if as_json:
            output.emit(client.wait_ready(started.launch_id, timeout_s=timeout))
            return
        if output.on_terminal():
            output.say(f"Launching {started.model} on {gpus_of(started)}: {started.launch_id}")
        with progress.shown() as on_progress:
            ready = client.wait_ready(started.launch_id, timeout_s=timeout, on_progress=on_progress)
    except LaunchFailed as exc:
        if as_json:
            output.emit(exc.status)
        else:
            progress.tell_failure(exc.status)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        output.note(f"\nIt goes on starting. To end it: vllm-bootstrap stop {started.launch_id}")
        raise typer.Exit(1) from None
    took = text.duration((ready.state_changed_at - ready.created_at).total_seconds())
    where = f"{client.target.url}/v1 (model {ready.served_model_name!r})"
    ready_word = output.styled("ready", "green")
    prefix = "" if output.on_terminal() else f"{ready.launch_id}  "
    output.say(f"{prefix}{ready_word} after {took} at {where}")


def engine_options(given: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``NAME=VALUE`` options as (typed fields of a launch, extra engine arguments). A name alone means true."""
    typed: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for item in given:
        name, has_value, written = item.partition("=")
        name = name.removeprefix("--")
        field = name.replace("-", "_")
        if not name:
            raise UsageError(f"--arg {item!r}: write it as NAME=VALUE")
        value = as_value(written) if has_value else True
        if field in LaunchRequest.model_fields and field not in NOT_BY_ARG:
            typed[field] = value
        else:
            extra[name] = value
    return typed, extra


def as_value(written: str) -> Any:
    """A value as JSON where it is any (numbers, true, lists), else as text."""
    try:
        return json.loads(written)
    except ValueError:
        return written


def as_pairs(option: str, given: list[str]) -> dict[str, str]:
    """``NAME=VALUE`` pairs. Raises ``UsageError``."""
    found = {}
    for item in given:
        name, has_value, value = item.partition("=")
        if not name or not has_value:
            raise UsageError(f"{option} {item!r}: write it as NAME=VALUE")
        found[name] = value
    return found


def ps(
    *,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Also those that have ended.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="At most so many.")] = 100,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """List launches."""
    with connect(url, key) as client:
        found = client.launches(include_ended=everything, limit=limit)
    if as_json:
        output.emit(found)
        return
    if not found.data and output.on_terminal():
        output.say("Nothing is running." if not everything else "There are no launches.")
        return
    header = ["ID", "MODEL", "STATE", "GPUS", "AGE", "RUNNING", "QUEUED", "BATCH"]
    rows = [row for group in groups.together(found.data) for row in _rows(group)]
    output.table(header, rows, state_column=2, spare=("BATCH", "AGE", "GPUS"))
    if found.has_more:
        output.note(f"There are more: --limit {limit * 2}")


def _rows(group: list[LaunchStatus]) -> list[list[str]]:
    """The line of a launch, or those of a group: its sum and its launches."""
    rows = [_row(launch) for launch in group]
    return rows if group[0].group_id == group[0].launch_id else groups.as_lines(group, rows)


def _row(launch: LaunchStatus) -> list[str]:
    running, queued = sum(launch.load.in_flight.values()), sum(launch.load.queued.values())
    name = (
        launch.served_model_name
        if launch.served_model_name == launch.model
        else (f"{launch.served_model_name} ({launch.model})")
    )
    age = text.age(launch.created_at)
    may = loads.batch_share(launch.load)
    return [launch.launch_id, name, state_of(launch), gpus_of(launch), age, str(running), str(queued), may]


def state_of(launch: LaunchStatus) -> str:
    """The state with the most important thing about it."""
    if launch.failure is not None and launch.state == "failed":
        return f"failed ({wording.words(launch.failure.failure_class)})"
    if launch.state == "bootstrapping":
        details = progress.details_of(launch.progress)
        return f"bootstrapping ({progress.phase_of(launch)}{f', {details}' if details else ''})"
    if launch.state == "ready" and launch.unresponsive:
        return "ready, but unresponsive"
    return progress.phase_of(launch)


def gpus_of(launch: LaunchStatus) -> str:
    """Where a launch runs: ``GPU 0, 1``, ``half of GPU 0`` as ``GPU 0 (50 %)``, ``CPU``."""
    return groups.devices_of(launch.gpus)


def status(
    launch_id: LaunchName,
    *,
    events: Annotated[bool, typer.Option("--events", help="Also its history.")] = False,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show one launch."""
    with connect(url, key) as client:
        wanted = resolve(client, launch_id)
        found = client.group(wanted) if is_group_id(wanted) else client.status(wanted)
        history = list(client.events(wanted)) if events else []
        base = client.target.url
    if as_json:
        shown = found.model_dump(mode="json", by_alias=True)
        output.emit({**shown, "events": [row.model_dump(mode="json") for row in history]} if events else shown)
        return
    if isinstance(found, LaunchGroup):
        groups.show(found, base, [_row(launch) for launch in found.replicas])
    else:
        _show(found, base)
    for row in history:
        moved = row.from_state not in (None, row.to_state)
        change = f"{row.from_state} -> {row.to_state}" if moved else row.to_state
        who = f"{row.launch_id}  " if isinstance(found, LaunchGroup) else ""
        output.say(f"{row.at:%Y-%m-%d %H:%M:%S}Z  {who}attempt {row.attempt}  {row.event}  {change}")


def _show(found: LaunchStatus, base: str) -> None:
    state = output.styled(state_of(found), output.style_of(found.state))
    output.say(f"{output.styled(found.model, 'bold')}  {state}")
    output.pairs(_facts(found, base))
    if found.failure is not None:
        _show_failure(found)


def _facts(found: LaunchStatus, base: str) -> list[tuple[str, str]]:
    load = found.load
    progressed = found.progress
    return [
        ("id", found.launch_id),
        ("group", found.group_id if found.group_id != found.launch_id else ""),
        ("served as", found.served_model_name),
        ("engine", found.engine),
        ("devices", gpus_of(found)),
        ("owner", found.owner),
        ("url", f"{base}{found.proxy_url}/v1"),
        ("labels", ", ".join(f"{name}={value}" for name, value in found.labels.items())),
        ("restart", found.restart),
        ("attempt", str(found.attempt)),
        ("next try", f"{found.next_attempt_at:%Y-%m-%d %H:%M:%S}Z" if found.next_attempt_at else ""),
        ("pid", f"{found.pid} (shim {found.shim_pid})" if found.pid else ""),
        ("requests", loads.requests_of(load)),
        ("batch", loads.batch_of(load)),
        ("started", f"{found.created_at:%Y-%m-%d %H:%M:%S}Z, {text.age(found.created_at)} ago"),
        ("since", f"{found.state_changed_at:%Y-%m-%d %H:%M:%S}Z, {text.age(found.state_changed_at)} ago"),
        ("elapsed", text.duration(progressed.elapsed_s) if progressed else ""),
        ("to go", wording.time_left(progressed.eta_s) if progressed and progressed.eta_s is not None else ""),
    ]


def _show_failure(found: LaunchStatus) -> None:
    failure = found.failure
    assert failure is not None  # noqa: S101 - narrows a type; the caller looked
    ended = f"signal {failure.signal}" if failure.signal is not None else f"exit code {failure.exit_code}"
    told = "" if failure.signal is None and failure.exit_code is None else f" ({ended})"
    output.say(f"\n{failure.message}{told}")
    for line in failure.lines or ():
        output.say(f"  | {line}")
    if failure.hint:
        output.say(f"Hint: {failure.hint}")


def stop(
    launch_ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Which launches.")] = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="Every launch.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Do not let running requests finish.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when all its processes are gone.")] = True,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Stop launches and give their GPUs back."""
    if everything == bool(launch_ids):
        raise UsageError("Say which launches to stop, or --all.")
    with connect(url, key) as client:
        if everything:
            wanted = [launch.launch_id for launch in client.launches(limit=1000).data]
        else:
            wanted = [resolve(client, name) for name in launch_ids or []]
        if len(wanted) > 1:  # all begin to stop before the first one is waited for
            for launch_id in wanted:
                client.stop(launch_id, wait=False, force=force)
        done = [client.stop(launch_id, wait=wait, force=force) for launch_id in wanted]
    if as_json:
        output.emit({"object": "list", "data": [result.model_dump(mode="json") for result in done]})
        return
    for result in done:
        for told in (result, *result.replicas):
            output.say(_told(told))
    if not done:
        output.say("Nothing is running.")


def _told(result: StopResult) -> str:
    line = f"{result.launch_id}  {result.state}"
    if result.forced:
        line += ", by force (it did not end by itself in time)"
    if result.unsettled_gpus:
        line += f"; memory not back yet on {', '.join(result.unsettled_gpus)}"
    return line


def rm(
    launch_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ended launches.")],
    *,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Forget ended launches and their logs."""
    with connect(url, key) as client:
        wanted = [resolve(client, name) for name in launch_ids]
        done = [client.delete(launch_id) for launch_id in wanted]
    if as_json:
        output.emit({"object": "list", "data": [result.model_dump(mode="json") for result in done]})
        return
    for result in done:
        output.say(f"{result.launch_id}  deleted")


def register(app: typer.Typer) -> None:
    for command in (launch, ps, status, stop, rm):
        app.command()(command)
