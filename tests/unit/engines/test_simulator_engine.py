import asyncio
import sys

import pytest

from vllm_bootstrap.engines.base import EngineContext, ExitFacts, Gpu, LaunchSpec, Placement
from vllm_bootstrap.engines.phases import PHASES
from vllm_bootstrap.engines.routes import vllm_routes
from vllm_bootstrap.engines.simulator.deaths import DEATHS
from vllm_bootstrap.engines.simulator.knobs import parse
from vllm_bootstrap.engines.simulator_engine import MODULE, SimulatorEngine
from vllm_bootstrap.engines.spec import make_spec
from vllm_bootstrap.errors import BadRequest, UnknownField
from vllm_bootstrap.launches.types import LaunchOrder

CONTEXT = EngineContext(
    launch_id="l1",
    attempt=2,
    run_dir="/run/x",
    tmp_dir="/run/x/tmp",
    uds_path="/run/x/tmp/engine.sock",
    internal_key="internal-secret",
    base_env={"PATH": "/bin", "HF_HOME": "/inherited"},
    hf_token="hf_secret",
)
MOCK = Placement("mock", (Gpu("GPU-a", 1, "Mock", 80), Gpu("GPU-b", 0, "Mock", 80)), tensor_parallel_size=2)


def spec(**fields):
    return LaunchSpec(model="org/m", engine="simulator", served_model_name="m", **fields)


def options_of(command):
    assert command.argv[:3] == (sys.executable, "-m", MODULE)
    return parse(command.argv[3:])


def test_the_command_line_says_where_and_what():
    engine = SimulatorEngine(stop_grace_s=9, hf_home="/hf")
    wish = spec(fields={"max_num_seqs": 4, "trust_remote_code": True}, extra_args={"boot-delay": 1.5})
    command = engine.command(wish, MOCK, CONTEXT)
    options = options_of(command)
    assert (options.model, options.names, options.uds) == ("org/m", ("m",), CONTEXT.uds_path)
    assert (options.tensor_parallel_size, options.max_num_seqs, options.boot_delay) == (2, 4, 1.5)
    assert options.shutdown_timeout == 7
    assert (command.endpoint.uds, command.endpoint.credential) == (CONTEXT.uds_path, "internal-secret")
    assert command.env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert (command.env["HF_HOME"], command.env["PATH"], command.env["TMPDIR"]) == ("/hf", "/bin", "/run/x/tmp")
    assert not engine.needs_port(wish)


@pytest.mark.parametrize(
    ("extra", "seconds"), [({}, 120), ({"keep-alive-timeout": 3}, 3), ({"--keep_alive_timeout": 0.5}, 0.5)]
)
def test_idle_connections_stay_open_as_long_as_with_vllm_unless_a_knob_says_otherwise(extra, seconds):
    command = SimulatorEngine().command(spec(extra_args=extra), MOCK, CONTEXT)
    assert options_of(command).keep_alive_timeout == command.endpoint.keep_alive_s == seconds


def test_secrets_are_in_the_environment_only_and_are_named_for_masking():
    command = SimulatorEngine().command(spec(), MOCK, CONTEXT)
    assert (command.env["VLLM_API_KEY"], command.env["HF_TOKEN"]) == ("internal-secret", "hf_secret")
    assert command.secrets == ("internal-secret", "hf_secret")
    assert not any("secret" in part for part in command.argv)
    assert (
        "HF_TOKEN"
        not in SimulatorEngine()
        .command(spec(), MOCK, EngineContext("l", 1, "/r", "/t", "/s", "internal-key-without-token"))
        .env
    )


def test_a_name_cannot_become_an_option():
    odd = LaunchSpec(model="--port=1", engine="simulator", served_model_name="--never-ready")
    options = options_of(SimulatorEngine().command(odd, MOCK, CONTEXT))
    assert (options.model, options.names, options.port, options.never_ready) == (
        "--port=1",
        ("--never-ready",),
        8000,
        False,
    )


def test_a_share_sets_the_memory_fraction():
    half = Placement("mock", MOCK.gpus[:1], share_milli=500)
    assert options_of(SimulatorEngine().command(spec(), half, CONTEXT)).gpu_memory_utilization == 0.45
    with pytest.raises(BadRequest):
        SimulatorEngine().command(spec(fields={"gpu_memory_utilization": 0.9}), half, CONTEXT)


def test_mock_memory_goes_where_the_daemon_says():
    wish = spec(extra_args={"mock-memory-bytes": 100})
    command = SimulatorEngine(mock_memory_file="/gpus.json").command(wish, MOCK, CONTEXT)
    assert options_of(command).mock_memory_file == "/gpus.json"
    assert options_of(SimulatorEngine(mock_memory_file="/f").command(spec(), MOCK, CONTEXT)).mock_memory_file is None
    asyncio.run(SimulatorEngine(mock_memory_file="/f").check(wish, MOCK))
    with pytest.raises(BadRequest, match="MOCK_GPU_FILE"):
        asyncio.run(SimulatorEngine().check(wish, MOCK))


def test_knobs_come_through_the_order_and_wrong_ones_are_refused_by_name():
    engine = SimulatorEngine()
    order = LaunchOrder(model="m", extra_args={"tokens_per_second": 5, "never-ready": False}, fields={"dtype": "auto"})
    made = make_spec(order, engine)
    asyncio.run(engine.check(made, MOCK))
    assert options_of(engine.command(made, MOCK, CONTEXT)).tokens_per_second == 5
    for extra, error in (({"fly": 1}, UnknownField), ({"boot-delay": "x"}, BadRequest), ({"uds": "/x"}, BadRequest)):
        with pytest.raises(error) as refused:
            asyncio.run(engine.check(make_spec(LaunchOrder(model="m", extra_args=extra), engine), MOCK))
        assert refused.value.param == f"extra_args.{next(iter(extra))}"


def test_traits_are_those_of_a_current_vllm():
    traits = SimulatorEngine().traits(spec())
    assert (traits.routes, traits.slots, traits.priority_header) == (vllm_routes(), 32, True)
    assert SimulatorEngine().traits(spec(fields={"max_num_seqs": 7})).slots == 7
    assert SimulatorEngine().attention_heads(spec()) is None


@pytest.mark.parametrize("name", DEATHS)
def test_each_way_to_die_is_recognised_as_what_it_pretends_to_be(name):
    death = DEATHS[name]
    process = "EngineCore" if death.in_core else "APIServer"
    log = [f"({process} pid=7) ERROR 11-21 08:00:00 [core.py:1510] {line}" for line in death.text.splitlines()]
    if death.last_line:
        log += ["(APIServer pid=6) Traceback (most recent call last):", f"(APIServer pid=6) {death.last_line}"]
    exit_code = None if death.signal else death.exit_code
    failure = SimulatorEngine().explain(ExitFacts(exit_code, death.signal, was_ready=False), log)
    assert failure.failure_class == death.failure_class


def test_its_log_is_read_as_vllms():
    engine = SimulatorEngine()
    line = "(EngineCore pid=7) Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:00<00:00,  4.00it/s]"
    assert engine.progress(line).fraction == 0.5
    assert engine.progress("(EngineCore pid=7) DEBUG noise ....") is None
    assert engine.progress("(APIServer pid=6) INFO:     Application startup complete.").phase in PHASES


def test_it_serves_further_names_and_adapters_too():
    wish = spec(aliases=("chat",), adapters={"l": "/l"})
    assert options_of(SimulatorEngine().command(wish, MOCK, CONTEXT)).names == ("m", "chat", "l")
