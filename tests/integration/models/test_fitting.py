"""Fit before launch with real files and mock GPUs of 80 GiB each."""

import asyncio
import os
import time
from dataclasses import replace

import psutil
import pytest

from tests.support.aio import run
from tests.support.model_folders import cache_model, write_model
from tests.support.published_models import BGE_M3, LLAMA_8B, LLAMA_70B, QWEN_3B, QWEN_32B, TINY
from tests.support.world import World
from vllm_bootstrap.engines.base import Gpu, LaunchSpec, Placement
from vllm_bootstrap.errors import BadRequest, DoesNotFit, GpuConflict
from vllm_bootstrap.gpus.cpu import CpuInventory
from vllm_bootstrap.gpus.mock import MockInventory
from vllm_bootstrap.models import facts, fitting
from vllm_bootstrap.models.facts import ModelFacts
from vllm_bootstrap.models.fitting import Fitter
from vllm_bootstrap.models.tensors import WeightFacts
from vllm_bootstrap.models.types import GpuNeed, ModelEntry

GIB = 1024**3
COUNTS = {"8b": 8_030_261_248, "70b": 70_553_706_496, "3b": 3_085_938_688, "32b": 32_763_876_352, "bge": 567_754_752}
CONFIGS = {"8b": LLAMA_8B, "70b": LLAMA_70B, "3b": QWEN_3B, "32b": QWEN_32B, "bge": BGE_M3}


@pytest.fixture
def model(tmp_path):
    """Gives the folder of a published model, whose weights are holes."""
    return lambda name: str(write_model(tmp_path / name, CONFIGS[name], COUNTS[name], shards=4))


def entry(source, **about):
    return ModelEntry("m", str(source), **about)


def gpus(count=1, total=80 * GIB):
    return tuple(Gpu(f"GPU-mock-{number}", number, "Mock GPU", total, (9, 0)) for number in range(count))


def on(count=1, share=1000, kind="cuda", total=80 * GIB):
    return Placement(kind, gpus(count, total), share, count)


def spec(model, **fields):
    return LaunchSpec(model, "vllm", "m", fields=fields)


def refuse(fitter, *what):
    return run(fitter.refuse(*what))


# Launches


def test_what_cannot_fit_is_refused_with_what_would(model):
    with pytest.raises(DoesNotFit) as refused:
        refuse(Fitter(MockInventory(4)), spec(model("70b"), max_model_len=8192), on(1))
    error = refused.value.body()["error"]
    assert (refused.value.status, error["code"], error["param"]) == (400, "does_not_fit", "gpu_count")
    assert error["fit"]["weights_bytes"] == 2 * COUNTS["70b"]
    assert error["fit"]["fits"] is False
    assert refused.value.retry_after is None, "nothing will change that"
    assert {"field": "gpu_count", "value": 2, "message": "2 GPUs would fit."} in error["suggestions"]
    assert "On one GPU it needs about 131.4 GiB of weights" in error["message"]
    assert "2 GPUs would fit." in error["message"]


@pytest.mark.parametrize("kind", ["cuda", "mock"])
def test_what_fits_goes_on(model, kind):
    fitter = Fitter(MockInventory(2))
    refuse(fitter, spec(model("8b"), max_model_len=8192), on(1, kind=kind))
    refuse(fitter, spec(model("70b"), max_model_len=8192), on(2, kind=kind))


def test_what_cannot_be_told_goes_on(model, tmp_path):
    fitter = Fitter(MockInventory(2), hf_home=tmp_path)
    big = model("70b")
    refuse(fitter, spec("org/never-seen"), on(1))
    refuse(fitter, spec(big), Placement("cpu", gpus()))
    refuse(fitter, spec(big), Placement("cuda"))
    refuse(fitter, replace(spec(big), extra_args={"cpu-offload-gb": 200}), on(1))
    (tmp_path / "70b" / "model-00001-of-00004.safetensors").unlink()
    refuse(fitter, spec(big), on(1))


def test_an_operator_may_switch_it_off(model):
    refuse(Fitter(MockInventory(2), refusing=False), spec(model("70b")), on(1))


def test_a_share_is_what_counts(model):
    fitter, small = Fitter(MockInventory(1)), spec(model("8b"), max_model_len=4096)
    refuse(fitter, small, on(1, share=500))
    with pytest.raises(DoesNotFit) as refused:
        refuse(fitter, small, on(1, share=200))
    assert refused.value.param == "gpu_share"
    wanted = refused.value.details["suggestions"][0]["value"]
    refuse(fitter, small, on(1, share=round(wanted * 1000)))
    with pytest.raises(BadRequest, match="more than gpu_share"):
        refuse(fitter, spec(small.model, gpu_memory_utilization=0.6), on(1, share=500))


def test_what_others_use_is_not_there(model):
    inventory = MockInventory(1)
    fitter = Fitter(inventory)
    inventory.set_used("GPU-mock-0", 20 * GIB)
    with pytest.raises(DoesNotFit, match=r"60\.0 GiB are free now") as refused:
        refuse(fitter, spec(model("3b")), on(1))
    assert refused.value.retry_after == fitting.IN_THE_WAY_RETRY_S
    refuse(fitter, spec(model("3b"), gpu_memory_utilization=0.7), on(1))
    inventory.set_fail("memory")  # what is not known refuses nothing
    refuse(fitter, spec(model("3b")), on(1))
    elsewhere = Placement("cuda", (Gpu("GPU-other", 9, "x", 80 * GIB),))
    refuse(fitter, spec(model("3b")), elsewhere)


def test_a_disk_that_does_not_answer_refuses_nothing(model, monkeypatch):
    monkeypatch.setattr(fitting, "READING_PATIENCE_S", 0.01)
    monkeypatch.setattr(facts, "stamp", lambda *_: time.sleep(0.3))
    refuse(Fitter(MockInventory(1)), spec(model("70b")), on(1))


def test_files_are_read_once_until_the_folder_changes(model, tmp_path, monkeypatch):
    reads = []
    read = facts.read_local
    monkeypatch.setattr(facts, "read_local", lambda *args: reads.append(args) or read(*args))
    fitter, folder = Fitter(MockInventory(1)), model("3b")
    refuse(fitter, spec(folder), on(1))
    refuse(fitter, spec(folder), on(1))
    assert len(reads) == 1
    os.utime(tmp_path / "3b", (1, 1))
    refuse(fitter, spec(folder), on(1))
    assert len(reads) == 2
    monkeypatch.setattr(fitting, "REMEMBERED", 1)
    refuse(fitter, spec(model("bge")), on(1))
    refuse(fitter, spec(folder), on(1))
    assert len(reads) == 4


def test_a_refused_launch_leaves_nothing_behind(model):
    async def scene():
        world = World()
        world.fit = Fitter(world.inventory).refuse
        async with world:
            with pytest.raises(DoesNotFit):
                await world.launch(model=model("70b"), gpu_count=1)
            assert world.supervisor.list(include_ended=True) == []
            assert not world.ledger.claimed_milli("GPU-mock-0")
            assert (await world.ready(model="org/made-up", gpu_count=1)).state == "ready"

    run(scene())


def test_an_embedding_model_beside_a_chat_model(model):
    """Two launches share a GPU, each with its own part of the memory; a third finds no room."""

    async def scene():
        world = World()
        world.fit = Fitter(world.inventory).refuse
        async with world:
            embedding = await world.ready(model=model("bge"), gpu_ids=(0,), gpu_count=None, gpu_share=0.3)
            chat = await world.ready(
                model=model("8b"), gpu_ids=(0,), gpu_count=None, gpu_share=0.6, fields={"max_model_len": 16384}
            )
            assert [view.claims[0].share for view in (embedding, chat)] == [0.3, 0.6]
            assert world.ledger.claimed_milli("GPU-mock-0") == 900
            for view, part in ((embedding, "0.27"), (chat, "0.54")):
                assert f"--gpu-memory-utilization={part}" in psutil.Process(view.pid).cmdline()
            with pytest.raises(GpuConflict):
                await world.launch(model=model("3b"), gpu_ids=(0,), gpu_count=None, gpu_share=0.2)
            with pytest.raises(DoesNotFit, match=r"gpu_share 0\.[3-9]5? would fit"):
                await world.launch(model=model("8b"), gpu_ids=(1,), gpu_count=None, gpu_share=0.1)
            with pytest.raises(BadRequest, match="more than gpu_share"):
                await world.launch(
                    model=model("bge"), gpu_ids=(1,), gpu_count=None, gpu_share=0.3,
                    fields={"gpu_memory_utilization": 0.5},
                )  # fmt: skip

    run(scene())


# Models of the catalogue


def check(fitter, *what, **how):
    return run(fitter.check(*what, **how))


def test_as_few_gpus_as_it_fits_on(model):
    fitter = Fitter(MockInventory(4))
    assert run(fitter.smallest(entry(model("8b")))) == 1
    assert run(fitter.smallest(entry(model("70b"), args={"max_model_len": 8192}))) == 2
    assert run(fitter.smallest(entry(model("70b")))) == 4
    assert run(fitter.smallest(entry(model("70b"), args={"max_model_len": 8192, "pipeline_parallel_size": 4}))) == 4
    assert run(Fitter(MockInventory(1)).smallest(entry(model("70b")))) is None
    assert run(fitter.smallest(entry("org/never-seen"))) is None
    assert run(Fitter(CpuInventory(1)).smallest(entry(model("8b")))) is None


def test_the_check_uses_that_number_unless_told(model):
    fitter = Fitter(MockInventory(4))
    found = check(fitter, entry(model("70b"), args={"max_model_len": 8192}))
    assert (found.fits, found.gpu_count, found.suggestions) == (True, 2, ())
    one = check(fitter, entry(model("70b"), args={"max_model_len": 8192}), gpu_count=1)
    assert (one.fits, one.gpu_count) == (False, 1)
    short = check(fitter, entry(model("70b")), gpu_count=2, max_model_len=8192)
    assert (short.fits, short.max_model_len) == (True, 8192)
    assert check(fitter, entry(model("8b"), args={"tensor_parallel_size": 2})).gpu_count == 2
    assert check(fitter, entry(model("8b"), args={"tensor_parallel_size": 2}), gpu_count=4).gpu_count == 4
    assert check(fitter, entry(model("8b"), gpus=GpuNeed(ids=(1, "GPU-mock-2")))).gpu_count == 2
    assert check(fitter, entry(model("8b"), gpus=GpuNeed(count=1))).gpu_count == 1
    assert check(fitter, entry(model("8b"), gpus=GpuNeed(count=2)), gpu_count=2).gpu_count == 2


def test_the_check_is_about_gpus_that_nobody_uses(model):
    inventory = MockInventory(1)
    inventory.set_used("GPU-mock-0", 70 * GIB)
    found = check(Fitter(inventory), entry(model("3b")))
    assert (found.fits, found.free_bytes) == (True, 10 * GIB)


def test_too_few_gpus_or_too_small_ones(model):
    fitter = Fitter(MockInventory(2))
    found = check(fitter, entry(model("8b")), gpu_count=4)
    assert (found.fits, found.why) == (False, "4 GPUs are wanted, 2 are here.")
    small = check(fitter, entry(model("8b"), gpus=GpuNeed(min_memory=100 * GIB)))
    assert (small.fits, small.why) == (False, "1 GPUs are wanted, 0 are here.")


def test_a_share_in_the_check(model):
    fitter = Fitter(MockInventory(1))
    found = check(fitter, entry(model("8b"), gpus=GpuNeed(share=0.2), args={"max_model_len": 4096}))
    assert found.fits is False
    assert "gpu_share" in {one.get("field") for one in found.suggestions}
    with pytest.raises(BadRequest, match="more than gpu_share"):
        check(fitter, entry(model("8b"), gpus=GpuNeed(share=0.2), args={"gpu_memory_utilization": 0.5}))


@pytest.mark.parametrize(("inventory", "why"), [(CpuInventory(1), "there is no GPU here"), (MockInventory(1), "fails")])
def test_without_gpus_it_cannot_be_told(model, inventory, why):
    if isinstance(inventory, MockInventory):
        inventory.set_fail("init")
    found = check(Fitter(inventory), entry(model("8b")))
    assert found.fits is None
    assert why in found.why


def test_what_is_missing_is_said(model, tmp_path):
    fitter = Fitter(MockInventory(1))
    assert "is not on this machine" in check(fitter, entry("org/never-seen")).why
    folder = model("8b")
    (tmp_path / "8b" / "model-00001-of-00004.safetensors").unlink()
    found = check(fitter, entry(folder))
    assert (found.fits, found.kv_bytes_per_token) == (None, 131_072)
    assert "1 of 4 files are missing" in found.why
    assert "hf-overrides" in check(fitter, entry(folder, extra_args={"hf-overrides": "{}"})).why


def test_the_hub_is_asked_only_when_told_and_only_for_what_is_not_here(model, tmp_path, monkeypatch):
    asked = []

    async def remote(source, revision, *, token, endpoint):
        asked.append((source, revision, token, endpoint))
        if source == "org/gone":
            return ModelFacts(None, None, "the hub has no org/gone")
        return ModelFacts(LLAMA_70B, WeightFacts({"BF16": 2 * COUNTS["70b"]}, exact=False))

    monkeypatch.setattr(facts, "read_remote", remote)
    fitter = Fitter(MockInventory(4), hf_home=tmp_path, hf_token="hf_x", endpoint="http://hub")
    cache_model(tmp_path, "org/here", TINY, 1000)
    assert check(fitter, entry("org/here"), online=True).fits
    assert check(fitter, entry("org/there")).fits is None
    assert asked == []
    assert check(fitter, entry("org/there", revision="v2"), online=True).fits
    assert asked == [("org/there", "v2", "hf_x", "http://hub")]
    assert "the hub has no org/gone" in check(fitter, entry("org/gone"), online=True).why
    lone = cache_model(tmp_path, "org/gone", TINY, 1000)
    (lone / "model.safetensors").unlink()
    assert "there are none" in check(fitter, entry("org/gone"), online=True).why


def test_checks_do_not_wait_for_one_another(model):
    async def scene():
        fitter, folder = Fitter(MockInventory(2)), model("8b")
        return await asyncio.gather(*[fitter.check(entry(folder)) for _ in range(20)])

    assert all(found.fits for found in run(scene()))
