"""Models are judged by the rules of launches, when the catalogue is read."""

from __future__ import annotations

import pytest

from vllm_bootstrap.engines import build_engines
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.models.checks import checker
from vllm_bootstrap.models.types import AdapterEntry, ModelEntry


def refused(check, **fields) -> str | None:
    with pytest.raises(BadRequest) as caught:
        check(ModelEntry(**{"name": "q", "source": "org/q", **fields}))
    return caught.value.param


def test_what_no_launch_could_have_is_refused():
    check = checker(build_engines(), "vllm")
    check(ModelEntry("q", "org/q", aliases=("a",), adapters=(AdapterEntry("l", "/l"),), args={"dtype": "half"}))
    assert refused(check, source="../x") == "model"
    assert refused(check, name="-q") == "served_model_name"
    assert refused(check, engine="sglang") == "engine"
    assert refused(check, args={"trust_remote_code": True}) == "trust_remote_code"
    assert refused(check, extra_args={"enable-loras": True}) == "extra_args.enable-loras"
    assert refused(check, env={"LD_PRELOAD": "x"}) == "env.LD_PRELOAD"


def test_what_the_operator_allows_is_allowed():
    check = checker(build_engines(), "vllm", ["trust-remote-code"])
    check(ModelEntry("q", "org/q", args={"trust_remote_code": True}))


def test_the_default_engine_decides_where_none_is_named():
    entry = ModelEntry("q", "org/q", extra_args={"boot-delay": 1})
    checker(build_engines(), "simulator")(entry)
    with pytest.raises(BadRequest, match="not a flag of any known vLLM"):
        checker(build_engines(), "vllm")(entry)
