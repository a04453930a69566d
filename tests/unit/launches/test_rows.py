from __future__ import annotations

import pytest

from vllm_bootstrap.launches.lifecycle import TRANSITIONS, Phase
from vllm_bootstrap.launches.records import AttemptRow, LaunchRow
from vllm_bootstrap.launches.rows import attempt_values, launch_values, phase_name, stored_phase, to_attempt, to_launch


@pytest.mark.parametrize("phase", list(TRANSITIONS), ids=phase_name)
def test_a_launch_is_read_back_as_it_was(phase: Phase) -> None:
    row = LaunchRow("l1", "n", "o", "l1", "m", "e", "m", {"a": [1]}, phase, 2, 1.0, 2.0, labels={"k": "ü"})
    assert to_launch(launch_values(row)) == row


def test_states_the_schema_does_not_name_are_another_one_with_a_step() -> None:
    stored = {phase_name(phase): stored_phase("", phase) for phase in TRANSITIONS}
    assert stored["falling_asleep"] == {"state": "ready", "step": "falling_asleep", "why": None}
    assert stored["waking"] == {"state": "asleep", "step": "waking", "why": None}
    assert stored["asleep"] == {"state": "asleep", "step": None, "why": None}
    assert stored["stopping (died)"] == {"state": "stopping", "step": None, "why": "died"}


def test_an_attempt_is_read_back_as_it_was() -> None:
    row = AttemptRow("l1", 1, baseline={"GPU-a": 5}, sleep={"level": 2}, ready_at=3.0)
    assert to_attempt(attempt_values(row)) == row
