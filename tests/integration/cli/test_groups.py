"""Commands about groups of replicas, against the real control plane over made-up launches."""

import pytest

from tests.integration.cli.test_commands import Box
from tests.support.control_plane import GROUP_ID, failed, launch_id, loading, replica, view

ONE, TWO = launch_id(1), launch_id(2)


@pytest.fixture
def box(tmp_path):
    with Box(tmp_path) as made:
        yield made


def becomes(box, *views):
    """Let the launches be something else after the second look at their group."""
    looks = []

    def on_request(scope):
        if scope["path"].startswith("/status/"):
            looks.append(scope)
            if len(looks) == 2:
                for state_view in views:
                    box.launches.add(state_view)

    box.on_request = on_request


def in_group(of):
    return {"group_id": GROUP_ID, "group_size": 2, "state": of.state, "progress": of.progress, "failure": of.failure}


@pytest.mark.parametrize(("written", "sent"), [("2", 2), ("per_gpu", "per_gpu")])
def test_launch_prints_the_groups_id_in_a_pipe(box, written, sent):
    assert box.lines("launch", "org/model", "--replicas", written) == [GROUP_ID]
    assert box.launches.calls[0][0].replicas == sent
    assert len(box.run("launch", "org/model", "--replicas", written, "--json").json()["replicas"]) == 2
    out = box.run("launch", "org/model", "--replicas", written, terminal=True).out
    assert "Launching 2 replicas of org/model on GPU 0" in out
    assert f"vllm-bootstrap status {GROUP_ID}" in out


def test_one_replica_is_a_launch(box):
    assert box.lines("launch", "org/model", "--replicas", "1") == [ONE]


@pytest.mark.parametrize("written", ["0", "-1", "many", "1.5"])
def test_replicas_are_a_number_or_per_gpu(box, written):
    assert box.run("launch", "m", "--replicas", written).code == 2
    assert box.launches.calls == []


@pytest.mark.parametrize("terminal", [False, True])
def test_launch_and_wait_shows_each_replica(box, terminal):
    becomes(box, replica(1), replica(2))
    result = box.run("launch", "org/model", "--replicas", "2", "--wait", terminal=terminal)
    assert (result.code, result.err) == (0, "")
    assert "2 replicas after 1.0 s at" in result.out
    if not terminal:
        assert result.out.splitlines()[:2] == [f"{ONE}  starting", f"{TWO}  starting"]
    box.on_request = lambda _scope: None
    becomes(box, replica(1), replica(2))
    assert box.run("launch", "org/model", "--replicas", "2", "--wait", "--json").json()["ready"] == 2


def test_a_replica_that_fails_fails_the_waiting_and_nothing_else(box):
    becomes(box, replica(1), replica(2, **in_group(failed())))
    result = box.run("launch", "org/model", "--replicas", "2", "--wait")
    assert result.code == 1
    assert "failed: bad flag" in result.err
    assert f"To end them: vllm-bootstrap stop {GROUP_ID}" in result.err


def test_ps_keeps_replicas_together(box):
    box.launches.add(replica(1))
    box.launches.add(replica(2, **in_group(loading())))
    box.launches.add(view(3))
    header, *rows = box.lines("ps")
    assert header.split()[:3] == ["ID", "MODEL", "STATE"]
    assert [row.split()[0] for row in rows] == [launch_id(3), GROUP_ID, ONE, TWO]
    assert "ready, 1 of 2" in rows[1]
    assert rows[2].startswith(f"  {ONE}")
    assert "bootstrapping (loading the model, 50 %)" in rows[3]


def test_status_of_a_group(box):
    box.launches.add(replica(1))
    box.launches.add(replica(2, **in_group(failed())))
    out = box.run("status", GROUP_ID).out
    for said in (
        "ready, 1 of 2", f"{box.url}/proxy/{GROUP_ID}/v1", ONE, TWO, "failed (bad flag)", "Hint: remove it", "BATCH",
    ):  # fmt: skip
        assert said in out
    assert len(box.run("status", GROUP_ID, "--json", "--events").json()["replicas"]) == 2
    assert ["group", GROUP_ID] in [line.split() for line in box.lines("status", ONE)]


def test_a_group_may_be_named_by_its_model_or_a_part_of_its_id(box):
    box.launches.add(replica(1, served_model_name="a"))
    box.launches.add(replica(2, served_model_name="a"))
    for name in ("a", GROUP_ID[:8]):
        assert box.run("status", name, "--json").json()["group_id"] == GROUP_ID
        assert "replicas" in box.run("status", name, "--json").json()
    assert box.run("status", ONE[-8:], "--json").json()["launch_id"] == ONE
    assert box.run("stop", ONE[:8]).code == 2, "the beginning of two launches is not a group"
    box.launches.add(view(3, served_model_name="a"))
    assert box.run("status", "a").code == 2


def test_stop_and_rm_of_a_group(box):
    box.launches.add(replica(1))
    box.launches.add(replica(2))
    assert box.lines("stop", GROUP_ID) == [f"{GROUP_ID}  stopped", f"{ONE}  stopped", f"{TWO}  stopped"]
    assert box.lines("rm", GROUP_ID) == [f"{GROUP_ID}  deleted"]
