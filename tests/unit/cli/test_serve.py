"""Options of the daemon, and settings that are refused before anything is started."""

import pytest

from vllm_bootstrap.cli import serve
from vllm_bootstrap.settings import OF_ONE_MODEL, Settings


def load(environ=None, **options):
    return serve.load(options, environ or {}, None)[0]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch, tmp_path):
    for name in serve.known_names():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(serve, "default_config_dir", lambda: tmp_path / "none")


def test_every_option_is_a_setting():
    given = vars(serve.parser().parse_args([
        "--host=::1", "--port=0", "--state-dir=s", "--auth-keys-file=k", "--engine=e", "--engine-python=p",
        "--engines-file=f", "--gpus=0,1", "--mock=3", "--log-level=DEBUG", "--insecure",
    ]))  # fmt: skip
    assert given.pop("env_file") is None
    assert set(given) <= set(Settings.model_fields)
    settings = load(**given)
    assert (settings.host, settings.gpus, settings.mock_devices, settings.insecure) == ("::1", ("0", "1"), 3, True)


@pytest.mark.parametrize(("args", "count"), [(["--mock"], 2), (["--mock", "5"], 5), (["--mock=1"], 1), ([], 0)])
def test_mock_gpus(args, count):
    options = vars(serve.parser().parse_args(args))
    assert load(**{name: value for name, value in options.items() if name != "env_file"}).mock_devices == count


def test_options_left_out_are_left_to_the_environment(monkeypatch):
    given = vars(serve.parser().parse_args([]))
    assert set(given) == {"env_file"}
    monkeypatch.setenv("PORT", "9")
    monkeypatch.setenv("VLLM_BOOTSTRAP_PORT", "10")
    assert load().port == 10
    assert load(port="11").port == 11


@pytest.mark.parametrize("args", [["--nonsense"], ["--por", "1"], ["extra"], ["--mock=x"]])
def test_unknown_options_are_usage_errors(args, capsys):
    with pytest.raises(SystemExit) as caught:
        serve.parser().parse_args(args)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


def test_a_misspelt_setting_is_refused_and_the_right_one_named():
    with pytest.raises(serve.UnusableSettings, match=r"did you mean VLLM_BOOTSTRAP_PORT\?"):
        load({"VLLM_BOOTSTRAP_PROT": "1"})
    with pytest.raises(serve.UnusableSettings, match="unset it"):
        load({"vllm_bootstrap_frobnicate": "1"})


def test_names_that_are_for_the_client_are_no_mistake():
    load({"VLLM_BOOTSTRAP_URL": "http://x", "VLLM_BOOTSTRAP_KEY": "k", "VLLM_CACHE_ROOT": "/x"})


OTHER_VALUES = {
    "model_revision": "v2", "dtype": "float16", "tensor_parallel": "2", "max_model_len": "4096",
    "gpu_memory_utilization": "0.5",
}  # fmt: skip


@pytest.mark.parametrize("name", OF_ONE_MODEL)
@pytest.mark.parametrize("prefix", ["", "VLLM_BOOTSTRAP_"])
def test_settings_of_the_one_model_are_refused_without_it(name, prefix, monkeypatch):
    monkeypatch.setenv(prefix + name.upper(), OTHER_VALUES[name])
    with pytest.raises(serve.UnusableSettings, match=f"{name.upper()} .* MODEL_ID is not set"):
        load()
    monkeypatch.setenv("MODEL_ID", "Qwen/Qwen2.5-3B-Instruct")
    assert str(getattr(load(), name)) == OTHER_VALUES[name]


def test_every_wrong_setting_is_named_and_no_value_shown(monkeypatch):
    monkeypatch.setenv("HOST", "my-machine")
    monkeypatch.setenv("VLLM_BOOTSTRAP_PORT", "sec-ret")
    with pytest.raises(serve.UnusableSettings) as caught:
        load(log_level="LOUD")
    said = str(caught.value).splitlines()
    assert len(said) == 3
    assert "sec-ret" not in str(caught.value)
    assert any(line.startswith("VLLM_BOOTSTRAP_LOG_LEVEL (--log-level): ") for line in said)
    with pytest.raises(serve.UnusableSettings, match="must be set together"):
        load(host="127.0.0.1", port="1", log_level="INFO", ssl_certfile="x")
