"""What a group is said to be, from what its launches are."""

from dataclasses import replace
from itertools import product

import pytest

from tests.support.control_plane import failed, loading, replica, view
from vllm_bootstrap.launches import groups
from vllm_bootstrap.launches.types import StopOutcome


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ("ready ready", "ready"),
        ("ready failed", "ready"),
        ("ready bootstrapping", "ready"),
        ("ready stopping", "ready"),
        ("bootstrapping bootstrapping", "bootstrapping"),
        ("bootstrapping stopping", "bootstrapping"),
        ("bootstrapping failed", "bootstrapping"),
        ("asleep falling_asleep", "asleep"),
        ("waking stopping", "asleep"),
        ("asleep ready", "ready"),
        ("asleep bootstrapping", "bootstrapping"),
        ("stopping stopped", "stopping"),
        ("stopping failed", "stopping"),
        ("stopped stopped", "stopped"),
        ("stopped failed", "failed"),
        ("failed", "failed"),
    ],
)
def test_the_state_of_a_group(states, said):
    assert groups.state_of(states.split()) == said


def test_every_mixture_has_one_state_whatever_the_order():
    states = ("bootstrapping", "ready", "stopping", "stopped", "failed")
    for mixture in product(states, repeat=3):
        found = groups.state_of(mixture)
        assert found in mixture
        assert found == groups.state_of(mixture[::-1])
        assert (found in groups.ENDED) == all(state in groups.ENDED for state in mixture)


def test_a_group_shows_how_many_are_ready_and_the_last_failure():
    early = replace(failed(1), changed_at=5.0)
    late = replace(failed(3), changed_at=9.0, failure=replace(failed().failure, message="later"))
    found = groups.view_of("g", [late, replica(2), early])
    assert [one.launch_id for one in found.members] == [early.launch_id, replica(2).launch_id, late.launch_id]
    assert (found.state, found.ready, found.failure.message) == ("ready", 1, "later")
    assert found.changed_at == max(one.changed_at for one in found.members)
    assert groups.view_of("g", [view(1), view(2)]).failure is None


def test_a_group_is_unresponsive_when_all_that_are_ready_are():
    stuck = view(1, unresponsive=True)
    assert groups.view_of("g", [stuck, loading(2)]).unresponsive
    assert not groups.view_of("g", [stuck, view(2)]).unresponsive
    assert not groups.view_of("g", [loading(1)]).unresponsive


@pytest.mark.parametrize(
    ("forced", "said"),
    [((False, False), False), ((False, True), True), ((None, None), None), ((None, False), False)],
)
def test_a_stop_was_forced_when_any_was(forced, said):
    members = [StopOutcome(f"l{n}", "stopped", one, (f"GPU-{n}",)) for n, one in enumerate(forced)]
    found = groups.outcome_of("g", members)
    assert (found.launch_id, found.state, found.forced) == ("g", "stopped", said)
    assert found.unsettled_gpus == ("GPU-0", "GPU-1")
    assert found.members == tuple(members)
