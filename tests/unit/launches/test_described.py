"""What the next daemon reads about a running engine is what this one knew."""

import json
from dataclasses import replace

from vllm_bootstrap.engines.base import Traits
from vllm_bootstrap.launches.described import row_of, traits_in
from vllm_bootstrap.serving import Endpoint, EngineRoute

ROUTES = (
    EngineRoute("POST", "/v1/x", frozenset({"realtime", "batch"}), inference=True),
    EngineRoute("GET", "/v1/y/*", frozenset({"monitor"}), websocket=True),
)
TRAITS = Traits(ROUTES, 7, priority_header=True, refuses_http_media=True, has_metrics=False, health_path="/h")
FRESH = Traits((), 99)


def stored(traits: Traits = TRAITS) -> dict:
    return json.loads(json.dumps(row_of(Endpoint(uds="/run/x", credential="secret"), traits)))


def test_traits_come_back_as_they_were():
    assert traits_in(stored(), FRESH) == TRAITS


def test_the_credential_is_not_stored():
    assert "secret" not in json.dumps(stored())
    assert stored()["uds"] == "/run/x"


def test_what_an_earlier_version_did_not_store_is_taken_from_now():
    row = stored()
    for gone in (None, {}, {"uds": "/run/x"}):
        assert traits_in(gone, FRESH) is FRESH
    del row["traits"]["slots"]
    assert traits_in(row, FRESH) == replace(TRAITS, slots=99)


def test_a_version_that_knew_no_sleep_says_nothing_of_it():
    row = stored()
    del row["traits"]["sleep_levels"]
    assert traits_in(row, replace(FRESH, sleep_levels=(1,))) == replace(TRAITS, sleep_levels=(1,))


def test_what_a_later_version_stored_is_left_alone():
    row = stored()
    row["traits"]["colour"] = row["traits"]["routes"][0]["colour"] = "red"
    assert traits_in(row, FRESH) == TRAITS
