import pytest

from tests.support import engines
from tests.support.aio import run
from vllm_bootstrap.engines.base import ExitFacts, FailureClass, LaunchSpec, Placement
from vllm_bootstrap.engines.engines_file import parse_engines
from vllm_bootstrap.engines.external import ExternalEngine
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.serving import Endpoint

NONE = Placement("none")


def engine(environ=None, **changes):
    entry = {"kind": "external", "url": "http://127.0.0.1:8001", "served_names": ["lab"], "slots": 32, **changes}
    return ExternalEngine("mine", parse_engines({"engines": {"mine": entry}})["mine"], environ or {})


def spec(**changes):
    return LaunchSpec(**{"model": "lab", "engine": "mine", "served_model_name": "lab", **changes})


def refused(made, launch=None):
    with pytest.raises(BadRequest) as caught:
        run(made.check(launch or spec(), NONE))
    return caught.value


def test_no_process_and_no_gpu():
    made = engine()
    run(made.check(spec(), NONE))
    command = made.command(spec(), NONE, engines.context())
    assert command.argv is None
    assert command.endpoint == Endpoint(host="127.0.0.1", port=8001)
    assert (command.env, command.secrets) == ({}, ())
    assert made.external
    assert not made.needs_port(spec())
    assert made.attention_heads(spec()) is None
    assert made.progress("anything") is None
    assert made.explain(ExitFacts(None, None, was_ready=True), []).failure_class is FailureClass.ENGINE_DIED


def test_only_names_that_it_serves():
    assert refused(engine(), spec(model="x", served_model_name="x")).param == "model"
    assert refused(engine(), spec(served_model_name="x")).param == "served_model_name"
    run(engine().check(spec(model="org/whatever"), NONE))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"fields": {"dtype": "half"}}, "dtype"),
        ({"extra_args": {"a": 1}}, "extra_args.a"),
        ({"env": {"A": "1"}}, "env.A"),
    ],
)
def test_nothing_can_be_set(changes, param):
    assert refused(engine(), spec(**changes)).param == param


def test_a_key_from_the_environment():
    made = engine({"LAB_KEY": "secret"}, credential_env="LAB_KEY")
    command = made.command(spec(), NONE, engines.context())
    assert command.endpoint.credential == "secret"
    assert command.secrets == ("secret",)


def test_a_key_from_a_file_is_read_each_time(tmp_path):
    path = tmp_path / "key"
    path.write_text("first\n")
    made = engine(credential_file=str(path))
    assert made.command(spec(), NONE, engines.context()).endpoint.credential == "first"
    path.write_text("second\n")
    assert made.command(spec(), NONE, engines.context()).endpoint.credential == "second"


@pytest.mark.parametrize("key", ["", "a\nb", "ключ"])
def test_keys_that_cannot_be_sent(key):
    error = refused(engine({"LAB_KEY": key}, credential_env="LAB_KEY"))
    assert error.param == "engine"
    assert "LAB_KEY" in error.message
    assert not key or key not in error.message


def test_a_key_file_that_is_missing(tmp_path):
    assert "key" in refused(engine(credential_file=str(tmp_path / "none"))).message


def test_traits():
    traits = engine(priority="header", has_metrics=True, health="/h", allows_http_media=True).traits(spec())
    assert (traits.slots, traits.priority_header, traits.priority_field) == (32, True, False)
    assert (traits.has_metrics, traits.health_path, traits.refuses_http_media) == (True, "/h", False)
