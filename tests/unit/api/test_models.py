from dataclasses import replace
from typing import get_args

from tests.support.control_plane import NOW, advert, launch_id, view
from tests.support.model_desk import entry, rich
from vllm_bootstrap.api.models import ModelStatus, catalogued, merged, models
from vllm_bootstrap.auth.scopes import ALL
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.models.types import ModelLaunch, ModelState, ModelView

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
        "parent": None,
        "alias_of": None,
        "max_model_len": None,
        "description": None,
    }


def test_status_follows_the_launch():
    states = {"bootstrapping": "loading", "ready": "unresponsive", "stopping": "unloading", "asleep": "asleep"}
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


# -- the catalogue among them ---------------------------------------------------------------------------------------


def configured(*views, caller=ROOT):
    return catalogued(views, caller, created=NOW)


def test_a_configured_model_has_its_names_aliases_and_adapters():
    found = configured(ModelView(rich(), "unloaded"))
    assert {name: (info.alias_of, info.parent, info.root) for name, info in found.items()} == {
        "org/chat": (None, None, "hub/chat"),
        "chat": ("org/chat", None, "hub/chat"),
        "gpt-4o": ("org/chat", None, "hub/chat"),
        "sql": (None, "org/chat", "hub/sql-lora"),
        "sql-2": ("sql", "org/chat", "hub/sql-lora"),
    }
    chat = found["chat"]
    assert (chat.created, chat.status, chat.launch_ids) == (int(NOW), "unloaded", [])
    assert (chat.max_model_len, chat.description) == (8192, "For talk.")
    assert found["sql"].description is None


def test_an_automatic_length_is_not_a_length():
    found = configured(ModelView(entry(args={"max_model_len": "auto"}), "unloaded"))
    assert found["org/chat"].max_model_len is None


def test_states_in_the_words_that_clients_of_v1_know():
    known = {state: configured(ModelView(entry(), state))["org/chat"].status for state in get_args(ModelState)}
    assert set(get_args(ModelStatus)) == set(known.values())
    assert (known["waking"], known["falling_asleep"]) == ("loading", "unloading")


def test_a_key_sees_configured_models_by_name_and_source():
    view_ = ModelView(rich(), "unloaded")
    assert list(configured(view_, caller=replace(ROOT, models=("chat", "hub/*")))) == ["chat"]
    assert not configured(view_, caller=replace(ROOT, models=("chat", "org/chat")))


def test_a_launch_of_the_catalogue_and_its_model_are_one():
    launch = ModelLaunch(launch_id(1), "ready", 0)
    chat = ModelView(rich("model"), "loaded", launches=(launch,), loaded_at=NOW + 5)
    served = listed((view(1, model="hub/model"), True))
    found = merged(configured(chat), served)
    assert list(found) == ["chat", "gpt-4o", "model", "sql", "sql-2"]
    assert (found["model"].launch_ids, found["model"].created) == ([launch_id(1)], int(NOW))
    assert found["model"].description == "For talk."


def test_another_launch_of_the_same_name_serves_the_model():
    found = merged(configured(ModelView(entry("model"), "failed")), listed((view(1, created_at=NOW + 3), True)))
    assert (found["model"].status, found["model"].launch_ids) == ("loaded", [launch_id(1)])
    assert found["model"].created == int(NOW) + 3
