"""Groups of replicas through the whole control plane."""

import pytest

from tests.support.control_plane import GROUP_ID, Browser, failed, launch_id, make, one_key_each, replica, view

IDS = [launch_id(1), launch_id(2)]


@pytest.fixture
def services():
    return make()


@pytest.fixture
def browser(services):
    return Browser(services)


@pytest.mark.parametrize("replicas", [2, "per_gpu"])
def test_a_launch_of_replicas_answers_with_the_group(services, browser, replicas):
    answer = browser.post("/launch", {"model": "org/model", "replicas": replicas}, idempotency_key="abc")
    assert answer.status == 201
    assert answer.headers["location"] == f"/status/{GROUP_ID}"
    group = answer.json()
    assert (group["object"], group["group_id"], group["state"], group["ready"]) == (
        "group",
        GROUP_ID,
        "bootstrapping",
        0,
    )
    assert [one["launch_id"] for one in group["replicas"]] == IDS
    assert {(one["group_id"], one["group_size"]) for one in group["replicas"]} == {(GROUP_ID, 2)}
    ((order, _, sent_key),) = services.supervisor.calls
    assert (order.replicas, sent_key) == (replicas, "abc")


def test_one_replica_is_answered_as_a_launch(services, browser):
    answer = browser.post("/launch", {"model": "org/model", "replicas": 1}).json()
    assert (answer["launch_id"], answer["group_id"], answer["group_size"]) == (IDS[0], IDS[0], 1)
    assert "object" not in answer


def test_the_status_of_a_group_sums_up_its_launches(services, browser):
    services.supervisor.add(replica(1))
    services.supervisor.add(replica(2, state="bootstrapping", pid=None))
    services.supervisor.add(view(3))
    group = browser.get(f"/status/{GROUP_ID}").json()
    assert (group["state"], group["ready"], group["proxy_url"]) == ("ready", 1, f"/proxy/{GROUP_ID}")
    assert [one["state"] for one in group["replicas"]] == ["ready", "bootstrapping"]
    assert len(group["gpus"]) == 2
    load = group["load"]
    assert (load["capacity"], load["in_flight"]["realtime"]) == (8, 4)
    assert load["queued"]["batch"] == 3, "what waits for any of them waits once"
    listed = browser.get(f"/launches?group={GROUP_ID}").json()["data"]
    assert sorted(one["launch_id"] for one in listed) == IDS
    assert browser.get("/launches?group=g-unknown").json()["data"] == []


@pytest.mark.parametrize(("token", "sees"), [("monitor", False), ("admin", True)])
def test_log_lines_of_a_groups_failure_need_the_scope_logs(token, sees):
    services = make(one_key_each())
    services.supervisor.add(replica(1))
    failure = failed().failure
    services.supervisor.add(replica(2, state="failed", failure=failure))
    group = Browser(services, token).get(f"/status/{GROUP_ID}").json()
    assert group["failure"]["class"] == "bad_flag"
    assert (group["failure"]["lines"] is not None) is sees
    assert (group["replicas"][1]["failure"]["lines"] is not None) is sees


def test_a_group_is_stopped_and_forgotten_by_its_id(services, browser):
    for number in (1, 2):
        services.supervisor.add(replica(number))
    assert browser.call("DELETE", f"/launches/{GROUP_ID}").status == 409
    waiting_not = browser.post(f"/stop/{GROUP_ID}?wait=false")
    assert (waiting_not.status, waiting_not.json()["state"]) == (202, "ready")
    answer = browser.post(f"/stop/{GROUP_ID}?force=true")
    assert answer.status == 200
    assert (answer.json()["launch_id"], answer.json()["state"], answer.json()["forced"]) == (GROUP_ID, "stopped", True)
    assert [one["launch_id"] for one in answer.json()["replicas"]] == IDS
    assert browser.call("DELETE", f"/launches/{GROUP_ID}").json()["deleted"] is True
    assert browser.get(f"/status/{GROUP_ID}").status == 404


def test_a_log_belongs_to_one_launch(services, browser):
    services.supervisor.add(replica(1))
    refused = browser.get(f"/logs/{GROUP_ID}")
    assert (refused.status, refused.error["param"]) == (400, "launch_id")
