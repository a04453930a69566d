"""What stored launches and the supervisor's numbers say of themselves."""

from dataclasses import fields

import pytest

from vllm_bootstrap.launches.config import SupervisorConfig
from vllm_bootstrap.launches.records import IdempotentReplay, StaleTransition


def test_a_repeated_create_says_what_it_made_before():
    replay = IdempotentReplay("l1", "hash")
    assert str(replay) == "already accepted as l1"
    assert (replay.launch_id, replay.request_hash) == ("l1", "hash")


@pytest.mark.parametrize(("found", "said"), [("ready/2", "ready/2"), (None, "no such launch")])
def test_a_stale_transition_says_what_was_there_instead(found, said):
    assert str(StaleTransition("l1", "bootstrapping/1", found)) == f"l1: expected bootstrapping/1, found {said}"


def test_no_secret_is_in_the_text_of_a_configuration():
    shown = repr(SupervisorConfig(**{field.name: f"<{field.name}>" for field in fields(SupervisorConfig)}))
    hidden = {field.name for field in fields(SupervisorConfig) if f"<{field.name}>" not in shown}
    assert hidden == {"instance_secret", "base_env", "hf_token"}
