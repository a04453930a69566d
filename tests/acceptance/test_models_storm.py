"""Three models on two GPUs, everybody at once, kill -9 of engines, shims and the daemon: what was promised holds.

``MODELS_SOAK_S=120`` goes on for so long, ``MODELS_SOAK_SEED`` chooses another course, as
``python -m tests.support.model_storm`` does.
"""

from __future__ import annotations

import os

import pytest

from tests.support.model_storm import Storm

SECONDS = float(os.environ.get("MODELS_SOAK_S", "8"))
SEED = int(os.environ.get("MODELS_SOAK_SEED", "5"))


@pytest.mark.timeout(SECONDS + 240)
def test_whatever_is_killed_each_request_has_one_answer_and_each_gpu_one_owner() -> None:
    storm = Storm(SEED, SECONDS)
    storm.run()
    print(storm.figures)
