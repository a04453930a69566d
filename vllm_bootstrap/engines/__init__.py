"""Engines: what is launched. ``build_engines`` makes all that this daemon knows; ``base`` says what an engine is.

The package itself imports nothing until ``build_engines`` is called, so that its pure modules stay cheap to import.
"""

# ruff: noqa: PLC0415 - see above

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_bootstrap.engines.base import Engine


def build_engines(
    *,
    engine_python: Path | None = None,
    engine_command: str | None = None,
    engines_file: Path | None = None,
    allowed_media_domains: tuple[str, ...] = (),
    stop_grace_s: float = 7.0,
    hf_home: Path | None = None,
    mock_gpu_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> dict[str, Engine]:
    """Every engine by name: ``vllm``, ``simulator`` and those of the operator's engines file.

    ``mock_gpu_file`` holds the use of mock GPUs. ``environ`` is where keys of external engines and the search path come
    from, the process's own by default. Blocks for reading the engines file; starts no process. Raises ``ValueError``
    (``EnginesFileError`` for that file) with a message for the operator.
    """
    from vllm_bootstrap.engines.command import CommandDefinition, CommandEngine
    from vllm_bootstrap.engines.engines_file import read_engines_file
    from vllm_bootstrap.engines.environment import base_environment
    from vllm_bootstrap.engines.external import ExternalEngine
    from vllm_bootstrap.engines.interpreter import Locator
    from vllm_bootstrap.engines.simulator_engine import SimulatorEngine
    from vllm_bootstrap.engines.vllm import VllmEngine
    from vllm_bootstrap.engines.vllm_command import VllmOptions, check_domains

    environ = os.environ if environ is None else environ
    check_domains(allowed_media_domains)
    locator = Locator(engine_python=engine_python, engine_command=engine_command, environ=base_environment(environ))
    options = VllmOptions(allowed_media_domains, stop_grace_s, str(hf_home) if hf_home is not None else None)
    simulator = SimulatorEngine(
        stop_grace_s=stop_grace_s,
        hf_home=options.hf_home,
        mock_memory_file=str(mock_gpu_file) if mock_gpu_file is not None else None,
    )
    engines: dict[str, Engine] = {"vllm": VllmEngine(locator, options), "simulator": simulator}
    for name, definition in (read_engines_file(engines_file) if engines_file is not None else {}).items():
        if isinstance(definition, CommandDefinition):
            engines[name] = CommandEngine(name, definition, hf_home=hf_home)
        else:
            engines[name] = ExternalEngine(name, definition, environ)
    return engines
