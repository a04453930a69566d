"""The shape of the code as a test: who may import whom, what pure modules may touch, how large things may grow."""

from __future__ import annotations

import ast
import sys
from fnmatch import fnmatchcase

import code_map
import pytest

MODULES = code_map.modules()

# From top to bottom. The first matching pattern counts; a module may import from lower layers, and from its own
# package within the same layer. Pure modules lie below all of these.
LAYERS = [
    (13, ["__main__"]),
    (12, ["cli", "cli.*"]),
    (11, ["app"]),
    (10, ["doors"]),
    (9, ["configure", "watching_idle"]),
    (8, ["api", "api.*"]),
    (8, ["client"]),
    (7, ["sdk", "sdk.*"]),
    (4, ["batches.store", "batches.files", "batches.blobs", "batches.linestore", "batches.indexing", "batches.output"]),
    (8, ["models.idle_box", "models.idle_hook", "models.idle_sense"]),
    (7, ["batches", "batches.*"]),
    (6, ["models", "models.*"]),
    (6, ["gateway", "gateway.*"]),
    (3, ["launches.shim", "launches.shim.*"]),
    (4, ["launches.process", "launches.shim_client", "launches.control", "launches.sweep", "launches.exit_watch"]),
    (4, ["launches.logs", "launches.store", "launches.claim_rows", "launches.context"]),
    (4, ["launches.downloads", "launches.durably"]),
    (5, ["launches", "launches.*", "scheduler", "scheduler.*"]),
    (4, ["activity", "engines", "engines.*", "gpus", "gpus.*", "auth", "auth.*"]),
    (3, ["db", "instance", "logs_setup", "metrics", "server"]),
    (2, ["settings", "statedir", "schema", "model_metrics"]),
    (1, ["places", "compiled"]),
    (0, [""]),
]

MUST_BE_PURE = [
    "errors", "ids", "refused", "serving", "wire", "auth.types", "auth.scopes", "launches.lifecycle", "launches.types",
    "launches.restart", "gpus.ledger", "gpus.placement", "engines.base", "engines.failures", "engines.phases",
    "gateway.bodies", "gateway.chunks", "gateway.headers", "gateway.usage", "gateway.sticky", "gateway.estimates",
    "gateway.inflight", "scheduler.admission", "tallies",
    "wire_requests", "wire_batches", "wire_models", "batches.jobs", "batches.types",
    "batches.lines", "batches.ordering", "batches.joining", "batches.retrying", "batches.isolation", "batches.turns",
    "batches.windows", "models.choosing", "models.lora", "models.troubles", "models.types", "models.schema",
    "models.parsing", "models.orders", "models.assembly", "models.stored",
    "models.advice", "models.fit", "models.shape", "models.tensors", "models.names", "models.idle_time",
    "models.idle_alarm", "batches.progress", "batches.outcomes", "launches.rows", "launches.resting", "pulse",
]  # fmt: skip

NOT_IN_PURE = {
    "asyncio", "threading", "subprocess", "os", "time", "random", "logging", "sqlite3", "httpx", "fastapi", "pynvml",
    "socket", "secrets", "multiprocessing", "starlette", "uvicorn",
}  # fmt: skip

# Tables that are stored as data files of the package: constants in all but the spelling.
TABLES = {"engines.capabilities", "engines.policy"}

# Who may know these modules; everybody else gets plain values.
RESERVED = {
    "wire": ["wire_requests", "wire_models", "api", "api.*", "client", "sdk.*", "cli", "cli.*"],
    "wire_requests": ["api", "api.*", "client", "sdk.*", "cli", "cli.*"],
    "wire_batches": ["api", "api.*", "client", "sdk.*", "cli", "cli.*"],
    "wire_models": ["api", "api.*", "client", "sdk.*", "cli", "cli.*"],
    "settings": ["app", "configure", "doors", "cli", "cli.*", "api", "api.*"],
    "client": ["cli", "cli.*"],
    "sdk": ["client", "sdk.*", "cli.*"],
}

# All that the client may know of us: it runs on machines where the daemon does not.
CLIENT_SIDE = {
    "client", "sdk", "wire", "wire_requests", "wire_batches", "wire_models", "errors", "places", "instance", "",
}  # fmt: skip

# Standard library and their own package only: they run by path, apart from the daemon, and must stay tiny.
STANDALONE = [name for name in MODULES if name == "launches.shim" or name.startswith("launches.shim.")]

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60


def layer(name: str) -> int:
    for rank, patterns in LAYERS:
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return rank
    pytest.fail(f"{name} has no layer: add it to LAYERS, or make it PURE")


def package(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


@pytest.mark.parametrize("name", sorted(n for n, m in MODULES.items() if not m.pure))
def test_imports_point_down(name: str) -> None:
    rank = layer(name)
    for target in sorted(MODULES[name].imports):
        if not target or MODULES[target].pure:
            continue
        inside = package(target) == package(name) and layer(target) <= rank
        assert inside or layer(target) < rank, f"{name} must not import {target}"


@pytest.mark.parametrize("name", sorted(n for n, m in MODULES.items() if m.pure))
def test_pure_modules_take_time_chance_and_environment_as_inputs(name: str) -> None:
    module = MODULES[name]
    assert not module.foreign & NOT_IN_PURE, f"{name} is PURE and imports {sorted(module.foreign & NOT_IN_PURE)}"
    impure = sorted(t for t in module.imports - TABLES if not MODULES[t].pure and not _is_bare_package(t))
    assert not impure, f"{name} is PURE and imports {impure}"


def _is_bare_package(name: str) -> bool:
    module = MODULES[name]
    return module.path.name == "__init__.py" and not module.imports


@pytest.mark.parametrize("name", MUST_BE_PURE)
def test_the_cores_exist_and_are_pure(name: str) -> None:
    module = MODULES.get(name)
    assert module is not None
    assert module.pure, "the first paragraph of its docstring must say PURE"


def test_errors_are_vocabulary_and_import_nothing_of_ours() -> None:
    assert not MODULES["errors"].imports - {""}


@pytest.mark.parametrize(("reserved", "allowed"), RESERVED.items())
def test_reserved_modules_are_known_to_few(reserved: str, allowed: list[str]) -> None:
    users = [n for n, m in MODULES.items() if reserved in m.imports]
    strangers = [n for n in users if not any(fnmatchcase(n, pattern) for pattern in allowed)]
    assert not strangers, f"{strangers} must not import {reserved}"


@pytest.mark.parametrize("name", [name for name in MODULES if package(name) in {"client", "sdk"}])
def test_the_client_knows_nothing_of_the_daemon(name: str) -> None:
    assert {package(target) for target in MODULES[name].imports} <= CLIENT_SIDE


@pytest.mark.parametrize("name", STANDALONE)
def test_standalone_programs_need_nothing_but_the_standard_library(name: str) -> None:
    module = MODULES[name]
    assert module.imports <= set(STANDALONE), f"{name} imports {sorted(module.imports)}"
    assert module.foreign <= sys.stdlib_module_names
    assert not module.foreign & {"asyncio", "typing"}, "too big for a shim"


def test_no_import_cycles() -> None:
    """Records of one package may name each other in their types (a request knows what it runs on, that knows its
    requests); nothing else goes in circles, and nothing at all when the program runs."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            records = {target for target in MODULES[name].typing_only if package(target) == package(name)}
            for target in sorted(MODULES[name].imports - {""} - records):
                visit(target, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_say_what_they_are_and_stay_readable(name: str) -> None:
    module = MODULES[name]
    lines = module.path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_MODULE_LINES, f"{name}: {lines} lines; split it by responsibility"
    if lines:
        assert ast.get_docstring(module.tree), f"{name} has no docstring"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{name}.{node.name}: {length} lines"


def test_only_the_lifecycle_names_states_when_deciding() -> None:
    """``advance`` is called by the owner of a launch only; phases are otherwise read back from the store."""
    callers = set()
    for name, module in MODULES.items():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"advance", "lifecycle.advance"}:
                callers.add(name)
    assert callers <= {"launches.owner", "batches.run"}, f"states are decided in {sorted(callers)}"
