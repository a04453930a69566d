import json
import subprocess
import sys

import pytest

from tests.support import engines as wishes
from vllm_bootstrap.engines import build_engines
from vllm_bootstrap.engines.base import Placement
from vllm_bootstrap.engines.engines_file import EnginesFileError


def test_the_engines_that_are_always_there():
    engines = build_engines(environ={})
    assert engines.keys() == {"vllm", "simulator"}
    assert all(engine.name == name for name, engine in engines.items())


def test_engines_of_the_operator(tmp_path):
    path = tmp_path / "engines.json"
    external = {
        "kind": "external",
        "url": "http://127.0.0.1:1",
        "served_names": ["m"],
        "slots": 1,
        "credential_env": "K",
    }
    command = {"kind": "command", "argv": ["run", "{port}"], "slots": 2}
    path.write_text(json.dumps({"engines": {"lab": external, "mine": command}}))
    engines = build_engines(engines_file=path, environ={"K": "secret"}, hf_home=tmp_path)
    assert engines.keys() == {"vllm", "simulator", "lab", "mine"}
    made = engines["lab"].command(wishes.spec("m"), Placement("none"), wishes.context())
    assert made.endpoint.credential == "secret"
    assert engines["mine"].traits(wishes.spec()).slots == 2


def test_mistakes_of_the_operator_are_told_at_once(tmp_path):
    with pytest.raises(EnginesFileError):
        build_engines(engines_file=tmp_path / "none.json", environ={})
    with pytest.raises(ValueError, match="ALLOWED_MEDIA_DOMAINS"):
        build_engines(allowed_media_domains=("http://x",), environ={})
    with pytest.raises(ValueError, match="ENGINE_COMMAND"):
        build_engines(engine_command="'", environ={})


def test_the_daemon_does_not_pay_for_what_engines_need():
    """Nothing heavy may come in through the engines: the daemon stays small and starts fast."""
    code = (
        "import sys\nfrom vllm_bootstrap.engines import build_engines\nbuild_engines()\n"
        "heavy = {'httpx', 'numpy', 'torch', 'openai', 'rich', 'typer', 'pynvml', 'pydantic'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
