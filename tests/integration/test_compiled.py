"""Compiled modules are used only where they say what the sources say: never old ones, never some of them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import compile_modules
import pytest

from vllm_bootstrap import compiled

ROOT = Path(__file__).resolve().parents[2]


UP = "vllm_bootstrap.made.up"


@pytest.fixture(autouse=True)
def other_finders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Without what this run may be using itself, and without what is added here."""
    finders = [one for one in sys.meta_path if not isinstance(one, compiled.TwinFinder)]
    monkeypatch.setattr(sys, "meta_path", finders)
    return finders  # type: ignore[return-value]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """One with a module ``vllm_bootstrap.made.up``, as if it had been compiled together with ``made_with_it``."""
    package = tmp_path / "vllm_bootstrap"
    (package / "made").mkdir(parents=True)
    (package / "made" / "up.py").write_text("x = 1\n")
    home = compiled.folder(package)
    home.mkdir(parents=True)
    for name in ("up.so", "shared.so"):
        (home / name).write_bytes(b"no ELF")
    write(package, {"vllm_bootstrap.made.up": ["up.so", 6], "made_with_it": ["shared.so", 6]})
    return package


def write(package: Path, files: object, sources: tuple[str, ...] = ("made/up.py",)) -> None:
    known = {name: compiled.fingerprint(package / name) for name in sources}
    told = {"made_with": compile_modules.compiler(), "files": files, "sources": known}
    (compiled.folder(package) / compiled.MANIFEST).write_text(json.dumps(told))


def test_what_fits_its_sources_is_found_before_them(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(compiled.importlib, "import_module", asked.append)
    assert not compiled.in_use()
    assert compiled.use(package) == 2
    assert compiled.in_use()
    assert asked == ["vllm_bootstrap.made.up", "made_with_it"]
    finder = sys.meta_path[0]
    assert isinstance(finder, compiled.TwinFinder)
    for name, file in (("vllm_bootstrap.made.up", "up.so"), ("made_with_it", "shared.so")):
        spec = finder.find_spec(name, None)
        assert spec is not None
        assert spec.origin == str(compiled.folder(package) / file)
    assert finder.find_spec("vllm_bootstrap.made", None) is None
    before = list(sys.meta_path)
    assert compiled.use(package) == 0
    assert sys.meta_path == before


def test_none_for_this_interpreter(tmp_path: Path, other_finders: list[object]) -> None:
    with pytest.raises(compiled.NotCompiled):
        compiled.use(tmp_path)
    assert sys.meta_path == other_finders


def test_what_cannot_be_loaded_leaves_no_trace(package: Path, other_finders: list[object]) -> None:
    """They are no libraries: the sources must be what is imported, by those that were imported meanwhile as well."""
    before = set(sys.modules)
    write(package, {"made_with_it": ["shared.so", 6], "vllm_bootstrap.made.up": ["up.so", 6]})
    with pytest.raises(compiled.Unusable, match="they cannot be loaded"):
        compiled.use(package)
    assert sys.meta_path == other_finders
    assert set(sys.modules) == before


def _change(package: Path) -> None:
    (package / "made" / "up.py").write_text("x = 2\n")


def _remove_source(package: Path) -> None:
    (package / "made" / "up.py").unlink()


def _remove_file(package: Path) -> None:
    (compiled.folder(package) / "shared.so").unlink()


def _cut_file(package: Path) -> None:
    (compiled.folder(package) / "up.so").write_bytes(b"")


def _tell(text: str) -> Callable[[Path], object]:
    return lambda package: (compiled.folder(package) / compiled.MANIFEST).write_text(text)


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another source": (_change, "made/up.py has changed since they were compiled"),
    "no source": (_remove_source, "made/up.py has changed since they were compiled"),
    "no file": (_remove_file, "shared.so is not as it was made"),
    "half a file": (_cut_file, "up.so is not as it was made"),
    "half a manifest": (_tell('{"vllm_'), "manifest.json cannot be read"),
    "a list": (_tell("[]"), "manifest.json cannot be read"),
    "an older form": (_tell('{"vllm_bootstrap.made.up": ["up.so", ""]}'), "manifest.json cannot be read"),
    "odd values": (_tell('{"files": {"a": 1}, "sources": {}, "made_with": ""}'), "manifest.json cannot be read"),
    "nothing": (_tell('{"files": {}, "sources": {}, "made_with": ""}'), "there are none"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_does_not_fit_is_not_used_at_all(package: Path, other_finders: list[object], harm: str) -> None:
    act, words = HARMS[harm]
    act(package)
    with pytest.raises(compiled.Unusable, match=words) as raised:
        compiled.use(package)
    assert not isinstance(raised.value, compiled.NotCompiled)
    assert sys.meta_path == other_finders
    assert not compile_modules.is_current(package, {UP: package / "made" / "up.py"})


def test_a_process_that_has_imported_one_of_them_goes_on_with_the_sources(package: Path) -> None:
    write(package, {"vllm_bootstrap.compiled": ["up.so", 6]})
    with pytest.raises(compiled.Unusable, match=r"vllm_bootstrap\.compiled was imported before"):
        compiled.use(package)


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
    assert wanted["vllm_bootstrap.gateway.relay"] == package / "gateway" / "relay.py"


def test_what_was_made_from_the_same_sources_by_the_same_compiler_is_kept(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {UP: package / "made" / "up.py"}
    assert compile_modules.is_current(package, wanted)
    assert not compile_modules.is_current(package, {**wanted, "vllm_bootstrap.made.more": package})
    assert not compile_modules.is_current(package, {})
    monkeypatch.setattr(compile_modules, "compiler", lambda: "mypy 99")
    assert not compile_modules.is_current(package, wanted)


def test_types_that_machine_code_relies_on_belong_to_its_sources() -> None:
    package = ROOT / "vllm_bootstrap"
    sources = compile_modules.fingerprints(package, compile_modules.modules(package))
    assert {"gateway/relay.py", "auth/types.py", "serving.py", "errors.py", "models/types.py"} <= sources.keys()
    assert not {"app.py", "cli/serve.py", "api/health.py"} & sources.keys()
    assert all(sources.values())


def made(tmp_path: Path, name: str, program: str) -> Path:
    """What the compiler might have made, but that it imports."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    file = tmp_path / "twins" / (name.replace(".", "/") + suffix)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(program)
    return tmp_path / "twins"


def test_what_cannot_be_imported_is_not_installed(package: Path, tmp_path: Path) -> None:
    home, wanted = compiled.folder(package), {"vllm_bootstrap.made.up": package / "made" / "up.py"}
    before = (home / compiled.MANIFEST).read_bytes()
    twins = made(tmp_path, "vllm_bootstrap.made.up", "no library")
    with pytest.raises(compile_modules.CannotCompile, match="cannot be imported"):
        compile_modules.install(twins, package, wanted, {"made/up.py": "x"})
    with pytest.raises(compile_modules.CannotCompile, match=r"nothing of vllm_bootstrap\.made\.gone"):
        compile_modules.install(twins, package, {**wanted, "vllm_bootstrap.made.gone": package}, {"made/up.py": "x"})
    assert (home / compiled.MANIFEST).read_bytes() == before
    assert not [one for one in home.iterdir() if one.is_dir()]


def test_what_is_new_counts_all_at_once_and_old_folders_go(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, name = compiled.folder(package), UP
    tried: list[dict[str, Path]] = []
    monkeypatch.setattr(compile_modules, "try_to_import", lambda files, _package: tried.append(files))
    (home / "young").mkdir()
    (home / "old").mkdir()
    os.utime(home / "old", (1, 1))
    twins = made(tmp_path, name, "as if")
    sources = {"made/up.py": compiled.fingerprint(package / "made" / "up.py")}
    compile_modules.install(twins, package, {name: package / "made" / "up.py"}, sources)
    assert compile_modules.is_current(package, {name: package / "made" / "up.py"})
    assert [file.read_text() for file in tried[0].values()] == ["as if"]
    assert compiled.read_manifest(package).files[name][1] == len("as if")
    assert (home / "young").is_dir()
    assert not (home / "old").exists()


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A package with nothing in it to compile but what must be there."""
    package = tmp_path / "vllm_bootstrap"
    for name in (*compile_modules.PACKAGES, "auth"):
        (package / name).mkdir(parents=True)
    for name in compile_modules.MODULES:
        (package / name).write_text("")
    return package


@pytest.mark.parametrize(("options", "code"), [([], 1), (["--optional"], 0)])
def test_without_a_compiler_it_says_so_and_leaves_everything_as_it_is(
    bare: Path, options: list[str], code: int
) -> None:
    program = [sys.executable, str(ROOT / "scripts" / "compile_modules.py"), "--package", str(bare), *options]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env={"PATH": str(bare)})
    assert done.returncode == code, done.stderr
    assert "The data plane is not compiled: there is no C compiler" in done.stdout
    assert not (bare / "_compiled").exists()


@pytest.mark.parametrize(("options", "code"), [([], 1), (["--optional"], 0)])
def test_where_nothing_may_be_written_it_says_so_before_it_compiles(
    bare: Path, options: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (bare / "_compiled").write_text("in the way, also of root")
    monkeypatch.setattr(compile_modules, "check_tools", lambda: None)
    monkeypatch.setattr(sys, "argv", ["compile_modules.py", "--package", str(bare), *options])
    assert compile_modules.main() == code
    said = capsys.readouterr().out
    assert "The data plane is not compiled: [Errno " in said
    assert "Compiling" not in said


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
