"""The capability table against what was recorded from each release, above all against the help of a real one."""

import json
import re
from pathlib import Path

import build_engine_flags
import pytest

from tests.support.golden_commands import RECORDED
from vllm_bootstrap.engines.capabilities import (
    DATA,
    capabilities,
    known_flags,
    lifetime,
    recorded_versions,
)
from vllm_bootstrap.engines.policy import Policy, policy_of
from vllm_bootstrap.engines.versions import parse, show

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures/engine_flags"


def recorded(version):
    lines = (FIXTURES / f"{version}.txt").read_text().splitlines()[1:]
    return dict(line.split() for line in lines)


def flags_in_help(text):
    """Options of an argparse help, out of its usage block: ``[--a | --no-a]``, ``[--b B]``."""
    usage = text.split("\n\n", 1)[0]
    return {flag for flag in re.findall(r"(?<![\w-])(--[a-z0-9][a-z0-9-]*)", usage) if not flag.startswith("--no-")}


@pytest.mark.parametrize("version", RECORDED)
def test_the_table_says_what_was_recorded(version):
    assert dict(capabilities(parse(version)).kinds) == recorded(version)


def test_the_table_is_made_from_the_recordings():
    assert (DATA / "vllm_flags.json").read_text() == build_engine_flags.text()


def test_the_table_agrees_with_the_help_of_the_real_engine():
    helped = flags_in_help((FIXTURES / "0.32.0.help.txt").read_text())
    mentioned = {"--tool-parser-plugin"}  # also named inside another option's placeholder
    assert helped - mentioned == recorded("0.32.0").keys() - mentioned
    assert capabilities((0, 32, 0)).verified


def test_toggles_of_the_real_engine_can_be_turned_off():
    text = (FIXTURES / "0.32.0.help.txt").read_text().split("\n\n", 1)[0]
    off = {f"--{name}" for name in re.findall(r"\|\s+--no-([a-z0-9-]+)(?=\]|\s)", text)}
    assert off == {flag for flag, kind in recorded("0.32.0").items() if kind == "toggle"}


def test_only_installed_releases_count_as_verified():
    assert [show(v) for v in recorded_versions() if capabilities(v).verified] == ["0.32.0"]


@pytest.mark.parametrize(
    ("version", "basis"),
    [
        ((0, 8, 0), (0, 8, 5)),
        ((0, 8, 5), (0, 8, 5)),
        ((0, 11, 0), (0, 10, 2)),
        ((0, 25, 1), (0, 20, 0)),
        ((9999, 0, 0), (0, 33, 0)),
    ],
)
def test_a_version_in_between_has_what_the_nearest_lower_one_has(version, basis):
    can = capabilities(version)
    assert can.basis == basis
    assert can.kinds == capabilities(basis).kinds
    assert not can.verified


def test_versions_before_the_first_supported_one_are_refused():
    with pytest.raises(ValueError, match="too old"):
        capabilities((0, 7, 3))


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--uds", "vLLM 0.10.2 and newer"),
        ("--task", "vLLM 0.8.5 up to before 0.15.1"),
        ("--no-such-flag", "no recorded version of vLLM"),
    ],
)
def test_a_flags_lifetime_in_words(flag, words):
    assert lifetime(flag) == words


@pytest.mark.parametrize(
    ("flag", "since", "gone"),
    [
        ("--uds", (0, 10, 2), None),
        ("--shutdown-timeout", (0, 18, 1), None),
        ("--allowed-media-domains", (0, 12, 0), None),
        ("--disable-access-log-for-endpoints", (0, 18, 1), None),
        ("--disable-log-requests", (0, 8, 5), (0, 18, 1)),
        ("--task", (0, 8, 5), (0, 15, 1)),
        ("--guided-decoding-backend", (0, 8, 5), (0, 12, 0)),
        ("--device-ids", (0, 26, 0), None),
        ("--max-num-queued-reqs", (0, 32, 0), None),
        ("--swap-space", (0, 8, 5), (0, 18, 1)),
        ("--calculate-kv-scales", (0, 8, 5), (0, 32, 0)),
    ],
)
def test_flags_that_came_and_went(flag, since, gone):
    for version in recorded_versions():
        assert capabilities(version).has(flag) == (since <= version and (gone is None or version < gone)), version


def test_the_core_is_in_every_version():
    core = """--model --served-model-name --tensor-parallel-size --pipeline-parallel-size --dtype --max-model-len
        --gpu-memory-utilization --scheduling-policy --enable-lora --api-key --root-path --max-num-seqs"""
    for version in recorded_versions():
        assert set(core.split()) <= capabilities(version).kinds.keys()


def test_every_recorded_flag_is_classified_exactly_once():
    data = json.loads((DATA / "vllm_policy.json").read_text())
    classified = [name for policy in Policy for name in data[policy.value]]
    assert len(classified) == len(set(classified))
    assert {f"--{name}" for name in classified} == known_flags()


def test_what_nobody_classified_is_guarded():
    assert policy_of("a-flag-of-tomorrow") is Policy.GUARDED


@pytest.mark.parametrize(
    "name",
    [
        "trust-remote-code",
        "middleware",
        "tool-parser-plugin",
        "reasoning-parser-plugin",
        "worker-cls",
        "worker-extension-cls",
        "scheduler-cls",
        "logits-processors",
        "model-class-overrides",
        "io-processor-plugin",
        "hf-overrides",
        "model-loader-extra-config",
        "load-format",
        "tool-server",
        "config",
        "chat-template",
        "allowed-local-media-path",
        "download-dir",
        "ssl-keyfile",
        "ssl-certfile",
        "log-config-file",
        "logging-config",
        "profiler-config",
        "otlp-traces-endpoint",
        "kv-transfer-config",
        "uds",
        "host",
        "port",
        "root-path",
        "api-key",
        "additional-config",
        "numa-bind",
        "compilation-config",
        "distributed-executor-backend",
        "hf-token",
    ],
)
def test_dangerous_flags_are_never_simply_allowed(name):
    assert policy_of(name) in {Policy.GUARDED, Policy.OURS, Policy.FIELD}
    assert name == "trust-remote-code" or policy_of(name) is not Policy.FIELD
