import json
from dataclasses import asdict

import pytest

from vllm_bootstrap.engines.base import FailureClass, LaunchSpec
from vllm_bootstrap.launches import recovery
from vllm_bootstrap.launches.recovery import spec_of
from vllm_bootstrap.launches.types import ExitRecord, ProcessIdentity, ShimHandle

RECORD = ExitRecord(1, None, forced=False, stop_requested=False, ended_at=5.0)


def facts(**changes) -> recovery.Facts:
    handle = ShimHandle("l1", 1, ProcessIdentity(10, 20, "boot"), "/run/x", 1)
    base = {
        "external": False, "stopping": False, "handle": handle, "engine_seen": True, "boot_id": "boot",
        "shim_alive": True, "record": None,
    }  # fmt: skip
    return recovery.Facts(**{**base, **changes})


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"external": True, "shim_alive": False}, recovery.Continue),
        ({"handle": None, "shim_alive": False}, recovery.Again),
        ({"handle": None, "stopping": True, "shim_alive": False}, recovery.Finished),
        ({"boot_id": "other", "shim_alive": False}, recovery.Lost),
        ({}, recovery.Continue),
        ({"stopping": True}, recovery.Continue),
        ({"shim_alive": False, "record": RECORD}, recovery.Finished),
        ({"shim_alive": False, "engine_seen": False}, recovery.Again),
        ({"shim_alive": False, "engine_seen": False, "stopping": True}, recovery.Finished),
        ({"shim_alive": False}, recovery.Lost),
    ],
)
def test_every_case_resolves_to_one_finding(changes, kind):
    assert isinstance(recovery.find(facts(**changes), now=9.0), kind)


def test_reboot_and_lost_shim_are_told_apart():
    rebooted = recovery.find(facts(boot_id="other", shim_alive=False), now=0.0)
    lost = recovery.find(facts(shim_alive=False), now=0.0)
    assert isinstance(rebooted, recovery.Lost)
    assert rebooted.failure_class is FailureClass.HOST_REBOOTED
    assert isinstance(lost, recovery.Lost)
    assert lost.failure_class is FailureClass.SHIM_LOST


def test_handle_survives_its_stored_form():
    stored = {
        "launch_id": "l1", "attempt": 2, "identity": {"pid": 1, "start_ticks": 2, "boot_id": "b"},
        "run_dir": "/r", "protocol": 1,
    }  # fmt: skip
    assert recovery.handle_of(stored) == ShimHandle("l1", 2, ProcessIdentity(1, 2, "b"), "/r", 1)
    assert recovery.handle_of(None) is None


def test_a_spec_of_an_earlier_version_has_no_further_names():
    old = {"model": "m", "engine": "vllm", "served_model_name": "q", "fields": {}, "extra_args": {}, "env": {}}
    assert spec_of(old) == LaunchSpec("m", "vllm", "q")


def test_a_spec_is_read_back_as_it_was():
    spec = LaunchSpec("m", "vllm", "q", aliases=("a",), adapters={"l": "/l"}, max_parallel=2)
    assert spec_of(json.loads(json.dumps(asdict(spec)))) == spec
