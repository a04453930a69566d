import pytest

from vllm_bootstrap.engines.simulator.knobs import KNOBS, Options, field_arguments, launch_arguments, parse
from vllm_bootstrap.errors import BadRequest, UnknownField


def test_defaults_are_the_options_own():
    assert parse(["--model=m"]) == Options(model="m")
    assert parse(["--model=m"]).names == ("m",)


def test_a_command_line_is_read():
    options = parse(
        ["--model", "org/m", "--served-model-name", "a", "b", "--tokens-per-second", "5", "--never-ready", "--port=0"]
    )
    assert (options.model, options.names) == ("org/m", ("a", "b"))
    assert (options.tokens_per_second, options.never_ready, options.port) == (5, True, 0)
    assert options.changed().keys() == {"model", "served_model_name", "tokens_per_second", "never_ready", "port"}


@pytest.mark.parametrize(
    "wrong",
    [
        ["--no-such-flag"],
        ["--tokens-per"],
        ["--port=-1"],
        ["--boot-delay=inf"],
        ["--boot-delay=nan"],
        ["--max-model-len=long"],
        ["--max-model-len=0x10"],
        ["--max-num-seqs=0"],
        ["--tensor-parallel-size=0"],
        ["--tasks=embed,fly"],
        ["--die-at-boot=boredom"],
        ["--num-gpu-blocks-override=5"],
        ["--profile=h200-8b", "--max-num-batched-tokens=0"],
        ["--max-model-len=100", "--long-prefill-token-threshold=101"],
    ],
)
def test_a_wrong_command_line_exits_with_2_as_vllm_does(wrong, capsys):
    with pytest.raises(SystemExit) as exited:
        parse(["--model=m", *wrong])
    assert exited.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_profile_is_a_shipped_one_or_on_the_command_line_a_file(tmp_path, capsys):
    file = tmp_path / "p.json"
    file.write_text(
        '{"name": "n", "source": "s", "measured": false, "step_base_s": 1, "block_size": 8, "kv_blocks": 9}'
    )
    options = parse(["--model=m", f"--profile={file}"])
    assert options.load_profile().step_base_s == 1
    assert options.cache_tokens == 72
    assert parse(["--model=m", f"--profile={file}", "--num-gpu-blocks-override=3"]).cache_tokens == 24
    assert parse(["--model=m", "--profile=vllm-cpu-tiny"]).load_profile().name == "vllm-cpu-tiny"
    assert parse(["--model=m", *launch_arguments({"profile": "h200-8b"})]).profile == "h200-8b"
    with pytest.raises(BadRequest):
        launch_arguments({"profile": str(file)})
    file.write_text('{"speed": 1}')
    for wrong in (str(file), str(tmp_path / "missing.json")):
        with pytest.raises(SystemExit):
            parse(["--model=m", f"--profile={wrong}"])
    assert "'speed'" in capsys.readouterr().err


def test_the_model_is_required():
    with pytest.raises(SystemExit):
        parse([])


@pytest.mark.parametrize(("text", "tokens"), [("auto", 32768), ("8k", 8000), ("1.5K", 1536), ("100", 100), ("0", 1)])
def test_lengths_are_written_as_for_vllm(text, tokens):
    assert parse(["--model=m", f"--max-model-len={text}"]).context_length == tokens


def test_knobs_become_arguments_that_parse_back():
    given = {
        "boot-delay": 2,
        "tokens_per_second": 1.5,
        "never-ready": True,
        "echo_headers": False,
        "die-at-boot": "bad_flag",
        "tasks": "embed,score",
    }
    options = parse(["--model=m", *launch_arguments(given)])
    assert (options.boot_delay, options.tokens_per_second, options.never_ready) == (2, 1.5, True)
    assert (options.echo_headers, options.die_at_boot, options.task_set) == (False, "bad_flag", {"embed", "score"})


def test_what_is_no_knob_is_refused_by_name():
    for name in ("max_num_seqs", "uds", "mock-memory-file", "middleware"):
        with pytest.raises(UnknownField) as refused:
            launch_arguments({name: 1})
        assert refused.value.param == f"extra_args.{name}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("never-ready", "yes"),
        ("never-ready", 1),
        ("boot-delay", True),
        ("boot-delay", "1"),
        ("boot-delay", -1),
        ("boot-delay", float("inf")),
        ("hang-after", 1.5),
        ("die-at-boot", "boredom"),
        ("die-at-boot", None),
        ("tasks", "embed,fly"),
        ("tasks", ["embed"]),
    ],
)
def test_a_knob_of_the_wrong_type_is_refused(name, value):
    with pytest.raises(BadRequest) as refused:
        launch_arguments({name: value})
    assert refused.value.param == f"extra_args.{name}"


def test_typed_fields_become_arguments():
    given = {"max_num_seqs": 4, "dtype": "half", "seed": -1, "enforce_eager": True, "enable_prefix_caching": False}
    options = parse(["--model=m", *field_arguments({**given, "quantization": None})])
    assert (options.max_num_seqs, options.dtype, options.seed) == (4, "half", "-1")
    assert (options.enforce_eager, options.enable_prefix_caching) == (True, False)


def test_fields_that_are_not_the_callers_are_refused():
    for name in ("port", "boot_delay", "nonsense"):
        with pytest.raises(UnknownField):
            field_arguments({name: 1})


def test_every_knob_has_a_help():
    assert all(option.metadata["help"] for option in KNOBS.values())
