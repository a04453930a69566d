"""Whatever a launch asks for: the command line means to vLLM's parser what the daemon meant, or there is none."""

import argparse
import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engines import VllmLike, context, cuda, order
from vllm_bootstrap.engines import vllm_command
from vllm_bootstrap.engines.capabilities import capabilities, known_flags
from vllm_bootstrap.engines.policy import Policy, policy_of
from vllm_bootstrap.engines.spec import make_spec
from vllm_bootstrap.engines.versions import parse
from vllm_bootstrap.engines.vllm_command import VllmOptions
from vllm_bootstrap.errors import BadRequest

RECORDED = Path(__file__).resolve().parents[2] / "fixtures/engine_flags"
VERSIONS = sorted((path.stem for path in RECORDED.glob("0.*.txt") if path.stem.count(".") == 2), key=parse)
FLAGS = sorted(flag.removeprefix("--") for flag in known_flags())

nasty = st.sampled_from(
    [
        "--port=1",
        "-m",
        "--middleware=evil",
        "a --port 1",
        "a\n--port=1",
        "=",
        "--",
        "../x",
        "a,b",
        "x\x00",
        "--trust-remote-code",
        "-O3",
        "[1]",
        "a=b",
        "@file",
        "serve",
    ]
)
texts = st.one_of(nasty, st.text(max_size=12))
scalars = st.one_of(st.booleans(), st.integers(-5, 5), st.floats(), texts)
values = st.one_of(scalars, st.lists(scalars, max_size=3), st.dictionaries(texts, scalars, max_size=2), st.none())
names = st.one_of(
    st.sampled_from(FLAGS), st.sampled_from(FLAGS).map(lambda n: "--" + n.replace("-", "_")), nasty, texts
)


def parser(version):
    """A parser that accepts exactly what vLLM's of that version does, abbreviations included."""
    made = argparse.ArgumentParser(exit_on_error=False, add_help=False)
    for line in (RECORDED / f"{version}.txt").read_text().splitlines()[1:]:
        flag, kind = line.split()
        how = {
            "switch": {"action": "store_true"},
            "toggle": {"action": argparse.BooleanOptionalAction},
            "optional": {"nargs": "?"},
            "list": {"nargs": "+"},
            "append": {"action": "append"},
            "value": {},
        }[kind]
        made.add_argument(flag, dest=flag, default=None, **how)
    return made


@settings(max_examples=200, deadline=None)
@given(
    version=st.sampled_from(VERSIONS),
    model=texts,
    served=st.one_of(st.none(), texts),
    extra=st.dictionaries(names, values, max_size=4),
    revision=st.one_of(st.none(), texts),
)
def test_a_value_never_becomes_an_option(version, model, served, extra, revision):
    fields = {"revision": revision} if revision is not None else {}
    try:
        spec = make_spec(order(model, served_model_name=served, extra_args=extra, fields=fields), VllmLike())
        argv = vllm_command.flags(spec, cuda(), capabilities(parse(version)), VllmOptions())
    except BadRequest:
        return
    argv = [f"--model={spec.model}", *argv, *vllm_command.listen_flags(context(), capabilities(parse(version)))]
    assert not any(re.search(r"[\x00-\x1f\x7f]", arg) for arg in argv)
    seen = {flag: value for flag, value in vars(parser(version).parse_args(argv)).items() if value is not None}
    assert seen["--model"] == model
    assert seen["--served-model-name"] == [served if served is not None else model]
    assert seen.get("--revision") == revision
    ours = {
        "--model",
        "--served-model-name",
        "--revision",
        "--dtype",
        "--max-num-seqs",
        "--scheduling-policy",
        "--shutdown-timeout",
        "--disable-access-log-for-endpoints",
        "--disable-uvicorn-access-log",
        "--enable-log-requests",
        "--disable-log-requests",
        "--allowed-media-domains",
        "--uds",
        "--host",
        "--port",
    }
    asked = {"--" + name.removeprefix("--").replace("_", "-") for name in extra}
    assert seen.keys() - ours <= asked
    assert seen.get("--port") in {None, "8101"}
    for flag in seen.keys() - ours:
        assert policy_of(flag.removeprefix("--")) in {Policy.SAFE, Policy.WORD}
    assert not seen.get("--trust-remote-code")
