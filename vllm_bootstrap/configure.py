"""Settings into the plain values that inner parts work with. Knows both sides, decides nothing but user ids."""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vllm_bootstrap import instance
from vllm_bootstrap.batches import posting
from vllm_bootstrap.batches.desk import BatchConfig
from vllm_bootstrap.batches.webhooks import signing_key
from vllm_bootstrap.engines.base import Engine
from vllm_bootstrap.engines.environment import base_environment
from vllm_bootstrap.gateway.limits import FILE_FORM_BYTES, GatewayLimits
from vllm_bootstrap.launches.config import SupervisorConfig
from vllm_bootstrap.models.book import CatalogueBook
from vllm_bootstrap.models.checks import checker
from vllm_bootstrap.models.department import ModelsConfig
from vllm_bootstrap.models.entries import EntryStore
from vllm_bootstrap.models.idle_hook import Action, Command, Webhook, command_environment
from vllm_bootstrap.models.planning import Policy
from vllm_bootstrap.models.ports import KeeperConfig
from vllm_bootstrap.models.types import AdapterEntry, Fetched, GpuNeed, ModelEntry
from vllm_bootstrap.models.weights import WeightsConfig
from vllm_bootstrap.places import default_config_dir
from vllm_bootstrap.scheduler.budget import BudgetPolicy
from vllm_bootstrap.settings import Settings

MODELS_FILE = "models.yaml"


class StartError(Exception):
    """The daemon cannot start; the message is for the person who started it."""


def supervisor_config(settings: Settings, state: instance.Instance) -> SupervisorConfig:
    """The supervisor's plain values, out of the settings."""
    uid, gid = engine_identity(settings.engine_user)
    hf_token = settings.hf_token.get_secret_value() if settings.hf_token is not None else None
    return SupervisorConfig(
        node_id=state.node_id,
        state_id=state.state_id,
        boot_id=state.boot_id,
        instance_secret=state.secret,
        log_base=settings.engine_log_dir,
        lock_dir=settings.lock_dir,
        default_engine=settings.default_engine,
        port_range=(settings.engine_port_start, settings.engine_port_end),
        base_env=base_environment(os.environ, passthrough=settings.engine_env_passthrough),
        hf_token=hf_token,
        hf_home=settings.hf_home or Path.home() / ".cache/huggingface",
        uid=uid,
        gid=gid,
        allow_dangerous_args=settings.allow_dangerous_args,
        start_timeout_s=settings.start_timeout_s,
        start_stall_timeout_s=settings.start_stall_timeout_s,
        stop_grace_s=settings.stop_grace_s,
        probe_interval_s=settings.probe_interval_s,
        probe_timeout_s=settings.probe_timeout_s,
        unresponsive_after_s=settings.unresponsive_after_s,
        unhealthy_after_s=settings.unhealthy_after_s,
        restart_max_attempts=settings.restart_max_attempts,
        restart_backoff_s=settings.restart_backoff_s,
        restart_backoff_max_s=settings.restart_backoff_max_s,
        restart_reset_s=settings.restart_reset_s,
        ended_launches_kept=settings.ended_launches_kept,
        replicas_max=settings.replicas_max,
        log_segment_bytes=settings.engine_log_segment_bytes,
        log_max_bytes=settings.engine_log_max_bytes,
        ended_logs_max_bytes=settings.ended_logs_max_bytes,
        gpu_busy_bytes=settings.gpu_busy_bytes,
        gpu_settle_timeout_s=settings.gpu_settle_timeout_s,
        gpu_settle_tolerance_bytes=settings.gpu_settle_tolerance_bytes,
        sleep_memory_reserve_bytes=settings.sleep_memory_reserve_bytes,
    )


def budget_policy(settings: Settings) -> BudgetPolicy:
    """What an operator says about realtime and batch on one engine, out of the settings."""
    return BudgetPolicy(
        reserve_share=settings.realtime_reserve,
        floor_share=settings.batch_floor,
        ttft_factor=settings.realtime_ttft_factor,
    )


def gateway_limits(settings: Settings) -> GatewayLimits:
    """The data plane's numbers, out of the settings."""
    return GatewayLimits(
        max_header_bytes=settings.max_header_bytes,
        max_header_count=settings.max_header_count,
        header_timeout_s=settings.header_timeout_s,
        body_timeout_s=settings.body_timeout_s,
        keep_alive_s=settings.keep_alive_s,
        max_connections=settings.max_connections,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        spool_budget_bytes=settings.spool_budget_bytes,
        max_file_body_bytes=settings.file_max_bytes + FILE_FORM_BYTES,
        max_adapter_body_bytes=settings.adapter_max_bytes + FILE_FORM_BYTES,
        client_dead_after_s=settings.client_dead_after_s,
        write_stall_timeout_s=settings.write_stall_timeout_s,
        upstream_connect_timeout_s=settings.upstream_connect_timeout_s,
        upstream_first_byte_timeout_s=settings.upstream_first_byte_timeout_s,
        upstream_idle_timeout_s=settings.upstream_idle_timeout_s,
        upstream_keep_alive_s=settings.upstream_keep_alive_s,
        revoked_keys_cut_streams=settings.revoked_keys_cut_streams,
    )


def engine_identity(user: str | None) -> tuple[int | None, int | None]:
    """Numeric user and group that engines run as. Raises ``StartError``."""
    if user is None:
        return None, None
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise StartError(f"VLLM_BOOTSTRAP_ENGINE_USER: there is no user {user!r} on this machine") from None
    if os.geteuid() != 0 and entry.pw_uid != os.geteuid():
        raise StartError("VLLM_BOOTSTRAP_ENGINE_USER needs a daemon that runs as root")
    return (entry.pw_uid, entry.pw_gid) if os.geteuid() == 0 else (None, None)


def batch_config(settings: Settings, folder: Path, node_id: str) -> BatchConfig:
    """What batches are told, out of the settings."""
    return BatchConfig(
        folder=folder,
        node_id=node_id,
        max_lines=settings.batch_max_lines,
        max_line_bytes=settings.batch_max_line_bytes,
        max_unfinished=settings.batch_max_unfinished,
        line_attempts=settings.batch_line_attempts,
        prefix_order=settings.batch_prefix_order,
        kept_s=settings.batch_kept_s,
        max_size=settings.batch_max_size,
        max_latency_s=settings.batch_max_latency_ms / 1000,
        item_expires_after_s=settings.item_expires_after_s,
        items_max_queued=settings.items_max_queued,
        webhook_allow_private=settings.webhook_allow_private,
        webhook_attempts=settings.webhook_attempts,
    )


def idle_actions(settings: Settings, clock: Callable[[], float]) -> list[Action]:
    """What is to be done about an idle box. Raises ``StartError`` for a command or address that is none."""
    actions: list[Action] = []
    if settings.idle_command:
        environ = command_environment(base_environment(os.environ), os.environ)
        actions.append(Command(_argv(settings.idle_command), environ))
    if settings.idle_webhook:
        url = settings.idle_webhook.get_secret_value()
        secret = settings.webhook_secret.get_secret_value() if settings.webhook_secret is not None else ""
        try:
            posting.parse(url, allow_private=True)
            signing_key(secret)
        except (posting.NotAllowed, ValueError) as exc:
            raise StartError(f"VLLM_BOOTSTRAP_IDLE_WEBHOOK: {exc}") from exc
        actions.append(Webhook(url, secret, posting.post, clock))
    return actions


def _argv(command: str) -> list[str]:
    try:
        argv = shlex.split(command)
    except ValueError as exc:
        raise StartError(f"VLLM_BOOTSTRAP_IDLE_COMMAND: {exc}") from exc
    if not argv or shutil.which(argv[0]) is None:
        raise StartError(f"VLLM_BOOTSTRAP_IDLE_COMMAND: there is no program {argv[0] if argv else ''!r} to run")
    return argv


def catalogue(
    settings: Settings,
    store: EntryStore,
    engines: Mapping[str, Engine],
    *,
    on_cpu: bool,
    adapters: Callable[[str], Sequence[AdapterEntry]] = lambda _name: (),
    resolved: Callable[[ModelEntry], Fetched | None] = lambda _entry: None,
) -> CatalogueBook:
    """The catalogue of models that the settings name. Reads its file. Raises ``CatalogueError``."""
    return CatalogueBook(
        settings.models_file or default_config_dir() / MODELS_FILE,
        store,
        checker(engines, settings.default_engine, settings.allow_dangerous_args, replicas_max=settings.replicas_max),
        required=settings.models_file is not None,
        setting=one_model(settings, on_cpu=on_cpu),
        adapters=adapters,
        resolved=resolved,
    )


def models_config(
    settings: Settings, config: SupervisorConfig, adapters: Path, engines: Mapping[str, Engine]
) -> ModelsConfig:
    """What models are told, out of the settings."""
    policy = Policy(
        min_loaded_s=settings.model_min_loaded_s,
        max_wait_s=settings.model_max_wait_s,
        batch_turn_s=settings.model_batch_turn_s,
    )
    keeper = KeeperConfig(
        on_demand=settings.models_by_request,
        policy=policy,
        ttl_s=settings.model_ttl_s,
        asleep_ttl_s=settings.model_asleep_ttl_s,
        backoff_s=settings.restart_backoff_s,
        backoff_max_s=settings.restart_backoff_max_s,
        busy_bytes=settings.gpu_busy_bytes,
        replicas_max=settings.replicas_max,
        externals=frozenset(name for name, engine in engines.items() if getattr(engine, "external", False)),
    )
    weights = WeightsConfig(
        hf_home=config.hf_home,
        base_env=config.base_env,
        hf_token=config.hf_token,
        downloads_at_once=settings.downloads_at_once,
        disk_reserve_bytes=settings.disk_reserve_bytes,
        uid=config.uid,
        gid=config.gid,
        node_id=config.node_id,
    )
    return ModelsConfig(keeper, weights, adapters, settings.adapter_max_bytes, config.gid, settings.model_id)


def one_model(settings: Settings, *, on_cpu: bool) -> ModelEntry | None:
    """The model of one-model mode, None without ``MODEL_ID``. ``on_cpu``: there are no GPUs, so the default share of
    their memory says nothing (of the host's it would be far too much)."""
    if settings.model_id is None:
        return None
    args: dict[str, object] = {"max_model_len": settings.max_model_len}
    if settings.dtype != "auto":
        args["dtype"] = settings.dtype
    default = Settings.model_fields["gpu_memory_utilization"].default
    if not on_cpu or settings.gpu_memory_utilization != default:
        args["gpu_memory_utilization"] = settings.gpu_memory_utilization
    return ModelEntry(
        name=settings.model_id,
        source=settings.model_id,
        origin="setting",
        revision=settings.model_revision,
        args=args,
        gpus=GpuNeed(count=settings.tensor_parallel),
        pin=True,
        preload=True,
    )
