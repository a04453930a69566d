import pytest

from tests.support import engines
from tests.support.aio import run
from vllm_bootstrap.engines.base import ExitFacts, FailureClass, LaunchSpec
from vllm_bootstrap.engines.command import CommandEngine
from vllm_bootstrap.engines.engines_file import parse_engines
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.serving import Endpoint

ARGV = ["server", "--model={model}", "--name", "{served_model_name}", "--port", "{port}", ["--ctx", "{max_model_len}"]]


def engine(**changes):
    entry = {"kind": "command", "argv": ARGV, "slots": 4, **changes}
    return CommandEngine("mine", parse_engines({"engines": {"mine": entry}})["mine"], hf_home=None)


def spec(**changes):
    return LaunchSpec("org/model", "mine", "short", **changes)


def made(made_engine, launch=None, placement=None, **context):
    return made_engine.command(launch or spec(), placement or engines.cuda(), engines.context(**context))


def test_placeholders_are_filled_argument_by_argument():
    command = made(engine(), LaunchSpec("a b; $(x) {port}", "mine", "s", fields={"max_model_len": 4096}))
    assert command.argv == ("server", "--model=a b; $(x) {port}", "--name", "s", "--port", "8101", "--ctx", "4096")
    assert command.endpoint == Endpoint(host="127.0.0.1", port=8101)
    assert command.cwd == engines.context().tmp_dir


def test_groups_without_a_value_are_left_out():
    assert made(engine()).argv == ("server", "--model=org/model", "--name", "short", "--port", "8101")


def test_environment_and_secrets():
    command = made(
        engine(
            env={"KEY": "{internal_key}", "TOKEN": "{hf_token}", "CTX": "{max_model_len}"}, env_allowed=["MY_TUNING"]
        ),
        spec(env={"MY_TUNING": "1"}),
        base_env={"PATH": "/bin", "VLLM_ACCESS_KEY": "never"},
    )
    assert command.env == {
        "PATH": "/bin",
        "KEY": engines.KEY,
        "TOKEN": engines.HF_TOKEN,
        "CTX": "",
        "MY_TUNING": "1",
        "TMPDIR": engines.context().tmp_dir,
        "PYTHONUNBUFFERED": "1",
        "CUDA_VISIBLE_DEVICES": "GPU-a",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    assert command.endpoint.credential == engines.KEY
    assert set(command.secrets) == {engines.KEY, engines.HF_TOKEN}
    assert not any(engines.KEY in arg for arg in command.argv)


def test_the_operator_may_name_gpus_in_another_way():
    command = made(engine(env={"CUDA_VISIBLE_DEVICES": "{gpu_ids}"}), hf_token=None)
    assert command.env["CUDA_VISIBLE_DEVICES"] == "2"
    assert command.secrets == (engines.KEY,)


def test_no_gpu_no_gpu_variables():
    assert "CUDA_VISIBLE_DEVICES" not in made(engine(), placement=engines.cpu()).env


def test_a_socket_instead_of_a_port():
    on_socket = engine(argv=["server", "--listen", "{uds}"], env={"KEY": "{internal_key}"})
    assert not on_socket.needs_port(spec())
    assert engine().needs_port(spec())
    endpoint = made(on_socket, port=None).endpoint
    assert endpoint == Endpoint(uds=engines.context().uds_path, credential=engines.KEY)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"fields": {"dtype": "half"}}, "dtype"),
        ({"extra_args": {"x": 1}}, "extra_args.x"),
        ({"env": {"NCCL_DEBUG": "INFO"}}, "env.NCCL_DEBUG"),
    ],
)
def test_what_has_no_place_is_refused(changes, param):
    with pytest.raises(BadRequest) as caught:
        run(engine().check(spec(**changes), engines.cuda()))
    assert caught.value.param == param


def test_several_gpus_only_for_an_engine_that_is_told():
    with pytest.raises(BadRequest) as caught:
        run(engine().check(spec(), engines.cuda(2, tp=2)))
    assert caught.value.param == "gpu_count"
    told = engine(argv=[*ARGV, "--tp={tensor_parallel_size}"])
    run(told.check(spec(), engines.cuda(2, tp=2)))
    assert made(told, placement=engines.cuda(2, tp=2)).argv[-1] == "--tp=2"


def test_a_field_that_must_be_given():
    with pytest.raises(BadRequest) as caught:
        run(engine(argv=[*ARGV, "{dtype}"]).check(spec(), engines.cuda()))
    assert caught.value.param == "dtype"


def test_slots_come_from_the_definition_or_from_the_launch_where_it_is_passed_on():
    assert engine().traits(spec(fields={"max_num_seqs": 9})).slots == 4
    passing = engine(argv=[*ARGV, ["--parallel", "{max_num_seqs}"]])
    assert passing.traits(spec(fields={"max_num_seqs": 9})).slots == 9
    assert passing.traits(spec()).slots == 4


def test_traits():
    traits = engine(health="/ready", has_metrics=True).traits(spec())
    assert traits.health_path == "/ready"
    assert traits.has_metrics
    assert traits.refuses_http_media
    assert (traits.priority_header, traits.priority_field) == (False, False)


def test_true_and_false_are_written_small():
    with_flag = engine(argv=[*ARGV, ["--eager={enforce_eager}"]])
    assert made(with_flag, spec(fields={"enforce_eager": True})).argv[-1] == "--eager=true"


def test_heads_matter_only_where_the_model_is_split(tmp_path):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 12}')
    model = LaunchSpec(str(tmp_path), "mine", "m")
    assert engine().attention_heads(model) is None
    assert engine(argv=[*ARGV, "{tensor_parallel_size}"]).attention_heads(model) == 12


def test_log_and_death_are_read_as_vllms():
    assert engine().progress("Application startup complete.").phase == "serve"
    assert engine().explain(ExitFacts(1, None, was_ready=False), []).failure_class is FailureClass.ENGINE_DIED
