"""The committed snapshot of the public API, and the data plane's part of it."""

import json

from openapi_snapshot import SNAPSHOT, breaking_changes, current

from vllm_bootstrap.api.openapi import data_plane
from vllm_bootstrap.gateway.targets import BY_MODEL


def test_no_breaking_change_and_the_snapshot_is_current():
    stored, document = json.loads(SNAPSHOT.read_text(encoding="utf-8")), current()
    assert breaking_changes(stored, document) == []
    assert stored == document, "run: python scripts/openapi_snapshot.py --update"


def test_every_route_by_model_name_is_described():
    described = {(operation.method, operation.path) for operation in data_plane()}
    assert {(route.method, route.path) for route in BY_MODEL.values()} <= described
