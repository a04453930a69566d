"""The files around the image. No container engine runs here: they are read, and scripts run with pretended tools."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import container_init
import nccl_version
import pytest
import yaml

from vllm_bootstrap.auth import keyfile

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
RELEASE: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
KEY, TOKEN = "vb-the-key", "hf_the_token"
RECORDER = '#!/bin/sh\nprintf "%s\\n" "$@" > "{folder}/argv"\nenv > "{folder}/env"\n'


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


# -- docker-compose.yml ----------------------------------------------------------------------------------------------


def test_compose_has_the_services_on_their_ports_and_only_the_gpu_one_needs_a_profile() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items()}
    assert ports == {
        "daemon": ["${BIND_ADDRESS:-127.0.0.1}:${PORT:-8000}:8000"],
        "simulator": ["${BIND_ADDRESS:-127.0.0.1}:${SIMULATOR_PORT:-8001}:8001"],
        "vllm": ["${BIND_ADDRESS:-127.0.0.1}:${GPU_PORT:-8002}:8000"],
    }
    assert {name: service.get("profiles") for name, service in SERVICES.items()} == {
        "daemon": None, "simulator": None, "vllm": ["gpu"],
    }  # fmt: skip
    (gpu,) = SERVICES["vllm"]["deploy"]["resources"]["reservations"]["devices"]
    assert (gpu["driver"], gpu["capabilities"]) == ("nvidia", ["gpu"])
    assert SERVICES["vllm"]["build"]["args"]["VLLM_BASE_IMAGE"].startswith("${RUNTIME_IMAGE:-")
    assert "deploy" not in SERVICES["daemon"]


@pytest.mark.parametrize("name", ["daemon", "vllm"])
def test_daemons_of_compose_get_their_keys_settings_and_volumes(name: str) -> None:
    service = SERVICES[name]
    environment = service["environment"]
    assert service["env_file"] == [{"path": ".env", "required": False}]
    assert environment["VLLM_ACCESS_KEY"].startswith("${VLLM_ACCESS_KEY:?")
    assert environment["AUTH_KEYS_FILE"] == "/app-config/auth.keys.json"
    keys, *volumes = service["volumes"]
    assert (keys["source"], keys["target"]) == ("./config/auth.keys.json", environment["AUTH_KEYS_FILE"])
    assert keys["bind"] == {"create_host_path": False}  # else Docker makes a folder of that name
    targets = dict(reversed(volume.split(":")[:2]) for volume in volumes if not volume.startswith("$"))
    assert {environment["VLLM_BOOTSTRAP_STATE_DIR"], environment["HF_HOME"]} == set(targets)
    assert set(targets.values()) <= COMPOSE["volumes"].keys()
    assert "/livez" in service["healthcheck"]["test"][-1]


def test_daemons_of_compose_do_not_share_state() -> None:
    states = [v for s in SERVICES.values() for v in s.get("volumes", []) if "/var/lib/vllm-bootstrap" in v]
    assert len({volume.split(":")[0] for volume in states}) == len(states) == 2


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_time_to_stop_a_health_check_and_a_key(name: str) -> None:
    service = SERVICES[name]
    assert seconds(service["stop_grace_period"]) > container_init.STOP_S
    assert service["healthcheck"]["test"][0] == "CMD"
    assert "${VLLM_ACCESS_KEY:?" in str(service["environment"])
    assert service["build"]["context"] == "."


def test_compose_sets_only_build_arguments_that_the_dockerfile_has() -> None:
    known = set(re.findall(r"(?m)^ARG (\w+)", DOCKERFILE))
    for service in SERVICES.values():
        assert set(service["build"]["args"]) <= known


def test_every_variable_of_compose_has_a_default_or_is_demanded_and_is_in_the_example() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    used = re.findall(r"\$\{(\w+)(:[-?][^}]+)?\}", text)
    assert [name for name, rest in used if not rest] == []
    shown = (ROOT / ".env.vllm.example").read_text() + (ROOT / "docs/containers.md").read_text()
    assert sorted({name for name, _ in used if name not in shown}) == []


def test_the_example_for_containers_is_read_alike_by_docker_and_by_us() -> None:
    for line in (ROOT / ".env.vllm.example").read_text().splitlines():
        assert re.fullmatch(r"|# .*|#?[A-Z_]+=[^'\" #]*(?: [^'\"#]*)?", line), line


def test_the_standalone_simulator_starts_as_compose_starts_it() -> None:
    service = SERVICES["simulator"]
    module = service["entrypoint"][1:]
    asked = [
        sys.executable,
        *module,
        *[part.replace("${SIMULATOR_MODEL:-demo/Simulated}", "m") for part in service["command"]],
    ]
    shown = subprocess.run([*asked, "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr


def test_the_empty_key_file_that_is_copied_is_a_key_file() -> None:
    assert keyfile.parse((ROOT / "config/auth.keys.example").read_text(), allow_examples=False).entries == ()
    assert "config/auth.keys.json" in (ROOT / ".gitignore").read_text().splitlines()


# -- Dockerfile, release ---------------------------------------------------------------------------------------------


def test_the_image_runs_our_init_with_what_it_needs() -> None:
    copied = re.search(r"(?m)^COPY (scripts/container_init\.py .*) /opt/vllm-bootstrap/$", DOCKERFILE)
    assert copied
    assert set(copied[1].split()) == {"scripts/container_init.py", "scripts/container_setup.py"}
    entry = '["/opt/vllm-bootstrap/bin/python", "/opt/vllm-bootstrap/container_init.py"]'
    assert f'\nENTRYPOINT {entry}\nCMD ["vllm-bootstrap", "serve"]\n' in DOCKERFILE
    for line in ("HOST=0.0.0.0", "HF_HOME=/cache", "DAEMON_USER=vllm-bootstrap", "HEALTHCHECK ", "ssh_host_*"):
        assert line in DOCKERFILE
    assert "useradd" in DOCKERFILE


def test_health_checks_are_programs_that_compile() -> None:
    (code,) = re.findall(r'CMD \["/opt/vllm-bootstrap/bin/python", "-c", "(.*)"\]', DOCKERFILE)
    compile(code.replace('\\"', '"'), "HEALTHCHECK", "exec")
    for service in SERVICES.values():
        compile(service["healthcheck"]["test"][-1], "healthcheck", "exec")


def test_a_release_makes_two_tags_for_each_cuda() -> None:
    matrix = RELEASE["jobs"]["image"]["strategy"]["matrix"]["include"]
    assert all(re.fullmatch(r"\d+\.\d", entry["cuda"]) and ":" in entry["base"] for entry in matrix)
    build = RELEASE["jobs"]["image"]["steps"][-1]["with"]
    image = "${{ steps.facts.outputs.image }}:cuda${{ matrix.cuda }}-"
    assert build["tags"].splitlines() == [f"{image}latest", f"{image}${{{{ github.ref_name }}}}"]
    assert "BUILD_SHA=" in build["build-args"]
    assert RELEASE["jobs"]["image"]["needs"] == "check"


# -- scripts with a pretended docker ---------------------------------------------------------------------------------


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    """Folder where argv and environment of the last call are found."""
    program = tmp_path / "bin/docker"
    program.parent.mkdir()
    program.write_text(RECORDER.format(folder=tmp_path))
    program.chmod(0o755)
    return tmp_path


def run(docker: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{docker}/bin:{os.environ['PATH']}", "ENV_FILE": str(docker / "env-file"), **environment}
    command = [ROOT / "scripts" / script, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)


def argv(docker: Path) -> list[str]:
    return (docker / "argv").read_text().splitlines()


def test_run_image_passes_secrets_by_the_environment_only(docker: Path) -> None:
    done = run(docker, "run_image.sh", "--network", "mine", VLLM_ACCESS_KEY=KEY, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    arguments = argv(docker)
    assert arguments[:2] == ["run", "-d"]
    assert arguments[-1] == "vllm-bootstrap:latest"
    pairs = list(itertools.pairwise(arguments))
    for pair in [
        ("-e", "VLLM_ACCESS_KEY"), ("-e", "HF_TOKEN"), ("-e", "MODEL_ID"), ("--gpus", "all"), ("--shm-size", "16g"),
        ("-p", "127.0.0.1:8000:8000"), ("-v", "vllm-bootstrap-cache:/cache"), ("--network", "mine"),
        ("-v", "vllm-bootstrap-state:/var/lib/vllm-bootstrap"), ("-e", "HOST=0.0.0.0"), ("--stop-timeout", "15"),
    ]:  # fmt: skip
        assert pair in pairs
    assert not any(secret in argument for secret in (KEY, TOKEN) for argument in arguments)
    assert KEY not in done.stdout + done.stderr
    environment = (docker / "env").read_text().splitlines()
    assert {f"VLLM_ACCESS_KEY={KEY}", f"HF_TOKEN={TOKEN}", "MODEL_ID=Qwen/Qwen2.5-3B-Instruct"} <= set(environment)


def test_run_image_reads_the_env_file_and_runs_nothing_in_it(docker: Path) -> None:
    file = docker / "env-file"
    file.write_text(
        f"# a comment\nVLLM_ACCESS_KEY={KEY}\r\n\nMODEL_ID=first\nMODEL_ID=org/last\nPORT=9000\nGPUS=none\n"
        f"HF_TOKEN=$(touch {docker}/ran)`touch {docker}/ran`\nIMAGE_TAG=cuda12.9-latest; touch {docker}/ran\n"
        f"MODELS_DIR=/srv/models\n"
    )
    done = run(docker, "run_image.sh", PORT="9001")
    assert done.returncode == 0, done.stderr
    assert not (docker / "ran").exists()
    arguments = argv(docker)
    pairs = list(itertools.pairwise(arguments))
    assert ("-p", "127.0.0.1:9001:8000") in pairs  # the environment wins over the file
    assert ("--env-file", str(file)) in pairs
    assert ("-v", "/srv/models:/models:ro") in pairs
    assert ("-e", "USE_MOCK_MODEL=true") in pairs
    assert "--gpus" not in arguments
    environment = (docker / "env").read_text().splitlines()
    assert {f"VLLM_ACCESS_KEY={KEY}", "MODEL_ID=org/last"} <= set(environment)


def test_run_image_wants_a_key(docker: Path) -> None:
    done = run(docker, "run_image.sh")
    assert done.returncode == 2
    assert "VLLM_ACCESS_KEY is set neither" in done.stderr
    assert not (docker / "argv").exists()
    assert run(docker, "run_image.sh", GENERATE_KEY="1").returncode == 0
    assert "VLLM_ACCESS_KEY" not in argv(docker)


def test_build_image_passes_platform_base_and_build_facts(docker: Path) -> None:
    assert run(docker, "build_image.sh").returncode == 0
    plain = argv(docker)
    assert plain[:5] == ["buildx", "build", "--platform", "linux/amd64", "--load"]
    assert plain[-1] == "."
    assert "vllm-bootstrap:latest" in plain
    assert any(re.fullmatch(r"BUILD_TIME=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", argument) for argument in plain)
    wishes = {"IMAGE_REPO": "registry.example/me/vb", "IMAGE_TAG": "t", "PUSH": "1", "TARGET_PLATFORM": "linux/arm64"}
    assert run(docker, "build_image.sh", "--no-cache", RUNTIME_IMAGE="r:1", BUILD_SHA="abc", **wishes).returncode == 0
    wished = argv(docker)
    for part in (
        "linux/arm64",
        "--push",
        "registry.example/me/vb:t",
        "VLLM_BASE_IMAGE=r:1",
        "BUILD_SHA=abc",
        "--no-cache",
    ):
        assert part in wished
    assert run(docker, "build_image.sh", PUSH="perhaps").returncode == 2


# -- make_venv.sh on bases without the module venv -------------------------------------------------------------------


def test_an_environment_is_made_without_the_module_venv(tmp_path: Path) -> None:
    base = Path(sys._base_executable)  # type: ignore[attr-defined]
    poor = tmp_path / "poor-python"
    # No venv; and pip, which would fetch itself from an index, only notes for which interpreter.
    poor.write_text(
        f'#!/bin/sh\ncase "$*" in "-m venv "*) exit 1;; "-m pip "*) echo "$@" > {tmp_path}/pip; exit;; esac\n'
        f'exec {base} "$@"\n'
    )
    poor.chmod(0o755)
    made = tmp_path / "made"
    subprocess.run([ROOT / "scripts/make_venv.sh", made, poor], check=True)
    assert (tmp_path / "pip").read_text() == f"-m pip --python {made}/bin/python install -q pip\n"
    asked = "import sys, sysconfig; print(sys.prefix, sysconfig.get_path('purelib'), *sys.path, sep='\\n')"
    told = subprocess.run([made / "bin/python3", "-I", "-c", asked], capture_output=True, text=True, check=True)
    prefix, packages, *path = told.stdout.split()
    assert (prefix, Path(packages).parents[2]) == (str(made), made)
    assert [entry for entry in path if "packages" in entry] == [packages]


# -- NCCL ------------------------------------------------------------------------------------------------------------

LIBRARY = "int ncclGetVersion(int *v) {{ *v = {code}; return 0; }}"
TORCH = "import ctypes, pathlib; ctypes.CDLL(pathlib.Path(__file__).parent / 'libnccl.so.2', ctypes.RTLD_GLOBAL)"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages: a pretended PyTorch that loads a pretended NCCL 2.21.5."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").write_text(TORCH)
    build(folder / "torch/libnccl.so.2", 22105)
    info = folder / "nvidia_nccl_cu12-2.21.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-nccl-cu12\nVersion: 2.27.3\n")
    return folder


def build(path: Path, code: int) -> None:
    compiler = shutil.which("cc") or "cc"
    source = path.with_suffix(".c")
    source.write_text(LIBRARY.format(code=code))
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libnccl.so.2", "-o", path, source], check=True)


def nccl(environment: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(environment), **extra}
    command = [sys.executable, nccl_version.__file__, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)


def test_the_loaded_nccl_is_believed_not_the_metadata(environment: Path) -> None:
    done = nccl(environment, "check", "2.21.5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"NCCL 2.21.5 is loaded from {environment}/torch/libnccl.so.2\n"
    wrong = nccl(environment, "check", "2.27.3")
    assert wrong.returncode == 1
    assert "NCCL 2.21.5 is loaded from" in wrong.stderr
    assert "2.21.5" in nccl(environment, "show").stdout
    assert nccl(environment).returncode == 2


def test_a_pytorch_that_needs_a_newer_nccl_is_said_so(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "raise ImportError('libtorch_cuda.so: undefined symbol: ncclCommWindowRegister')"
    )
    done = nccl(tmp_path, "check", "2.21.5")
    assert done.returncode == 1
    assert "it was built for a newer one: libtorch_cuda.so: undefined symbol" in done.stderr


def test_a_second_nccl_in_the_process_is_found(environment: Path, tmp_path: Path) -> None:
    build(tmp_path / "libnccl.so.2", 22703)
    done = nccl(environment, "check", "2.21.5", LD_PRELOAD=str(tmp_path / "libnccl.so.2"))
    assert done.returncode == 1
    assert "expected one NCCL in the process" in done.stderr


def test_the_package_for_the_cuda_of_the_base_is_exchanged(environment: Path, tmp_path: Path) -> None:
    pip = tmp_path / "pip"
    pip.mkdir()
    (pip / "__init__.py").touch()  # else the real one is found
    (pip / "__main__.py").write_text("import sys; print(sys.argv[1:]); sys.exit('nvidia-nccl-cu12==9.9' in sys.argv)")
    both = f"{tmp_path}{os.pathsep}{environment}"
    done = nccl(environment, "install", "2.21.5", PYTHONPATH=both)
    assert done.returncode == 0, done.stderr
    assert "'--no-deps'" in done.stdout
    assert "'nvidia-nccl-cu12==2.21.5'" in done.stdout
    assert "is there such a version for this CUDA?" in nccl(environment, "install", "9.9", PYTHONPATH=both).stderr
    assert "must be a version" in nccl(environment, "install", "2.21.5 evil", PYTHONPATH=both).stderr


def test_an_image_with_uv_alone_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def record(command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(nccl_version, "package", lambda: "nvidia-nccl-cu13")
    monkeypatch.setattr(nccl_version.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(nccl_version.subprocess, "run", record)
    nccl_version.install("2.30.7")
    assert commands[0][:5] == ["uv", "pip", "install", "--no-cache", "--python"]
    assert commands[0][-1] == "nvidia-nccl-cu13==2.30.7"


def test_an_environment_without_nccl_is_refused(tmp_path: Path) -> None:
    assert "expected one package nvidia-nccl-cuXX" in nccl(tmp_path, "install", "2.21.5").stderr


# -- docs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["docs/containers.md", "docs/operations.md", "docs/RUNPOD.md", "README.md", "Dockerfile"]
)
def test_every_documented_container_command_passes_a_key(name: str) -> None:
    text = re.sub(r"\\\n#? *", " ", (ROOT / name).read_text())
    commands = [line for line in text.splitlines() if re.match(r"[#$ ]*docker run ", line)]
    assert [line for line in commands if "VLLM_ACCESS_KEY" not in line and "--env-file" not in line] == []
