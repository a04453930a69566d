"""Fault 38: nothing of a launch's wishes becomes an option, a path or a variable that it must not be."""

import pytest

from tests.support.engines import Other, VllmLike, order
from vllm_bootstrap.engines.spec import MAX_EXTRA_ARGS, make_spec
from vllm_bootstrap.errors import BadRequest, UnknownField


def make(allow=(), engine=None, **changes):
    return make_spec(order(**changes), engine or VllmLike(), allow)


def refused(param, allow=(), engine=None, **changes):
    with pytest.raises(BadRequest) as caught:
        make(allow, engine, **changes)
    assert caught.value.param == param
    return caught.value


def test_a_plain_order():
    spec = make(
        fields={"max_model_len": 4096, "dtype": None}, extra_args={"enable_lora": True}, env={"NCCL_DEBUG": "INFO"}
    )
    assert (spec.model, spec.engine, spec.served_model_name) == ("org/model", "vllm", "org/model")
    assert spec.fields == {"max_model_len": 4096}
    assert spec.extra_args == {"enable-lora": True}
    assert spec.env == {"NCCL_DEBUG": "INFO"}


def test_a_served_name_of_its_own():
    assert make(served_model_name="short").served_model_name == "short"


@pytest.mark.parametrize(
    "model",
    [
        "--port=1",
        "-m",
        "",
        "a\nb",
        "../model",
        "/models/../../etc",
        "~/model",
        "./model",
        "s3://bucket/model",
        "a\u202eb",
    ],
)
def test_models_that_are_refused(model):
    refused("model", model=model)


def test_the_operator_may_allow_model_addresses():
    assert make(["model-url"], model="s3://bucket/model").model == "s3://bucket/model"


@pytest.mark.parametrize("engine", [VllmLike(), Other()])
def test_more_memory_than_the_share_is_refused_before_it_is_placed(engine):
    error = refused("gpu_memory_utilization", engine=engine, gpu_share=0.3, fields={"gpu_memory_utilization": 0.9})
    assert "0.9 is more than gpu_share 0.3" in error.message
    for share, part in ((0.3, 0.3), (0.3, 0.2), (1, 1), (0.9, 0.9), (None, 1), (0.3, None), (0.1 + 0.2, 0.3)):
        made = make(engine=engine, gpu_share=share, fields={"gpu_memory_utilization": part})
        assert made.fields.get("gpu_memory_utilization") == part


@pytest.mark.parametrize("name", ["--port=1", "a\nb", "", " x"])
def test_served_names_that_are_refused(name):
    refused("served_model_name", served_model_name=name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float64"),
        ("max_model_len", 0),
        ("max_model_len", "8k"),
        ("max_model_len", True),
        ("gpu_memory_utilization", 0),
        ("gpu_memory_utilization", 1.5),
        ("gpu_memory_utilization", True),
        ("kv_cache_memory_bytes", -1),
        ("max_num_seqs", 1.5),
        ("quantization", "/etc/passwd"),
        ("kv_cache_dtype", "fp8 --x"),
        ("revision", "../main"),
        ("revision", 3),
        ("tokenizer", "--port=1"),
        ("seed", "7"),
        ("enforce_eager", "yes"),
        ("trust_remote_code", 1),
    ],
)
def test_fields_with_wrong_values(name, value):
    refused(name, fields={name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_model_len", "auto"),
        ("seed", -1),
        ("tokenizer", "org/t"),
        ("dtype", "bfloat16"),
        ("gpu_memory_utilization", 1),
    ],
)
def test_fields_with_right_values(name, value):
    assert make(fields={name: value}).fields == {name: value}


def test_unknown_fields_are_named():
    assert isinstance(refused("colour", fields={"colour": "red"}), UnknownField)


def test_remote_code_is_the_operators_decision():
    error = refused("trust_remote_code", fields={"trust_remote_code": True})
    assert "VLLM_BOOTSTRAP_ALLOW_DANGEROUS_ARGS" in error.message
    assert make(fields={"trust_remote_code": False}).fields == {"trust_remote_code": False}
    for spelling in ("trust-remote-code", "trust_remote_code", "--trust-remote-code"):
        assert make([spelling], fields={"trust_remote_code": True}).fields == {"trust_remote_code": True}


@pytest.mark.parametrize(
    "key",
    ["trust-r", "--trust-r", "trust_remot", "no-such-flag", "tp", "O"],
)
def test_only_exact_names_of_known_flags_pass(key):
    refused(f"extra_args.{key}", extra_args={key: True})


def test_unknown_flags_get_a_suggestion():
    error = refused("extra_args.enable-lorra", extra_args={"enable-lorra": True})
    assert isinstance(error, UnknownField)
    assert "Did you mean enable-lora?" in error.message
    error = refused("extra_args.no-enable-lora", extra_args={"no-enable-lora": True})
    assert "value false" in error.message
    assert refused("extra_args.zzzzzzzz", extra_args={"zzzzzzzz": 1}).message.endswith("any known vLLM.")


@pytest.mark.parametrize(
    "key",
    [
        "uds",
        "--host",
        "port",
        "api_key",
        "--api-key",
        "root-path",
        "model",
        "served_model_name",
        "scheduling-policy",
        "shutdown-timeout",
        "config",
        "ssl-keyfile",
        "allowed-origins",
        "allowed_media_domains",
        "hf-token",
        "headless",
        "data-parallel-size",
        "api-server-count",
        "enable-sleep-mode",
        "disable-log-stats",
        "device-ids",
        "nnodes",
    ],
)
def test_what_the_daemon_sets_is_never_a_launchs(key):
    name = key.removeprefix("--").replace("_", "-")
    assert "set by the daemon" in refused(f"extra_args.{key}", [name], extra_args={key: "x"}).message


@pytest.mark.parametrize("key", ["host", "port", "uds", "api-key", "model"])
def test_not_even_of_engines_with_options_of_their_own(key):
    refused(f"extra_args.{key}", [key], engine=Other(), extra_args={key: "x"})


def test_engines_with_options_of_their_own_judge_them_themselves():
    assert make(engine=Other(), extra_args={"boot_delay": 1}).extra_args == {"boot-delay": 1}


def test_typed_fields_are_not_extra_arguments():
    assert "use the field max_model_len" in refused("extra_args.max-model-len", extra_args={"max-model-len": 1}).message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("middleware", "evil.run"),
        ("--tool_parser_plugin", "/tmp/x.py"),
        ("chat-template", "/etc/passwd"),
        ("load-format", "auto"),
        ("worker-cls", "evil.W"),
        ("compilation-config", {"backend": "evil.f"}),
        ("kv-transfer-config", {}),
        ("logits-processors", ["evil:P"]),
        ("hf-overrides", "{}"),
        ("speculative-config", {"model": "x"}),
    ],
)
def test_dangerous_flags_are_the_operators_decision(key, value):
    name = key.removeprefix("--").replace("_", "-")
    assert "refused" in refused(f"extra_args.{key}", extra_args={key: value}).message
    assert make([name], extra_args={key: value}).extra_args == {name: value}


def test_flags_that_would_read_a_path_take_only_words():
    assert make(extra_args={"tool-call-parser": "hermes"}).extra_args == {"tool-call-parser": "hermes"}
    refused("extra_args.generation-config", extra_args={"generation-config": "/etc"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora-modules", ["a=../../etc"]),
        ("lora-modules", ["a=b\nc"]),
        ("default-mm-loras", {"image": "/x/../y"}),
        ("max-loras", float("inf")),
        ("max-loras", None),
    ],
)
def test_values_that_reach_too_far(key, value):
    refused(f"extra_args.{key}", extra_args={key: value})


def test_dotted_and_doubled_names():
    refused("extra_args.limit-mm-per-prompt.image", extra_args={"limit-mm-per-prompt.image": 1})
    refused("extra_args.max_loras", extra_args={"max-loras": 1, "max_loras": 2})


def test_the_number_of_extra_arguments_is_bounded():
    many = {f"a{n}": 1 for n in range(MAX_EXTRA_ARGS + 1)}
    refused("extra_args", engine=Other(), extra_args=many)


@pytest.mark.parametrize(
    "name",
    [
        "LD_PRELOAD",
        "LD_LIBRARY_PATH",
        "PATH",
        "HOME",
        "PYTHONPATH",
        "PYTHONSTARTUP",
        "HF_ENDPOINT",
        "HF_TOKEN",
        "HF_HOME",
        "https_proxy",
        "HTTP_PROXY",
        "ALL_PROXY",
        "no_proxy",
        "VLLM_BOOTSTRAP_HOST",
        "VBS_LAUNCH",
        "VLLM_API_KEY",
        "TMPDIR",
        "VLLM_ACCESS_KEY",
        "ORCHESTRATOR_TOKEN",
        "CUDA_VISIBLE_DEVICES",
        "VLLM_PORT",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS",
        "VLLM_USE_MODELSCOPE",
        "AWS_SECRET_ACCESS_KEY",
        "ld_preload",
        "BASH_ENV",
        "A=B",
        "",
        "A B",
        "é",
    ],
)
def test_variables_that_no_launch_may_set(name):
    assert "may not be set" in refused(f"env.{name}", [name], env={name: "1"}).message


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_PLUGINS",
        "VLLM_LORA_RESOLVER_CACHE_DIR",
        "VLLM_RUST_FRONTEND_PATH",
        "VLLM_CUDART_SO_PATH",
        "VLLM_NCCL_SO_PATH",
        "VLLM_ALLOW_INSECURE_SERIALIZATION",
        "VLLM_SERVER_DEV_MODE",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "NEW_THING",
    ],
)
def test_variables_that_the_operator_may_allow(name):
    assert "list of harmless" in refused(f"env.{name}", env={name: "1"}).message
    assert make([name], env={name: "1"}).env == {name: "1"}


@pytest.mark.parametrize("value", ["a\nb", "a\x00b", 7])
def test_values_of_variables(value):
    refused("env.NCCL_DEBUG", env={"NCCL_DEBUG": value})


def test_further_names_and_adapters():
    spec = make(served_model_name="q", aliases=("chat",), adapters={"l": "/l", "m": "org/m"}, max_parallel=4)
    assert spec.served_names == ("q", "chat", "l", "m")
    assert spec.adapters == {"l": "/l", "m": "org/m"}
    assert (spec.slots(256), spec.slots(2), make().slots(256)) == (4, 2, 256)


@pytest.mark.parametrize(
    ("param", "changes"),
    [
        ("aliases", {"aliases": ("-x",)}),
        ("aliases", {"aliases": ("a", "a")}),
        ("aliases", {"aliases": ("org/model",)}),
        ("adapters.a b\n", {"adapters": {"a b\n": "/l"}}),
        ("adapters.org/model", {"adapters": {"org/model": "/l"}}),
        ("adapters.a", {"aliases": ("a",), "adapters": {"a": "/l"}}),
        ("adapters.l", {"adapters": {"l": "../l"}}),
        ("adapters.l", {"adapters": {"l": "./l"}}),
        ("adapters.l", {"adapters": {"l": "s3://l"}}),
        ("extra_args.lora-modules", {"adapters": {"l": "/l"}, "extra_args": {"lora_modules": ["m=/m"]}}),
        ("max_parallel", {"max_parallel": 0}),
    ],
)
def test_names_and_adapters_that_are_refused(param, changes):
    refused(param, **changes)


@pytest.mark.parametrize(
    ("param", "changes"), [("aliases", {"aliases": ("a",)}), ("adapters", {"adapters": {"l": "/l"}})]
)
def test_engines_with_one_name_take_no_more(param, changes):
    refused(param, engine=Other(), **changes)


class Sleepy(VllmLike):
    can_sleep = True


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_level_of_sleep_is_taken_over(level):
    assert make(engine=Sleepy(), sleep=level).sleep == level


def test_sleep_is_a_known_level_of_an_engine_that_can():
    assert "0, 1 or 2" in refused("sleep", engine=Sleepy(), sleep=3).message
    assert "cannot sleep" in refused("sleep", engine=Other(), sleep=1).message


def test_where_the_files_are_is_taken_over():
    assert make(folder="/hub/q").folder == "/hub/q"
    assert make().folder is None
