"""The command as a process: what the daemon does not import, what other platforms need not have, how it ends."""

import json
import os
import subprocess
import sys

import pytest

ONLY_LINUX = (
    "fcntl", "grp", "pwd", "resource", "termios", "readline", "uvloop", "httptools", "pynvml", "psutil", "fastapi",
    "starlette", "uvicorn", "jinja2", "prometheus_client", "python_multipart", "multipart",
)  # fmt: skip
ELSEWHERE = f"""
import importlib.abc, os, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ONLY_LINUX!r}:
            raise ModuleNotFoundError(name)

for name in {ONLY_LINUX!r}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Absent())
for name in ("geteuid", "getuid", "chown"):
    delattr(os, name)
"""
# What only the commands need; the daemon's memory is not theirs to fill.
NOT_IN_DAEMON = ("typer", "rich", "httpx", "openai", "vllm_bootstrap.client", "vllm_bootstrap.sdk", "jinja2")


def python(code, *args, **env):
    given = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**given, **env}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_client_and_commands_work_without_what_only_linux_has(tmp_path):
    code = (
        ELSEWHERE + "\nimport vllm_bootstrap.client\nfrom vllm_bootstrap.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    told = python(code, "--help")
    assert (told.returncode, told.stderr) == (0, "")
    made = python(code, "keys", "new", "ci", "--scope", "admin", "--file", str(tmp_path / "k.json"))
    assert (made.returncode, made.stderr) == (0, "")
    nobody = python(code, "ps", VLLM_BOOTSTRAP_URL="http://127.0.0.1:1")
    assert (nobody.returncode, "No daemon answers" in nobody.stderr) == (1, True)


def test_elsewhere_daemon_and_demo_say_that_they_need_linux():
    code = ELSEWHERE + "import platform\nplatform.system = lambda: 'Windows'\nfrom vllm_bootstrap.cli import main\n"
    for command in ("serve", "demo"):
        told = python(code + "sys.exit(main(sys.argv[1:]))", command)
        assert told.returncode == 1
        assert "on Linux" in told.stderr


def test_the_daemon_does_not_import_what_only_commands_need(tmp_path):
    code = (
        "import json, sys\n"
        "from vllm_bootstrap import app\n"
        "app.serve = lambda settings: print(json.dumps([settings.port, sorted(sys.modules)])) or 0\n"
        "from vllm_bootstrap.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = python(code, "--port", "0", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    port, modules = json.loads(done.stdout)
    assert port == 0
    assert [name for name in NOT_IN_DAEMON if name in modules] == []


def daemon_refuses(tmp_path, *args, **env):
    code = "import sys\nfrom vllm_bootstrap.cli import main\nsys.exit(main(sys.argv[1:]))"
    own = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "VLLM_BOOTSTRAP_STATE_DIR": str(tmp_path / "s")}
    return python(code, "serve", *args, **{**own, **env})


@pytest.mark.parametrize(
    ("args", "env", "code", "said"),
    [
        ([], {"HOST": "my-machine"}, 2, "HOST must be an IP address"),
        ([], {"TENSOR_PARALLEL": "2"}, 2, "MODEL_ID is not set"),
        (["--env-file", "/nonexistent"], {}, 2, "there is no such file"),
        ([], {"VLLM_BOOTSTRAP_MODELS_FILE": "/nonexistent.yaml"}, 2, "/nonexistent.yaml: there is no such file"),
        ([], {"MODEL_ID": "../x"}, 2, "MODEL_ID: the name '../x' may not"),
        (["--auth-keys-file", "/nonexistent"], {}, 2, "/nonexistent"),
        (["--state-dir", "/proc/nope"], {}, 1, "/proc"),
    ],
)
def test_a_daemon_that_cannot_work_says_why_in_one_line(tmp_path, args, env, code, said):
    done = daemon_refuses(tmp_path, *args, **env)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_daemon_with_a_broken_catalogue_names_file_place_and_fix(tmp_path):
    path = tmp_path / "models.yaml"
    path.write_text("models:\n  qwen: {source: org/qwen, gpus: {cuont: 1}}\n")
    done = daemon_refuses(tmp_path, VLLM_BOOTSTRAP_MODELS_FILE=str(path))
    assert done.returncode == 2
    assert f"{path}: models.qwen.gpus.cuont: there is no such key: did you mean count?" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_env_file_is_read_from_where_it_is_said_and_never_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("HOST=from-here\n")
    (tmp_path / "env").write_text("HOST=from-here\n")
    config = tmp_path / "config"
    (config / "vllm-bootstrap").mkdir(parents=True)
    (config / "vllm-bootstrap" / "env").write_text("PORT=wrong\nFOREIGN=1\n")
    (tmp_path / "said").write_text("LOG_LEVEL=LOUD\n")
    env = {"XDG_CONFIG_HOME": str(config)}
    user = "import os\nos.geteuid = lambda: 1000\n"
    code = user + "import sys\nfrom vllm_bootstrap.cli import main\nsys.exit(main(['serve', *sys.argv[1:]]))"
    by_place = python(code, HOME=str(tmp_path), **env)
    assert "PORT" in by_place.stderr
    assert "from-here" not in by_place.stderr
    said = python(code, "--env-file", "said", HOME=str(tmp_path), **env)
    assert "LOG_LEVEL" in said.stderr
    assert "PORT" not in said.stderr


def test_whoever_reads_may_stop_reading():
    command = [sys.executable, "-m", "vllm_bootstrap", "keys", "new", "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=30)
    finally:
        os.close(writer)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
