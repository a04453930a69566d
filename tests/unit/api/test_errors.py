import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException

from vllm_bootstrap.api.errors import from_validation, translate
from vllm_bootstrap.errors import BadRequest, NotFound
from vllm_bootstrap.wire import LaunchRequest


def refuse(body):
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(LaunchRequest).validate_python(body)
    problems = [{**p, "loc": ("body", *p["loc"])} for p in refused.value.errors()]
    return from_validation(problems)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"model": "m", "colour": 1}, "unknown_field", "colour"),
        ({"colour": 1}, "unknown_field", "colour"),
        ({"model": "m", "restart": {"policy": "never", "often": 1}}, "unknown_field", "restart.often"),
        ({}, "bad_request", "model"),
        ({"model": ""}, "bad_request", "model"),
        ({"model": "a\nb"}, "bad_request", "model"),
        ({"model": "m", "gpu_share": 2}, "bad_request", "gpu_share"),
        ({"model": "m", "gpu_ids": [0, 1.5]}, "bad_request", "gpu_ids.1"),
        ({"model": "m", "env": {"A": 1}}, "bad_request", "env.A"),
        ({"model": "m", "replicas": "many"}, "bad_request", "replicas"),
    ],
)
def test_the_field_is_named_as_the_caller_wrote_it(body, code, param):
    error = refuse(body)
    assert (error.code, error.param) == (code, param)
    assert param in error.message


def test_a_missing_body_is_a_bad_request_without_a_field():
    error = from_validation([{"type": "missing", "loc": ("body",), "msg": "Field required"}])
    assert (error.message, error.param) == ("The body: Field required.", None)


def test_broken_json_says_where():
    problem = {"type": "json_invalid", "loc": ("body", 3), "msg": "x", "ctx": {"error": "Expecting value"}}
    error = translate(RequestValidationError([problem]))
    assert (error.code, error.message) == ("invalid_json", "The body is not valid JSON: Expecting value at position 3.")


def test_errors_of_ours_pass_and_frameworks_are_translated():
    ours = BadRequest("x")
    assert translate(ours) is ours
    assert isinstance(translate(HTTPException(404, "gone")), NotFound)


def test_what_nobody_expected_tells_nothing():
    error = translate(RuntimeError("secret detail"))
    assert (error.status, error.code) == (500, "internal_error")
    assert "secret" not in str(error.body())
