"""Calls about the catalogue as values, and when waiting for a model is over."""

from datetime import UTC, datetime

import pytest

from vllm_bootstrap.sdk import model_calls as calls
from vllm_bootstrap.sdk.failures import LoadFailed
from vllm_bootstrap.wire_models import ModelEntry, ModelFailure, ModelStatus


def status(state, **fields):
    return ModelStatus(name="org/chat", state=state, origin="file", entry=ModelEntry(source="hub/chat"), **fields)


def test_a_name_is_one_segment_whatever_stands_in_it():
    assert calls.model("org/chat").path == "/models/org%2Fchat"
    assert calls.delete_adapter("a/b", "c d").path == "/models/a%2Fb/adapters/c%20d"


def test_only_what_is_said_is_sent():
    assert calls.check("m", None, 5).body == {"max_model_len": 5}
    assert calls.add("m", "s", {"revision": None, "pin": False}).body == {"name": "m", "source": "s", "pin": False}
    assert calls.models({"state": "loaded"}).params == {"state": "loaded"}
    assert calls.unload("m", force=False, timeout_s=1).params == {}


def test_what_changes_something_for_good_is_not_repeated_by_itself():
    assert not any(call.may_repeat for call in (calls.add("m", "s", {}), calls.remove("m"), calls.delete_files("m")))
    assert calls.load("m").may_repeat


def test_a_load_is_over_when_it_is_loaded():
    loading = calls.Loading()
    assert [loading.is_over(status(state)) for state in ("unloaded", "asleep", "waking", "unresponsive", "loaded")] == [
        False, False, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("state", ["unloaded", "asleep"])
def test_a_load_is_over_when_the_model_is_put_away_again(state):
    loading = calls.Loading()
    assert not loading.is_over(status("loading"))
    with pytest.raises(LoadFailed, match=r"org/chat was put away before it was loaded$"):
        loading.is_over(status(state))


def test_a_failure_says_what_is_known_of_it():
    with pytest.raises(LoadFailed, match=r"could not be loaded: no GPU has room$"):
        calls.Loading().is_over(status("failed", why="no GPU has room"))
    failure = ModelFailure(failure_class="oom", message="Too big.", hint="", at=datetime.now(UTC))
    with pytest.raises(LoadFailed, match=r"could not be loaded \(oom\): Too big\.$"):
        calls.Loading().is_over(status("failed", failure=failure))
