"""Compiled modules are used only where they say what the sources say: never old ones, never some of them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import compile_modules
import pytest

from vllm_bootstrap import compiled

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def other_finders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Without what this run may be using itself, and without what is added here."""
    finders = [one for one in sys.meta_path if not isinstance(one, compiled.TwinFinder)]
    monkeypatch.setattr(sys, "meta_path", finders)
    return finders  # type: ignore[return-value]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """One with a module ``vllm_bootstrap.made.up``, as if it had been compiled."""
    package = tmp_path / "vllm_bootstrap"
    (package / "made").mkdir(parents=True)
    source = package / "made" / "up.py"
    source.write_text("x = 1\n")
    home = compiled.folder(package)
    home.mkdir(parents=True)
    (home / "up.so").write_bytes(b"no ELF")
    (home / "shared.so").write_bytes(b"no ELF")
    write(package, {"vllm_bootstrap.made.up": ["up.so", compiled.fingerprint(source)], "shared": ["shared.so", None]})
    return package


def write(package: Path, manifest: object) -> None:
    (compiled.folder(package) / compiled.MANIFEST).write_text(json.dumps(manifest))


def test_what_fits_its_sources_is_found_before_them(package: Path) -> None:
    assert not compiled.in_use()
    assert compiled.use(package) == 2
    assert compiled.in_use()
    finder = sys.meta_path[0]
    assert isinstance(finder, compiled.TwinFinder)
    for name, file in (("vllm_bootstrap.made.up", "up.so"), ("shared", "shared.so")):
        spec = finder.find_spec(name, None)
        assert spec is not None
        assert spec.origin == str(compiled.folder(package) / file)
    assert finder.find_spec("vllm_bootstrap.made", None) is None
    with pytest.raises(ImportError):  # it is no library: the import fails, and does not fall back to the source
        __import__("shared")


def test_a_second_time_changes_nothing(package: Path) -> None:
    compiled.use(package)
    before = list(sys.meta_path)
    assert compiled.use(package) == 0
    assert sys.meta_path == before


def test_none_for_this_interpreter(tmp_path: Path, other_finders: list[object]) -> None:
    with pytest.raises(compiled.NotCompiled):
        compiled.use(tmp_path)
    assert sys.meta_path == other_finders


def _change(package: Path) -> None:
    (package / "made" / "up.py").write_text("x = 2\n")


def _remove_source(package: Path) -> None:
    (package / "made" / "up.py").unlink()


def _remove_file(package: Path) -> None:
    (compiled.folder(package) / "shared.so").unlink()


def _spoil(package: Path) -> None:
    (compiled.folder(package) / compiled.MANIFEST).write_text('{"vllm_')


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_change, "vllm_bootstrap.made.up has changed since it was compiled"),
        (_remove_source, "vllm_bootstrap.made.up has changed since it was compiled"),
        (_remove_file, "shared.so is missing"),
        (_spoil, "manifest.json cannot be read"),
    ],
)
def test_what_does_not_fit_is_not_used_at_all(
    package: Path, other_finders: list[object], harm: object, words: str
) -> None:
    harm(package)  # type: ignore[operator]
    with pytest.raises(compiled.Unusable, match=words) as raised:
        compiled.use(package)
    assert not isinstance(raised.value, compiled.NotCompiled)
    assert sys.meta_path == other_finders


def test_a_process_that_has_imported_one_of_them_goes_on_with_the_sources(package: Path) -> None:
    write(package, {"vllm_bootstrap.compiled": ["up.so", None]})
    with pytest.raises(compiled.Unusable, match=r"vllm_bootstrap\.compiled was imported before"):
        compiled.use(package)


def test_sources_are_found_by_the_name_of_their_module() -> None:
    assert compiled.source_of("vllm_bootstrap.gateway.relay") == ROOT / "vllm_bootstrap" / "gateway" / "relay.py"


# Making them


def test_all_of_gateway_and_scheduler_is_compiled_but_for_what_says_why_not() -> None:
    package = ROOT / "vllm_bootstrap"
    wanted = compile_modules.modules(package)
    there = {
        path.relative_to(package).as_posix()
        for name in compile_modules.PACKAGES
        for path in (package / name).glob("*.py")
    }
    left = there - {path.relative_to(package).as_posix() for path in wanted.values()}
    assert {name for name in left if not name.endswith("__init__.py")} == set(compile_modules.NOT_COMPILED)
    assert all(compiled.source_of(name, package) == path for name, path in wanted.items())


def test_what_was_made_from_the_same_sources_is_kept(package: Path) -> None:
    home, source = compiled.folder(package), package / "made" / "up.py"
    wanted = {"vllm_bootstrap.made.up": source}
    assert compile_modules.is_current(home, wanted)
    source.write_text("x = 3\n")
    assert not compile_modules.is_current(home, wanted)
    write(package, {"vllm_bootstrap.made.up": ["up.so", compiled.fingerprint(source)]})
    assert compile_modules.is_current(home, wanted)
    assert not compile_modules.is_current(home, {**wanted, "vllm_bootstrap.made.new": source})
    (home / "up.so").unlink()
    assert not compile_modules.is_current(home, wanted)
    (home / compiled.MANIFEST).unlink()
    assert not compile_modules.is_current(home, wanted)


@pytest.mark.parametrize(("options", "code"), [([], 1), (["--optional"], 0)])
def test_without_a_compiler_it_says_so_and_leaves_everything_as_it_is(
    tmp_path: Path, options: list[str], code: int
) -> None:
    package = tmp_path / "vllm_bootstrap"
    package.mkdir()
    for name in (*compile_modules.PACKAGES, "auth"):
        (package / name).mkdir()
    for name in compile_modules.MODULES:
        (package / name).write_text("")
    program = [sys.executable, str(ROOT / "scripts" / "compile_modules.py"), "--package", str(package), *options]
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, env={"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == code, done.stderr
    assert "The data plane is not compiled: there is no C compiler" in done.stdout
    assert not (package / "_compiled").exists()


def test_nothing_that_is_interpreted_inherits_from_what_is_compiled() -> None:
    """Such a class cannot be used, which shows only when somebody makes one."""
    package = ROOT / "vllm_bootstrap"
    wanted = compile_modules.modules(package)
    made = {(name, node.name) for name, path in wanted.items() for node in classes(path)}
    assert ("vllm_bootstrap.gateway.exchange", "Exchange") in made
    wrong = []
    for path in package.rglob("*.py"):
        if path in wanted.values() or "_compiled" in path.parts:
            continue
        known = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in classes(path):
            for base in node.bases:
                first, _, rest = ast.unparse(base).partition("[")[0].partition(".")
                module, name = known.get(first, ("", ""))
                if (module, name) in made or (f"{module}.{name}", rest) in made:
                    wrong.append(f"{path.relative_to(package)}: {node.name}({ast.unparse(base)})")
    assert not wrong


def classes(path: Path) -> list[ast.ClassDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
