"""How options become a launch, and how launches are named and shown."""

import pytest

from tests.support.statuses import ID, status
from vllm_bootstrap.cli import launching
from vllm_bootstrap.cli.options import UsageError, _fits


def test_engine_options_are_typed_fields_where_the_api_has_them():
    given = ["--dtype=half", "enforce-eager", "seed=0", "block-size=16", "max_num_seqs=8", "chat-template=a=b", "x=[1]"]
    typed, extra = launching.engine_options(given)
    assert typed == {"dtype": "half", "enforce_eager": True, "seed": 0, "max_num_seqs": 8}
    assert extra == {"block-size": 16, "chat-template": "a=b", "x": [1]}


@pytest.mark.parametrize("name", ["model", "gpu_ids", "replicas", "env"])
def test_fields_with_options_of_their_own_are_not_taken_from_arg(name):
    assert launching.engine_options([f"{name}=1"]) == ({}, {name: 1})


@pytest.mark.parametrize("given", ["=1", "--=1", ""])
def test_an_option_needs_a_name(given):
    with pytest.raises(UsageError):
        launching.engine_options([given])


@pytest.mark.parametrize("given", ["A", "=b", ""])
def test_pairs_need_both_parts(given):
    with pytest.raises(UsageError, match="--env"):
        launching.as_pairs("--env", [given])
    assert launching.as_pairs("--env", ["A=b=c", "B="]) == {"A": "b=c", "B": ""}


@pytest.mark.parametrize(
    ("claims", "shown"),
    [
        ([], "-"),
        ([{"uuid": "cpu", "index": 0, "share": 1}], "CPU"),
        ([{"uuid": "a", "index": 0, "share": 1}, {"uuid": "b", "index": 3, "share": 1}], "GPU 0, 3"),
        ([{"uuid": "a", "index": 0, "share": 0.25}], "GPU 0 (25 %)"),
        ([{"uuid": "GPU-ab", "share": 1}], "GPU GPU-ab"),
    ],
)
def test_devices(claims, shown):
    assert launching.gpus_of(status(gpus=claims)) == shown


@pytest.mark.parametrize(
    ("launch", "shown"),
    [
        (status("ready"), "ready"),
        (status("ready", unresponsive=True), "ready, but unresponsive"),
        (
            status("bootstrapping", progress={"phase": "weights", "fraction": 0.5, "elapsed_s": 1}),
            "bootstrapping (loading weights, 50 %)",
        ),
        (
            status("failed", failure={"class": "bad_flag", "message": "", "hint": "", "permanent": True}),
            "failed (bad flag)",
        ),
        (status("stopped"), "stopped"),
    ],
)
def test_states(launch, shown):
    assert launching.state_of(launch) == shown


@pytest.mark.parametrize(
    ("name", "fits"),
    [("org/model", True), ("short", True), (ID[:6], True), (ID[-4:], True), (ID[-2:], False), ("other", False)],
)
def test_names_of_a_launch(name, fits):
    assert _fits(status(served_model_name="short"), name) is fits
