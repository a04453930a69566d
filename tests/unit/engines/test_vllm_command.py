"""What vLLM is told, by version: agreed-on command lines, and rules that hold for all of them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import engines
from tests.support.golden_commands import BETWEEN, FOLDER, RECORDED, SCENARIOS, command, golden
from vllm_bootstrap.engines import vllm_command
from vllm_bootstrap.engines.capabilities import capabilities
from vllm_bootstrap.engines.versions import parse, show
from vllm_bootstrap.engines.vllm_command import VllmOptions
from vllm_bootstrap.errors import BadRequest

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
ALL = (*RECORDED, *BETWEEN)


def flags(version, spec=None, placement=None, **options):
    return vllm_command.flags(
        spec or engines.spec(), placement or engines.cuda(), capabilities(parse(version)), VllmOptions(**options)
    )


def refused(version, spec, placement=None):
    with pytest.raises(BadRequest) as caught:
        flags(version, spec, placement)
    return caught.value


@pytest.mark.parametrize("version", ALL)
def test_the_command_is_the_one_agreed_on(version):
    assert golden(version) == json.loads((FOLDER / f"{version}.json").read_text())


@pytest.mark.parametrize("version", ALL)
def test_only_flags_that_the_version_has(version):
    basis = show(capabilities(parse(version)).basis)
    known = {line.split()[0] for line in (FIXTURES / "engine_flags" / f"{basis}.txt").read_text().splitlines()[1:]}
    for name, made in golden(version).items():
        given = [re.sub(r"^--no-", "--", arg.partition("=")[0]) for arg in made["argv"] if arg.startswith("--")]
        assert set(given) <= known, name
        assert len(given) == len(set(given)), name


@pytest.mark.parametrize("version", ALL)
def test_only_variables_that_the_version_knows(version):
    basis = show(capabilities(parse(version)).basis)
    known = set((FIXTURES / "engine_env" / f"{basis}.txt").read_text().split())
    for name, made in golden(version).items():
        assert {key for key in made["env"] if key.startswith("VLLM_")} <= known, name


@pytest.mark.parametrize("version", ALL)
def test_secrets_are_in_the_environment_only(version):
    for made in golden(version).values():
        assert not any(engines.KEY in arg or engines.HF_TOKEN in arg for arg in made["argv"])
        assert made["env"]["HF_TOKEN"] == engines.HF_TOKEN


def test_without_a_hub_token_there_is_none():
    env = vllm_command.environment(
        engines.spec(), engines.cuda(), engines.context(hf_token=None), capabilities((0, 32, 0)), VllmOptions(), None
    )
    assert "HF_TOKEN" not in env
    assert "HF_HOME" not in env
    assert env["PATH"] == "/usr/bin"


@pytest.mark.parametrize(
    ("version", "by_uuid"), [("0.20.0", False), ("0.25.1", False), ("0.26.0", True), ("0.33.0", True)]
)
def test_gpus_are_named_by_uuid_only_where_that_is_understood(version, by_uuid):
    env = command(version, *SCENARIOS["two GPUs, everything given"])["env"]
    assert env["CUDA_VISIBLE_DEVICES"] == ("GPU-a,GPU-b" if by_uuid else "2,3")
    assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


@pytest.mark.parametrize(
    ("version", "socket"), [("0.9.2", False), ("0.10.1", False), ("0.10.2", True), ("0.33.0", True)]
)
def test_a_unix_socket_where_it_can_listen_on_one_else_a_port_and_a_key(version, socket):
    made = command(version, *SCENARIOS["cpu"])
    assert any(arg.startswith("--uds=") for arg in made["argv"]) == socket
    assert any(arg.startswith("--port=") for arg in made["argv"]) != socket
    assert ("VLLM_API_KEY" in made["env"]) != socket


@pytest.mark.parametrize(
    ("spec", "placement", "dtype"),
    [
        (engines.spec(), engines.cuda(capability=(8, 0)), "bfloat16"),
        (engines.spec(), engines.cuda(capability=(7, 5)), "float16"),
        (engines.spec(), engines.cuda(capability=None), "auto"),
        (engines.spec(), engines.cpu(), "float32"),
        (engines.spec(dtype="auto"), engines.cuda(capability=(9, 0)), "bfloat16"),
        (engines.spec(dtype="half"), engines.cuda(capability=(9, 0)), "half"),
        (engines.spec(dtype="bfloat16"), engines.cpu(), "bfloat16"),
        (engines.spec(quantization="awq"), engines.cuda(), "auto"),
    ],
)
def test_dtype(spec, placement, dtype):
    assert vllm_command.dtype(spec, placement) == dtype


def test_mixed_gpus_get_what_the_oldest_can():
    old, new = engines.cuda(capability=(7, 5)).gpus[0], engines.cuda(capability=(9, 0)).gpus[0]
    placement = engines.cuda()
    mixed = type(placement)("cuda", (new, old))
    assert vllm_command.dtype(engines.spec(), mixed) == "float16"


@pytest.mark.parametrize(
    ("spec", "placement", "fraction"),
    [
        (engines.spec(), engines.cuda(), None),
        (engines.spec(gpu_memory_utilization=0.7), engines.cuda(), 0.7),
        (engines.spec(), engines.cuda(share=500), 0.45),
        (engines.spec(), engines.cuda(share=333), 0.3),
        (engines.spec(gpu_memory_utilization=0.5), engines.cuda(share=500), 0.5),
        (engines.spec(), engines.cpu(), None),
        (engines.spec(gpu_memory_utilization=0.5), engines.cpu(), 0.5),
    ],
)
def test_memory_fraction_follows_the_share(spec, placement, fraction):
    assert vllm_command.memory_fraction(spec, placement) == fraction


def test_more_than_the_share_is_refused():
    error = refused("0.32.0", engines.spec(gpu_memory_utilization=0.6), engines.cuda(share=500))
    assert error.param == "gpu_memory_utilization"


@pytest.mark.parametrize(
    ("fields", "slots"),
    [
        ({}, 256),
        ({"max_num_seqs": 8}, 8),
        ({"max_num_batched_tokens": 64}, 64),
        ({"max_num_batched_tokens": 4096}, 256),
    ],
)
def test_slots_are_what_the_engine_is_told(fields, slots):
    spec = engines.spec(**fields)
    assert vllm_command.slots(spec) == slots
    assert f"--max-num-seqs={slots}" in flags("0.32.0", spec)


def test_an_unsupported_flag_names_field_and_version():
    error = refused("0.9.2", engines.spec(kv_cache_memory_bytes=1))
    assert error.param == "kv_cache_memory_bytes"
    assert "vLLM 0.9.2 has no --kv-cache-memory-bytes" in error.message
    assert "0.10.2 and newer" in error.message
    error = refused("0.32.0", engines.spec(extra={"task": "embed"}))
    assert error.param == "extra_args.task"


def test_automatic_length_needs_a_newer_release():
    assert refused("0.12.0", engines.spec(max_model_len="auto")).param == "max_model_len"
    assert "--max-model-len=auto" in flags("0.15.1", engines.spec(max_model_len="auto"))


def test_a_flag_that_took_its_value_differently_before():
    off = engines.spec(extra={"enable-auto-tool-choice": False})
    assert "--no-enable-auto-tool-choice" in flags("0.32.0", off)
    assert not any("auto-tool-choice" in arg for arg in flags("0.8.5", off))


def test_media_are_fetched_from_nowhere_unless_the_operator_allows():
    assert "--allowed-media-domains media-disabled.invalid" in " ".join(flags("0.12.0"))
    assert "--allowed-media-domains a.org b.org" in " ".join(flags("0.12.0", allowed_media_domains=("a.org", "b.org")))
    assert "--allowed-media-domains" not in flags("0.12.0", allowed_media_domains=("*",))
    assert "--allowed-media-domains" not in flags("0.10.2")


@pytest.mark.parametrize("domain", ["", "--x", "a b", "http://a.org", "a/b", ".a"])
def test_domains_that_are_none(domain):
    with pytest.raises(ValueError, match="host name"):
        vllm_command.check_domains((domain,))


def test_domains():
    vllm_command.check_domains(("*", "a.org", "localhost", "10.0.0.1"))


def test_the_engine_drains_before_it_is_killed():
    assert "--shutdown-timeout=8" in flags("0.32.0", stop_grace_s=10.0)
    assert "--shutdown-timeout=0" in flags("0.32.0", stop_grace_s=1.0)


def test_a_launch_may_ask_for_request_logs():
    asked = flags("0.32.0", engines.spec(extra={"enable-log-requests": True}))
    assert "--enable-log-requests" in asked
    assert "--no-enable-log-requests" not in asked


def test_eager_mode_on_a_cpu_is_only_a_default():
    assert "--enforce-eager" in flags("0.32.0", placement=engines.cpu())
    assert "--no-enforce-eager" in flags("0.32.0", engines.spec(enforce_eager=False), engines.cpu())
    assert "--enforce-eager" not in flags("0.32.0")


@pytest.mark.parametrize("fields", [{"kv_cache_memory_bytes": 1}, {"gpu_memory_utilization": 0.5}])
def test_the_cpu_cache_has_a_size_unless_one_was_given(fields):
    def env(**given):
        return command("0.32.0", engines.spec(**given), engines.cpu())["env"]

    assert env()["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert "VLLM_CPU_KVCACHE_SPACE" not in env(**fields)


def test_what_must_hold_wins_over_the_launch_and_defaults_do_not():
    spec = engines.spec(env={"TMPDIR": "/elsewhere", "VLLM_NO_USAGE_STATS": "0", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "9"})
    env = command("0.32.0", spec, engines.cuda())["env"]
    assert env["TMPDIR"] == engines.context().tmp_dir
    assert env["VLLM_NO_USAGE_STATS"] == "1"
    assert env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == "9"


@pytest.mark.parametrize(
    ("version", "given", "seconds"),
    [
        ("0.9.1", "120", 5),
        ("0.32.0", None, 120),
        ("0.32.0", "9", 9),
        ("0.9.1", None, 5),
        ("0.32.0", "x", 5),
        ("0.32.0", "\N{SUPERSCRIPT TWO}", 5),
        ("0.32.0", " 2", 2),
        ("0.32.0", "-1", -1),
        ("0.32.0", "9" * 400, 3600),
    ],
)
def test_how_long_idle_connections_stay_open(version, given, seconds):
    spec = engines.spec(env={} if given is None else {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": given})
    env = command(version, spec, engines.cuda())["env"]
    assert vllm_command.keep_alive_s(env, capabilities(parse(version))) == seconds


def lora(spec, version="0.32.0", rank=None):
    made = vllm_command.flags(spec, engines.cuda(), capabilities(parse(version)), VllmOptions(), rank)
    return [arg for arg in made if "lora" in arg or ("=" in arg and not arg.startswith("--")) or arg.startswith("{")]


def test_further_names_follow_the_first():
    made = flags("0.32.0", replace(engines.spec(served="q"), aliases=("chat", "org/q")))
    assert made[:4] == ["--served-model-name", "q", "chat", "org/q"]
    assert made[4].startswith("--")


@pytest.mark.parametrize("version", ALL)
def test_adapters_are_models_of_their_own(version):
    spec = replace(engines.spec(), adapters={"l": "/l", "m": "org/m"})
    assert lora(spec, version, rank=17) == [
        "--enable-lora", "--max-loras=2", "--max-lora-rank=32", "--lora-modules", "l=/l", "m=org/m",
    ]  # fmt: skip
    assert lora(engines.spec(), version, rank=17) == []


def test_an_unknown_rank_is_left_to_the_engine_and_what_the_launch_says_wins():
    spec = replace(engines.spec(extra={"max-loras": 1, "max-lora-rank": 64}), adapters={"l": "/l"})
    assert lora(spec, rank=8) == ["--enable-lora", "--lora-modules", "l=/l", "--max-loras=1", "--max-lora-rank=64"]
    assert lora(replace(spec, extra_args={})) == ["--enable-lora", "--max-loras=1", "--lora-modules", "l=/l"]
    assert "--max-lora-rank=1000" in lora(replace(spec, extra_args={}), rank=1000)


def test_many_adapters_wait_in_the_hosts_memory():
    made = lora(replace(engines.spec(), adapters={f"l{n}": f"/l{n}" for n in range(10)}))
    assert made[:4] == ["--enable-lora", "--max-loras=8", "--max-cpu-loras=10", "--lora-modules"]


@pytest.mark.parametrize(("name", "source"), [("a=b", "/l"), ("a,b", "/l"), ("l", "/x=y"), ("l", "/x,y"), ("{l", "/l")])
def test_an_adapter_cannot_be_read_in_another_way(name, source):
    last = lora(replace(engines.spec(), adapters={name: source}))[-1]
    assert json.loads(last) == {"name": name, "path": source}


@pytest.mark.parametrize(
    ("version", "levels"), [("0.15.1", (1, 2)), ("0.32.0", (1, 2)), ("0.10.2", (1, 2)), ("0.8.5", ())]
)
def test_an_engine_that_is_to_sleep_is_started_so_that_it_can(version, levels):
    can, spec = capabilities(parse(version)), replace(engines.spec(), sleep=1)
    assert vllm_command.sleep_levels(spec, can) == levels
    assert vllm_command.sleep_levels(engines.spec(), can) == ()
    if levels:
        made = command(version, spec, engines.cuda())
        assert "--enable-sleep-mode" in made["argv"]
        assert made["env"]["VLLM_SERVER_DEV_MODE"] == "1"
        assert f"--uds={engines.context().uds_path}" in made["argv"]
    else:  # its socket could be reached by others
        error = refused(version, spec)
        assert error.param == "sleep"
        assert "Unix socket" in error.message


@pytest.mark.parametrize("version", ALL)
def test_nothing_opens_the_routes_for_sleep_unasked(version):
    for made in golden(version).values():
        assert "VLLM_SERVER_DEV_MODE" not in made["env"]
        assert not any("sleep" in arg for arg in made["argv"])


def test_sleep_needs_gpu_memory_and_its_field():
    asleep = replace(engines.spec(), sleep=2)
    assert "no sleep mode" in refused("0.32.0", asleep, engines.cpu()).message
    twice = replace(asleep, extra_args={"enable-sleep-mode": True})
    assert refused("0.32.0", twice).param == "extra_args.enable-sleep-mode"


def test_the_second_level_needs_weights_that_can_be_loaded_again():
    can = replace(capabilities(parse("0.32.0")), basis=(0, 9, 2))
    assert vllm_command.sleep_levels(replace(engines.spec(), sleep=1), can) == (1,)
    with pytest.raises(BadRequest, match=r"level 2 needs vLLM 0\.10\.2"):
        vllm_command.flags(replace(engines.spec(), sleep=2), engines.cuda(), can, VllmOptions())
