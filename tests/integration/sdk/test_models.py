"""The catalogue: both clients against the real control plane over a made-up catalogue."""

import threading
from dataclasses import replace

import pytest

from tests.integration.sdk.test_batches import Of
from tests.integration.sdk.test_clients import Async, Sync
from tests.support.listening import StubDaemon
from tests.support.model_desk import MIB, OOM, entry, rich
from tests.support.waiting import wait_for
from vllm_bootstrap import errors
from vllm_bootstrap.client import DownloadFailed, EndTimeout, LoadFailed, PrefetchFailed
from vllm_bootstrap.models.types import FitReport, ModelProgress, ModelView, PrefetchView
from vllm_bootstrap.sdk.waiting import EndWait


@pytest.fixture
def daemon(tmp_path):
    with StubDaemon(tmp_path) as made:
        made.desk = made.services.models
        made.desk.put(rich())
        made.desk.put(entry("other", origin="runtime"))
        yield made


@pytest.fixture
def desk(daemon):
    return daemon.desk


@pytest.fixture(params=[Sync, Async])
def call(request, daemon):
    return request.param(daemon.url)


@pytest.fixture
def models(call):
    return Of(call, "models")


def stage(state, fraction=None, **fields):
    progress = None if fraction is None else ModelProgress("weights", fraction, 1.0, 2.0)
    return ModelView(rich(), state, progress=progress, **fields)


def test_what_can_be_asked_for_is_still_a_call(call):
    assert [info.id for info in call("models").data] == ["chat", "gpt-4o", "org/chat", "other", "sql", "sql-2"]


def test_looking(models, desk):
    desk.note = "line 3"
    page = models.list()
    assert ([status.name for status in page.data], page.note) == (["org/chat", "other"], "line 3")
    desk.loaded("other")
    assert [status.name for status in models.list(state="loaded", limit=5).data] == ["other"]
    assert [status.name for status in models.list(after="org/chat").data] == ["other"]
    assert models.get("org/chat").entry.aliases == ["chat", "gpt-4o"]
    with pytest.raises(errors.ModelNotFound):
        models.get("no/such")


def test_coming_and_going(models, desk):
    made = models.add("org/new", "hub/new", ttl="15m", revision=None, gpus={"count": 2})
    assert (made.name, made.origin) == ("org/new", "runtime")
    sent = {"name": "org/new", "source": "hub/new", "ttl": "15m", "gpus": {"count": 2}}
    assert desk.calls == [("add", sent, "local")]
    with pytest.raises(errors.Conflict):
        models.add("org/new", "hub/new")
    assert models.remove("org/new").deleted
    with pytest.raises(errors.Conflict):
        models.remove("org/chat")


def test_load_waits_and_tells(models, desk):
    desk.steps = [stage("loading", 0.25), stage("waking"), stage("loaded")]
    seen = []
    done = models.load("chat", on_progress=lambda status: seen.append(status.state))
    assert (done.name, done.state) == ("org/chat", "loaded")
    assert seen == ["loading", "loading", "loading", "waking", "loaded"]


def test_load_without_waiting(models, desk):
    assert models.load("org/chat", wait=False).state == "loading"
    assert desk.calls == [("load", "org/chat", False)]


def test_a_load_that_fails_is_raised_with_its_reason(models, desk):
    desk.steps = [stage("loading", 0.25), stage("failed", trouble=OOM)]
    with pytest.raises(LoadFailed, match=r"could not be loaded \(oom\): The weights .* Give it more GPUs\.") as raised:
        models.load("org/chat")
    assert raised.value.status.failure.failure_class == "oom"


def test_a_model_that_is_put_away_while_it_loads_is_not_waited_for(models, desk):
    desk.steps = [stage("unloaded", why="asked to.")]
    with pytest.raises(LoadFailed, match="put away before it was loaded: asked to"):
        models.load("org/chat")


def test_waiting_for_a_load_ends_in_time(models, desk):
    desk.put(rich(), state="loading")
    with pytest.raises(EndTimeout, match=r"Loading org/chat has not ended after 0\.3 s"):
        models.load("org/chat", timeout_s=0.3)


def test_a_daemon_that_is_restarted_meanwhile_is_waited_for(models, desk, daemon, monkeypatch):
    told, missed, done = threading.Event(), threading.Event(), []
    really = EndWait.missed

    def seen_missing(waiting, error):
        missed.set()
        really(waiting, error)

    def load():
        done.append(models.load("org/chat", on_progress=lambda _: told.set(), timeout_s=60))

    monkeypatch.setattr(EndWait, "missed", seen_missing)
    loading = threading.Thread(target=load)
    loading.start()
    assert told.wait(10)
    daemon.stop()
    assert missed.wait(10)
    desk.loaded("org/chat")
    daemon.start()
    loading.join(30)
    assert [status.state for status in done] == ["loaded"]


def test_unload(models, desk):
    desk.put(entry(pin=True), state="loaded")
    with pytest.raises(errors.Conflict):
        models.unload("org/chat")
    assert models.unload("org/chat", force=True).state == "unloaded"


def test_check(models, desk):
    desk.fit = FitReport(fits=False, why="Too long.", suggestions=({"field": "max_model_len", "value": 4096},))
    found = models.check("org/chat", gpu_count=2, max_model_len=9000)
    assert (found.fits, found.suggestions) == (False, [{"field": "max_model_len", "value": 4096}])
    assert models.check("org/chat").fits is False
    assert desk.calls == [("check", "org/chat", 2, 9000), ("check", "org/chat", None, None)]


# -- weights --------------------------------------------------------------------------------------------------------


def test_pull_waits_and_tells(models, desk):
    seen = []

    def told(info):
        seen.append(info.bytes_done)
        now = desk.fetched["org/chat"]
        more = now.bytes_done + 5
        state = "completed" if more >= 10 else "running"
        desk.fetched["org/chat"] = replace(now, bytes_done=more, bytes_total=10, state=state)

    assert models.pull("org/chat", on_progress=told).bytes_done == 10
    assert seen == [0, 5, 10]


def test_pull_without_waiting_and_giving_it_up(models):
    assert models.pull("org/chat", wait=False).state == "running"
    assert models.download("org/chat").state == "running"
    assert models.cancel_download("org/chat").state == "cancelled"
    with pytest.raises(DownloadFailed, match="was cancelled"):
        models.pull("org/chat")


def test_a_download_that_fails_is_raised_with_its_hint(models, desk):
    models.pull("org/chat", wait=False)
    now = desk.fetched["org/chat"]
    desk.fetched["org/chat"] = replace(now, state="failed", error="The repository is gated.", hint="Set HF_TOKEN.")
    with pytest.raises(DownloadFailed, match=r"failed: The repository is gated\. Set HF_TOKEN\.") as raised:
        models.pull("org/chat")
    assert raised.value.info.state == "failed"


def test_a_download_is_watched(models, desk):
    models.pull("org/chat", wait=False)
    desk.fetched["org/chat"] = replace(desk.fetched["org/chat"], state="completed")
    assert [info.state for info in models.watch_download("org/chat")] == ["completed"]
    wait_for(lambda: desk.closed == ["org/chat"], 10)


def test_files(models, desk):
    desk.store("org/chat")
    assert models.files("org/chat").cached_bytes == 4 * MIB + 400
    assert models.delete_files("org/chat").bytes == 8 * MIB + 400


def test_prefetch(models, desk):
    with pytest.raises(errors.Conflict):
        models.prefetch("org/chat")
    desk.store("org/chat")
    assert models.prefetch("org/chat", wait=False).state == "running"
    assert models.prefetched("org/chat").state == "running"
    assert models.cancel_prefetch("org/chat").state == "cancelled"
    with pytest.raises(PrefetchFailed, match="cancelled"):
        models.prefetch("org/chat")
    desk.warmed["org/chat"] = PrefetchView("org/chat", "completed", 10, 10, 0.1)
    assert models.prefetch("org/chat").bytes_done == 10


# -- adapters -------------------------------------------------------------------------------------------------------


def test_adapters(models, desk, tmp_path):
    archive = tmp_path / "sql-9.tar.gz"
    archive.write_bytes(b"x" * 200_000)
    seen = []
    made = models.upload_adapter("org/chat", archive, on_progress=lambda done, total: seen.append((done, total)))
    assert (made.name, made.base, made.bytes) == ("sql-9", "org/chat", 200_000)
    assert seen[-1] == (200_000, 200_000)
    assert models.upload_adapter("chat", archive, name="other-name").name == "other-name"
    assert [one.name for one in models.adapters("org/chat").data] == ["other-name", "sql-9"]
    assert models.delete_adapter("org/chat", "sql-9").deleted
    with pytest.raises(errors.NotFound):
        models.delete_adapter("org/chat", "sql-9")
