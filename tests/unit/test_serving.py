"""Where an engine listens: one way, said completely."""

from __future__ import annotations

import pytest

from vllm_bootstrap.serving import Endpoint, EngineRoute


@pytest.mark.parametrize(
    "given",
    [{}, {"host": "127.0.0.1"}, {"port": 8100}, {"uds": "/run/e.sock", "host": "127.0.0.1", "port": 8100}],
    ids=["nothing", "no port", "no host", "both"],
)
def test_an_endpoint_is_either_a_socket_or_an_address(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="either"):
        Endpoint(**given)  # type: ignore[arg-type]


def test_the_authority_is_what_the_host_header_says() -> None:
    assert Endpoint(uds="/run/e.sock").authority == "localhost"
    assert Endpoint(host="127.0.0.1", port=8100).authority == "127.0.0.1:8100"


def test_its_credential_is_not_shown() -> None:
    assert "s3cret" not in repr(Endpoint(uds="/run/e.sock", credential="s3cret"))


@pytest.mark.parametrize(
    ("pattern", "method", "path", "fits"),
    [
        ("/v1/models", "GET", "/v1/models", True),
        ("/v1/models", "POST", "/v1/models", False),
        ("/v1/models", "GET", "/v1/models/x", False),
        ("/v1/responses/*", "GET", "/v1/responses/resp_1", True),
        ("/v1/responses/*", "GET", "/v1/responses/", False),
        ("/v1/responses/*", "GET", "/v1/responses", False),
        ("/v1/responses/*", "GET", "/v1/responses/resp_1/cancel", False),
        ("/v1/responses/*", "GET", "/v1/other/resp_1", False),
        ("/v1/responses/*/cancel", "GET", "/v1/responses/resp_1/cancel", True),
        ("/v1/responses/*/cancel", "GET", "/v1/responses/resp_1", False),
        ("/v1/responses/*/cancel", "GET", "/v1/responses/cancel", False),
        ("/v1/responses/*/cancel", "GET", "/v1/responses//cancel", False),
        ("/v1/responses/*/cancel", "GET", "/v1/responses/a/b/cancel", False),
    ],
)
def test_a_route_is_exact_or_open_in_its_last_segment(pattern: str, method: str, path: str, fits: bool) -> None:
    route = EngineRoute("GET", pattern, frozenset({"realtime"}))
    assert route.matches(method, path) is fits
