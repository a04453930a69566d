import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import engines
from tests.support.aio import run
from vllm_bootstrap.engines.base import ExitFacts, FailureClass, Placement
from vllm_bootstrap.engines.interpreter import Form, Install, NoEngine
from vllm_bootstrap.engines.vllm import VllmEngine
from vllm_bootstrap.engines.vllm_command import VllmOptions
from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.serving import Endpoint


class FixedLocator:
    def __init__(self, version="0.32.0", form=Form.SERVE, error=None):
        number = tuple(int(part) for part in version.split("."))
        launcher = ("/opt/e/bin/vllm", "serve") if form is Form.SERVE else ("/opt/e/bin/python", "-m", "server")
        self.install = Install(launcher, form, number, version, "/opt/e/bin")
        self.error = error

    def find(self):
        if self.error is not None:
            raise self.error
        return self.install

    known = find


def engine(version="0.32.0", form=Form.SERVE, error=None, **options):
    return VllmEngine(FixedLocator(version, form, error), VllmOptions(**options))


def refused(made, spec=None, placement=None):
    with pytest.raises(BadRequest) as caught:
        run(made.check(spec or engines.spec(), placement or engines.cuda()))
    return caught.value


def test_the_model_is_positional_or_an_option():
    made = engine().command(engines.spec("/m"), engines.cuda(), engines.context())
    assert made.argv[:3] == ("/opt/e/bin/vllm", "serve", "/m")
    made = engine(form=Form.MODULE).command(engines.spec("/m"), engines.cuda(), engines.context())
    assert made.argv[:4] == ("/opt/e/bin/python", "-m", "server", "--model=/m")
    assert made.env["PATH"] == "/opt/e/bin:/usr/bin"
    assert made.cwd == engines.context().tmp_dir
    assert set(made.secrets) == {engines.KEY, engines.HF_TOKEN}


def test_a_model_that_lies_here_whole_is_given_as_its_folder_so_that_no_hub_is_asked():
    spec = replace(engines.spec("org/q", revision="c0ffee"), folder="/hub/q")
    argv = engine().command(spec, engines.cuda(), engines.context()).argv
    assert "/hub/q" in argv
    assert "org/q" not in argv
    assert f"--served-model-name={spec.served_model_name}" in argv
    assert "--model=/hub/q" in engine(form=Form.MODULE).command(spec, engines.cuda(), engines.context()).argv


def test_where_it_listens():
    context = engines.context()
    assert engine().command(engines.spec(), engines.cuda(), context).endpoint == Endpoint(
        uds=context.uds_path, keep_alive_s=120
    )
    assert not engine().needs_port(engines.spec())
    old = engine("0.9.2")
    assert old.needs_port(engines.spec())
    endpoint = old.command(engines.spec(), engines.cuda(), context).endpoint
    assert endpoint == Endpoint(host="127.0.0.1", port=8101, credential=engines.KEY, keep_alive_s=120)


def test_a_good_launch_passes():
    run(engine().check(engines.spec(max_model_len=4096), engines.cuda()))


def test_refusals_before_anything_is_spawned():
    assert refused(engine("0.9.2"), engines.spec(kv_cache_memory_bytes=1)).param == "kv_cache_memory_bytes"
    assert refused(engine(), placement=Placement("mock", engines.cuda().gpus)).param == "engine"
    assert "too old" in refused(engine("0.7.3")).message
    assert refused(engine(error=NoEngine("nothing found"))).message == "nothing found"


def test_asking_does_not_hold_up_the_loop():
    async def main():
        checking = asyncio.create_task(engine("0.20.0").check(engines.spec(), engines.cuda()))
        await asyncio.sleep(0)
        assert not checking.done()
        await checking

    run(main())


@pytest.mark.parametrize(("version", "header"), [("0.31.0", False), ("0.32.0", True), ("0.33.0", True)])
def test_how_priorities_are_sent(version, header):
    traits = engine(version).traits(engines.spec())
    assert (traits.priority_header, traits.priority_field) == (header, not header)


@pytest.mark.parametrize(
    ("version", "domains", "refuses"),
    [("0.11.0", (), True), ("0.11.0", ("a.org",), True), ("0.11.0", ("*",), False), ("0.12.0", (), False)],
)
def test_media_are_refused_by_us_where_the_engine_cannot(version, domains, refuses):
    assert engine(version, allowed_media_domains=domains).traits(engines.spec()).refuses_http_media == refuses


def test_traits_outlive_the_installation():
    traits = engine(error=NoEngine("gone")).traits(engines.spec(max_num_seqs=7))
    assert traits.slots == 7
    assert traits.refuses_http_media
    assert traits.routes
    with pytest.raises(BadRequest):
        engine(error=NoEngine("gone")).command(engines.spec(), engines.cuda(), engines.context())


def test_heads_log_and_death(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 32}')
    assert engine().attention_heads(engines.spec(str(tmp_path))) == 32
    assert engine(hf_home="/nowhere").attention_heads(engines.spec()) is None
    assert engine().progress("Application startup complete.").phase == "serve"
    assert engine().explain(ExitFacts(0, None, was_ready=True), []).failure_class is FailureClass.ENGINE_DIED
