"""Whatever calls a step of a request's journey, its mistakes end that request and go no further."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from vllm_bootstrap.gateway import mishaps

GATEWAY = Path(__file__).resolve().parents[3] / "vllm_bootstrap" / "gateway"
JOURNEYS = {"passage.py": "Passage", "exchange.py": "Exchange", "call.py": "Call"}


@pytest.mark.parametrize(("file", "name"), JOURNEYS.items())
def test_every_step_is_guarded(file: str, name: str) -> None:
    tree = ast.parse((GATEWAY / file).read_text())
    (journey,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    steps = {node.name: node for node in journey.body if isinstance(node, ast.FunctionDef)}
    guarded = {name for name, step in steps.items() if [ast.unparse(one) for one in step.decorator_list] == ["guarded"]}
    assert guarded == steps.keys() & mishaps.STEPS
    assert guarded


def test_there_are_no_other_journeys() -> None:
    bases = {
        (path.name, node.name)
        for path in GATEWAY.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and {"Passage", "Mishaps"} & {ast.unparse(base) for base in node.bases}
    }
    assert bases == set(JOURNEYS.items())
