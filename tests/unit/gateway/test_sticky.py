"""Stored responses belong to an engine and to a key."""

from __future__ import annotations

import pytest

from vllm_bootstrap.errors import BadRequest, NotFound
from vllm_bootstrap.gateway import sticky


def test_an_id_is_known_to_its_key_only() -> None:
    kept = sticky.Responses()
    kept.remember("resp_1", "l1", "ann")
    assert kept.find("resp_1", "ann") == "l1"
    others, unknown = [], []
    for owner, response, told in (("bob", "resp_1", others), ("ann", "resp_2", unknown)):
        with pytest.raises(NotFound) as caught:
            kept.find(response, owner)
        told.append(str(caught.value).replace(response, "ID"))
    assert others == unknown, "an id of somebody else looks like one that does not exist"


def test_an_id_is_not_taken_over_and_may_move_with_its_key() -> None:
    kept = sticky.Responses()
    kept.remember("resp_1", "l1", "ann")
    kept.remember("resp_1", "l2", "bob")
    assert kept.find("resp_1", "ann") == "l1"
    kept.remember("resp_1", "l3", "ann")
    assert kept.find("resp_1", "ann") == "l3"


def test_the_id_used_longest_ago_is_forgotten_first() -> None:
    kept = sticky.Responses(most=2)
    for number in (1, 2):
        kept.remember(f"resp_{number}", "l1", "ann")
    kept.find("resp_1", "ann")
    kept.remember("resp_3", "l1", "ann")
    assert len(kept) == 2
    assert kept.find("resp_1", "ann") == kept.find("resp_3", "ann") == "l1"
    with pytest.raises(NotFound):
        kept.find("resp_2", "ann")


def test_what_a_request_says_of_stored_responses() -> None:
    assert sticky.named_before("/v1/responses", {"previous_response_id": "resp_1"}) == "resp_1"
    assert sticky.named_before("/v1/responses", {}) is None
    assert sticky.named_before("/v1/completions", {"previous_response_id": 3}) is None
    with pytest.raises(BadRequest):
        sticky.named_before("/v1/responses", {"previous_response_id": 3})
    assert sticky.is_kept("/v1/responses", {})
    assert not sticky.is_kept("/v1/responses", {"store": False})
    assert not sticky.is_kept("/v1/completions", {})
    assert sticky.named_in("/v1/responses/resp_1/cancel") == sticky.named_in("/v1/responses/resp_1") == "resp_1"
