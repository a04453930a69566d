from dataclasses import replace

from tests.support.control_plane import NOW, advert, launch_id, view
from vllm_bootstrap.api.models import models
from vllm_bootstrap.auth.scopes import ALL
from vllm_bootstrap.auth.types import Principal

ROOT = Principal("root", ALL)


def listed(*pairs, caller=ROOT):
    launches = {found.launch_id: found for found, _ in pairs}
    return models([advert(found, routable=routable) for found, routable in pairs], launches, caller)


def test_a_model_has_openais_fields_and_ours():
    (found,) = listed((view(1), True)).values()
    assert found.model_dump() == {
        "id": "model",
        "object": "model",
        "created": int(NOW),
        "owned_by": "vllm-bootstrap",
        "root": "org/model",
        "status": "loaded",
        "launch_ids": [launch_id(1)],
    }


def test_status_follows_the_launch():
    states = {"bootstrapping": "loading", "ready": "unresponsive", "stopping": "unloading"}
    for state, status in states.items():
        assert listed((view(1, state=state), False))["model"].status == status


def test_launches_of_one_name_are_one_model_in_its_best_state():
    pairs = [(view(1, state="stopping"), False), (view(3, created_at=NOW + 9), True), (view(2), False)]
    (found,) = listed(*pairs).values()
    assert (found.status, found.created) == ("loaded", int(NOW))
    assert found.launch_ids == [launch_id(1), launch_id(2), launch_id(3)]


def test_a_key_sees_only_what_it_may_use_by_name_and_by_base_model():
    pair = (view(1, served_model_name="chat", model="org/secret"), True)
    assert listed(pair, caller=replace(ROOT, models=("chat", "org/*")))
    assert not listed(pair, caller=replace(ROOT, models=("chat",)))
    assert not listed(pair, caller=replace(ROOT, models=("org/*",)))


def test_ended_launches_serve_nothing():
    assert models([advert(view(1))], {}, ROOT) == {}
