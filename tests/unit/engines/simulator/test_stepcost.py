import json

import pytest

from vllm_bootstrap.engines.simulator.knobs import PROFILE_FOLDER, PROFILES, Options
from vllm_bootstrap.engines.simulator.stepcost import BadProfile, Profile, profile_of

WHOLE = {"name": "n", "source": "s", "measured": True, "step_base_s": 0.5}


def test_a_profile_is_read():
    made = profile_of(json.dumps({**WHOLE, "step_sequence_s": 1, "block_size": 8}))
    assert (made.name, made.measured, made.step_base_s, made.step_sequence_s, made.block_size) == ("n", True, 0.5, 1, 8)


def test_a_step_is_a_sum():
    made = Profile("n", "s", True, 1.0, 0.1, 0.01, 0.5, 0.001, 0.0001)
    assert made.step_s(2, 3, 6, 4, 5.0) == pytest.approx(1.0 + 0.2 + 0.03 + 3.0 + 0.004 + 0.0005)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step_bass_s": 1}, "step_bass_s"),
        ({"step_base_s": -1}, "step_base_s"),
        ({"step_base_s": "1"}, "step_base_s"),
        ({"step_base_s": True}, "step_base_s"),
        ({"step_base_s": float("nan")}, "step_base_s"),
        ({"step_base_s": float("inf")}, "step_base_s"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": 1.5}, "block_size"),
        ({"measured": 1}, "measured"),
        ({"name": ""}, "name"),
        ({"source": None}, "source"),
    ],
)
def test_what_is_wrong_is_refused_by_name(change, named):
    with pytest.raises(BadProfile, match=named):
        profile_of(json.dumps({**WHOLE, **change}))


def test_what_is_missing_is_named():
    for name in WHOLE:
        with pytest.raises(BadProfile, match=name):
            profile_of(json.dumps({key: value for key, value in WHOLE.items() if key != name}))


@pytest.mark.parametrize("text", ["", "[]", "1", "{", "[" * 100_000])
def test_what_is_no_object_is_refused(text):
    with pytest.raises(BadProfile, match="JSON object"):
        profile_of(text)


def test_every_shipped_profile_is_whole_and_says_where_it_is_from():
    assert {file.stem for file in PROFILE_FOLDER.glob("*.json")} == set(PROFILES)
    for name in PROFILES:
        made = Options(profile=name).load_profile()
        assert made is not None
        assert made.name == name
        assert len(made.source) > 20
    assert Options(profile="h200-8b").load_profile().measured is False  # no such GPU was at hand
    assert Options().load_profile() is None
