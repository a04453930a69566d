"""The vLLM engine: what it is told, what it can do, what its log and its death mean.

Invariant: an unsupported flag is refused by ``check`` before anything is spawned, because vLLM would need many seconds
of imports to say the same. The installed version is found by ``Locator`` and remembered; nothing else is state.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from vllm_bootstrap.engines import failures, model_config, phases, vllm_command
from vllm_bootstrap.engines.base import (
    EngineCommand,
    EngineContext,
    ExitFacts,
    Failure,
    LaunchSpec,
    Placement,
    Progress,
    Traits,
)
from vllm_bootstrap.engines.capabilities import Capabilities, capabilities
from vllm_bootstrap.engines.interpreter import Form, Install, Locator, NoEngine
from vllm_bootstrap.engines.routes import vllm_routes
from vllm_bootstrap.engines.versions import NEWEST
from vllm_bootstrap.engines.vllm_command import VllmOptions
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.serving import Endpoint

log = logging.getLogger(__name__)

PRIORITY_HEADER_SINCE = (0, 32, 0)


class VllmEngine:
    """See ``engines.base.Engine``. ``check`` looks for vLLM; the other methods use what was found last and look only
    when nothing was found yet in this process (after a restart of the daemon, tens of milliseconds)."""

    name = "vllm"
    takes_vllm_flags = True
    serves_more_names = True
    can_sleep = True

    def __init__(self, locator: Locator, options: VllmOptions) -> None:
        self._locator = locator
        self._options = options

    async def check(self, spec: LaunchSpec, placement: Placement) -> None:
        """Raises ``BadRequest``: no vLLM, one that is too old, or one that lacks what the launch asks for."""
        if placement.kind == "mock":
            raise BadRequest("Mock GPUs run only the engine 'simulator'.", param="engine")
        try:
            install = await asyncio.to_thread(self._locator.find)
            can = capabilities(install.version)
        except (NoEngine, ValueError) as exc:
            raise BadRequest(str(exc), param="engine") from None
        if not can.verified:
            log.debug("vLLM %s is judged by the flags of %s", install.version_text, can.basis)
        vllm_command.flags(spec, placement, can, self._options, self._lora_rank(spec))

    def needs_port(self, spec: LaunchSpec) -> bool:  # noqa: ARG002 - the same for every launch
        return not self._installed()[1].has("--uds")

    def command(self, spec: LaunchSpec, placement: Placement, context: EngineContext) -> EngineCommand:
        """See ``Engine.command``. Raises ``BadRequest`` as ``check`` does, when vLLM has changed since."""
        install, can = self._installed()
        argv = [*install.launcher, *_model(spec, install)]
        argv += vllm_command.flags(spec, placement, can, self._options, self._lora_rank(spec))
        argv += vllm_command.listen_flags(context, can)
        env = vllm_command.environment(spec, placement, context, can, self._options, install.bin_dir)
        secrets = tuple(secret for secret in (context.internal_key, context.hf_token) if secret)
        endpoint = _endpoint(context, can, vllm_command.keep_alive_s(env, can))
        return EngineCommand(tuple(argv), env, endpoint, secrets, cwd=context.tmp_dir)

    def traits(self, spec: LaunchSpec) -> Traits:
        """Never raises: a launch must stay visible when its vLLM was uninstalled under it."""
        version, can = self._version()
        domains = self._options.allowed_media_domains
        filters_media = can is not None and can.has("--allowed-media-domains")
        return Traits(
            routes=vllm_routes(version),
            slots=vllm_command.slots(spec),
            priority_header=version >= PRIORITY_HEADER_SINCE,
            priority_field=version < PRIORITY_HEADER_SINCE,
            refuses_http_media=not filters_media and vllm_command.ANY_DOMAIN not in domains,
            sleep_levels=vllm_command.sleep_levels(spec, can) if can is not None else (),
        )

    def attention_heads(self, spec: LaunchSpec) -> int | None:
        return model_config.attention_heads(spec.model, self._hf_home(), spec.fields.get("revision"))

    def progress(self, line: str) -> Progress | None:
        return phases.parse_progress(line)

    def explain(self, facts: ExitFacts, log_tail: Sequence[str]) -> Failure:
        return failures.explain(facts, log_tail)

    def _lora_rank(self, spec: LaunchSpec) -> int | None:
        """The largest rank of the launch's adapters, None where it cannot be told for any of them."""
        ranks = [model_config.lora_rank(source, self._hf_home()) for source in spec.adapters.values()]
        return max((rank for rank in ranks if rank is not None), default=None)

    def _hf_home(self) -> Path | None:
        return Path(self._options.hf_home) if self._options.hf_home else None

    def _installed(self) -> tuple[Install, Capabilities]:
        try:
            install = self._locator.known()
            return install, capabilities(install.version)
        except (NoEngine, ValueError) as exc:
            raise BadRequest(str(exc), param="engine") from None

    def _version(self) -> tuple[tuple[int, int, int], Capabilities | None]:
        try:
            install, can = self._installed()
        except BadRequest:
            return NEWEST, None
        return install.version, can


def _model(spec: LaunchSpec, install: Install) -> list[str]:
    # Of a repository vLLM asks the hub what is in it, however much of it is cached, and does not start without it.
    model = spec.model if spec.folder is None else spec.folder
    return [model] if install.form is Form.SERVE else [f"--model={model}"]


def _endpoint(context: EngineContext, can: Capabilities, keep_alive_s: float) -> Endpoint:
    if can.has("--uds"):
        return Endpoint(uds=context.uds_path, keep_alive_s=keep_alive_s)
    return Endpoint(host=context.host, port=context.port, credential=context.internal_key, keep_alive_s=keep_alive_s)
