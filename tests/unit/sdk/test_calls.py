"""What the clients send, as values."""

import json
import typing

import pytest

from tests.support.statuses import status
from vllm_bootstrap.sdk import calls
from vllm_bootstrap.sdk.calls import LaunchFields
from vllm_bootstrap.sdk.failures import UnexpectedAnswer
from vllm_bootstrap.sdk.sse import ServerEvent
from vllm_bootstrap.wire import LaunchGroup, LaunchRequest


def test_typed_fields_are_those_of_the_api():
    assert set(typing.get_type_hints(LaunchFields)) == set(LaunchRequest.model_fields) - {"model", "replicas"}


def test_a_launch_sends_only_what_was_given_and_may_be_repeated():
    call = calls.launch("m", {"gpu_count": 1, "engine": None, "seed": 0, "extra_args": {}}, "k-1")
    assert (call.method, call.path, call.may_repeat) == ("POST", "/launch", True)
    assert call.body == {"model": "m", "gpu_count": 1, "seed": 0, "extra_args": {}}
    assert call.headers == {"idempotency-key": "k-1"}
    assert calls.launch("m", {}, "k-1", "per_gpu").body == {"model": "m", "replicas": "per_gpu"}


def test_a_group_is_not_taken_for_a_launch_nor_a_launch_for_a_group():
    one = status()
    group = LaunchGroup.model_validate({**one.model_dump(), "ready": 1, "replicas": [one.model_dump()]})
    of_one, of_group = one.model_dump_json().encode(), group.model_dump_json().encode()
    assert calls.launch("m", {}, "k").read(of_one) == calls.status("l").read(of_one) == one
    assert calls.launch("m", {}, "k").read(of_group) == calls.group("g").read(of_group) == group
    for call, content in ((calls.status("g"), of_group), (calls.group("l"), of_one)):
        with pytest.raises(UnexpectedAnswer):
            call.read(content)


@pytest.mark.parametrize("launch_id", ["../../x", "a b", "l/1?x"])
def test_ids_cannot_leave_their_place_in_the_path(launch_id):
    for call in (calls.status(launch_id), calls.delete(launch_id), calls.events(launch_id, 0, 1)):
        assert call.path.count("/") == {"/status": 2, "/launch": 2}[call.path[:7]] + call.path.endswith("/events")
        assert "?" not in call.path


def test_parameters_left_out_are_not_sent():
    assert calls.logs("l", offset=None, limit=None, tail=None, attempt=None).params == {}
    assert calls.logs("l", offset=0, limit=None, tail=None, attempt=2).params == {"offset": 0, "attempt": 2}
    assert calls.launches(include_ended=False, after=None, limit=5).params == {"limit": 5}
    assert calls.launches(include_ended=True, after="x", limit=5).params == {"all": "true", "after": "x", "limit": 5}


def test_only_a_waiting_stop_is_patient():
    assert calls.stop("l", wait=True, force=False, timeout_s=9).timeout_s == 9
    waiting_not = calls.stop("l", wait=False, force=True, timeout_s=9)
    assert (waiting_not.timeout_s, waiting_not.params) == (None, {"wait": "false", "force": "true"})


def test_forgetting_is_not_repeated():
    assert not calls.delete("l").may_repeat  # the second time would say "not found"


def test_a_log_goes_on_where_it_was_and_in_the_same_attempt():
    began = calls.follow_logs("l", offset=None, tail=5, attempt=None)
    assert began.headers() == {"accept": "text/event-stream"}
    event = ServerEvent(json.dumps({"attempt": 3}), id="120")
    again = calls.resumed(began, event)
    assert again.params == {"attempt": 3}
    assert again.headers()["last-event-id"] == "120"
    assert calls.resumed(again, ServerEvent("{}", id="130")).params == {"attempt": 3}


def test_history_goes_on_behind_the_last_event():
    began = calls.follow_events("l", after=4)
    again = calls.resumed(began, ServerEvent('{"attempt": 1}', id="9"))
    assert (again.params, again.last_id) == ({}, "9")
    assert calls.resumed(again, ServerEvent("{}")) is again


def test_headers_hold_the_key_only_when_there_is_one():
    assert "authorization" not in calls.base_headers(None, "1")
    assert calls.base_headers("k", "1")["authorization"] == "Bearer k"
