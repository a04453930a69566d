from __future__ import annotations

import json

import pytest

from vllm_bootstrap import errors

ALL = [cls for cls in errors.BY_CODE.values() if cls is not errors.Unauthorized]


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_an_error_survives_the_way_to_the_client(cls: type[errors.ApiError]) -> None:
    sent = cls("what is wrong", param="field", retry_after=3, details={"gpus": [1]})
    got = errors.from_response(sent.status, sent.body(), sent.headers())
    assert type(got) is cls
    assert (got.message, got.param, got.retry_after, got.details) == ("what is wrong", "field", 3, {"gpus": [1]})
    assert got.body() == sent.body()


def test_the_body_has_one_shape_and_details_cannot_change_it() -> None:
    error = errors.GpuConflict("taken", param="gpu_ids", details={"code": "forged", "owner": "l1"})
    assert error.body() == {
        "error": {
            "owner": "l1", "message": "taken", "type": "conflict_error", "param": "gpu_ids", "code": "gpu_conflict",
        },
        "src": "vllm-bootstrap",
    }  # fmt: skip


def test_what_a_client_wrote_never_makes_an_error_unsendable() -> None:
    body = errors.InvalidJson("the field \ud800 is there twice", param="\udfff").body()
    assert body["error"]["param"] == "\\udfff"
    assert json.dumps(body, ensure_ascii=False).encode()


def test_every_code_names_one_class() -> None:
    codes = [cls.code for cls in errors.BY_CODE.values()]
    assert len(codes) == len(set(codes))
    assert errors.BY_CODE["internal_error"] is errors.InternalError


def test_conflicts_tell_the_stock_client_not_to_retry() -> None:
    assert errors.Conflict("no").headers() == {"x-should-retry": "false"}
    assert errors.LaunchNotReady("wait", retry_after=5, should_retry=True).headers() == {
        "retry-after": "5",
        "x-should-retry": "true",
    }


@pytest.mark.parametrize(
    ("asked", "sent"), [(0, 1), (-5, 1), (0.2, 1), (1, 1), (1.01, 2), (59.5, 60), (61, 60), (9e9, 60)]
)
def test_retry_after_is_one_to_sixty_whole_seconds(asked: float, sent: int) -> None:
    assert errors.clamp_retry_after(asked) == sent
    assert errors.Unavailable("busy", retry_after=asked).headers()["retry-after"] == str(sent)


def test_unauthorized_challenges_unless_a_script_asks() -> None:
    challenged = errors.Unauthorized()
    assert challenged.headers() == {"www-authenticate": 'Basic realm="vllm-bootstrap"'}
    silent = errors.Unauthorized(challenge=False)
    assert silent.headers() == {}
    assert silent.body() == challenged.body()
    for sent in (challenged, silent):
        got = errors.from_response(401, sent.body(), sent.headers())
        assert isinstance(got, errors.Unauthorized)
        assert got.challenge is sent.challenge


@pytest.mark.parametrize(
    ("status", "cls"),
    [
        (400, errors.BadRequest), (401, errors.Unauthorized), (404, errors.NotFound), (405, errors.MethodNotAllowed),
        (418, errors.BadRequest), (429, errors.TooManyRequests), (431, errors.HeadersTooLarge),
        (500, errors.InternalError), (503, errors.Unavailable), (507, errors.StorageFull), (599, errors.InternalError),
        (302, errors.InternalError),
    ],
)  # fmt: skip
def test_a_bare_status_has_its_class(status: int, cls: type[errors.ApiError]) -> None:
    assert type(errors.for_status(status, "framework says no")) is cls


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, {"error": {"message": "no model", "type": "NotFoundError", "code": 404}}, "no model"),
        (401, {"error": "Unauthorized"}, "Unauthorized"),
        (502, "<html>", "HTTP 502"),
        (500, None, "HTTP 500"),
        (503, {"error": {"message": "", "code": None}}, "HTTP 503"),
        (503, {"error": 7}, "HTTP 503"),
    ],
)
def test_strangers_errors_are_understood_by_status(status: int, body: object, message: str) -> None:
    got = errors.from_response(status, body)
    assert got.message == message
    assert got.status == status


def test_a_code_that_does_not_fit_its_status_is_not_believed() -> None:
    got = errors.from_response(400, {"error": {"message": "m", "code": "gpu_conflict"}})
    assert type(got) is errors.BadRequest


def test_retry_after_as_a_date_is_ignored() -> None:
    got = errors.from_response(503, {}, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"})
    assert got.retry_after is None


def test_a_failed_disk_is_not_worth_a_retry() -> None:
    assert issubclass(errors.StorageFailed, errors.Unavailable)
    assert errors.StorageFailed("disk").headers() == {"x-should-retry": "false"}
