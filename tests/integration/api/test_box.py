"""Health, version, GPUs, figures, metrics and the description of the API, through the whole application."""

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.control_plane import NOW, Browser, FakeDevices, key, launch_id, make, view
from tests.support.model_desk import FakeModels, entry
from vllm_bootstrap import compiled
from vllm_bootstrap.gateway.limits import RequestRecord
from vllm_bootstrap.gpus.readings import GpuProcess, Snapshot
from vllm_bootstrap.launches.types import EventView
from vllm_bootstrap.models.idle_time import ActionView, DeviceTime, IdleReport, Spent
from vllm_bootstrap.tallies import MODELS_MAX


@pytest.fixture
def services():
    return make()


@pytest.fixture
def browser(services):
    return Browser(services)


def test_live_is_not_healthy(browser, services):
    assert browser.get("/livez").json() == {"status": "ok"}
    for path in ("/healthz", "/health"):
        services.phase = "ok"
        assert (browser.get(path).status, browser.get(path).json()) == (200, {"status": "ok"})
        for phase, code in (("starting", "overloaded"), ("draining", "draining")):
            services.phase = phase
            answer = browser.get(path)
            assert (answer.status, answer.json()["status"], answer.error["code"]) == (503, phase, code)
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert browser.get("/livez").status == 200


def test_version_tells_the_build():
    browser = Browser(make(settings={"build_sha": "abc", "build_time": "today"}))
    expected = {"version": "9.9", "build_sha": "abc", "build_time": "today", "api_version": "v1"}
    plane = "compiled" if compiled.in_use() else "interpreted"
    assert browser.get("/version").json() == {**expected, "data_plane": plane}


def test_gpus_have_owner_others_and_reasons(browser, services):
    services.ledger.claim(launch_id(1), ["GPU-0"], 500, True)
    services.gpus.unsettled["GPU-0"] = "memory did not come back"
    listing = browser.get("/gpus").json()
    first, second, third = listing["data"]
    assert (listing["kind"], listing["unknown"], listing["pids_trusted"]) == ("mock", None, True)
    assert (first["state"], first["claims"]) == ("unsettled", [{"launch_id": launch_id(1), "share": 0.5}])
    assert "memory did not come back" in first["reason"]
    assert (second["state"], second["memory_used_bytes"]) == ("busy", 3 << 30)
    assert (third["state"], "timed out" in third["reason"]) == ("unknown", True)


def test_an_unknown_inventory_says_so(browser, services):
    services.inventory.now = Snapshot("cuda", (), unknown="the driver does not answer")
    listing = browser.get("/gpus").json()
    assert (listing["data"], listing["unknown"]) == ([], "the driver does not answer")


def test_stats_sum_up_the_box(browser, services):
    services.supervisor.add(view(1))
    services.ledger.claim(launch_id(1), ["GPU-0"], 1000, False)
    stats = browser.get("/stats").json()
    assert (stats["launches"], stats["uptime_s"]) == ({"ready": 1}, 5.0)
    assert stats["gpus"] == {"claimed": 1, "busy": 1, "unknown": 1}
    assert stats["queues"]["model"]["queued"] == {"batch": 3}
    assert stats["host"]["cpu_count"] >= 1
    assert stats["host"]["disk_free_bytes"] > 0


def samples(browser):
    answer = browser.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(answer.body.decode()))
    assert all(family.name.startswith("vllm_bootstrap_") for family in families)
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


def test_metrics_show_the_present(browser, services):
    services.supervisor.add(view(1))
    services.ledger.claim(launch_id(1), ["GPU-0"], 1000, False)
    found = samples(browser)
    assert found["vllm_bootstrap_launches", "ready"] == 1
    assert found["vllm_bootstrap_launches", "stopping"] == 0
    assert found["vllm_bootstrap_queue_depth", "batch"] == 3
    assert found["vllm_bootstrap_engine_log_dropped_bytes",] == 12
    assert found["vllm_bootstrap_in_flight_requests", "realtime"] == 2
    assert found["vllm_bootstrap_gpu_state", "0", "claimed"] == 1
    assert found["vllm_bootstrap_gpu_state", "1", "free"] == 0
    assert found["vllm_bootstrap_gpu_memory_used_bytes", "1"] == 3 << 30
    assert found["vllm_bootstrap_gpu_utilization_ratio", "0"] == 0.25
    assert ("vllm_bootstrap_gpu_memory_used_bytes", "2") not in found
    assert found["vllm_bootstrap_build_info", "9.9", "dev"] == 1
    assert found["vllm_bootstrap_key_file_broken",] == 0


def test_a_gpu_that_is_gone_leaves_no_figure(browser, services):
    samples(browser)
    services.inventory.now = Snapshot("mock", FakeDevices().now.gpus[:1])
    assert ("vllm_bootstrap_gpu_memory_total_bytes", "1") not in samples(browser)


def test_answers_are_counted_by_route_template_and_strangers_invent_no_label(browser, services):
    services.supervisor.add(view(1))
    browser.get(f"/status/{launch_id(1)}")
    browser.get("/status/unknown")
    browser.get("/no/such/route")
    browser.call("INVENTED", "/livez")
    found = samples(browser)
    name = "vllm_bootstrap_http_requests_total"
    assert found[name, *sorted(("/status/{launch_id}", "GET", "200"))] == 1
    assert found[name, *sorted(("/status/{launch_id}", "GET", "404"))] == 1
    assert found[name, *sorted(("none", "GET", "404"))] == 1
    assert found[name, *sorted(("/livez", "other", "405"))] == 1


def event(name, before, after, **detail):
    return EventView(1, launch_id(1), 1, 0.0, name, before, after, detail)


def test_history_rows_are_counted(browser, services):
    count = services.metrics.launch_event
    count(event("became_ready", "bootstrapping", "ready", seconds=20.0))
    count(event("shim_lost", "ready", "stopping"))
    count(event("released", "stopping", "bootstrapping", forced=True, **{"class": "shim_lost"}))
    count(event("unresponsive", "ready", "ready"))
    count(event("stop_requested", "bootstrapping", "stopping"))
    count(event("released", "stopping", "stopped", forced=False))
    found = samples(browser)
    prefix = "vllm_bootstrap_"
    assert found[prefix + "launch_transitions_total", "stopping"] == 2
    assert found[prefix + "launch_start_seconds_sum",] == 20
    assert found[prefix + "shim_losses_total",] == 1
    assert found[prefix + "launch_restarts_total",] == 1
    assert found[prefix + "forced_stops_total",] == 1
    assert found[prefix + "launch_failures_total", "shim_lost"] == 1


def record(**fields):
    base = {
        "request_id": "r", "method": "POST", "path": "/v1/completions", "status": 200, "code": None, "owner": "k",
        "model": "m", "launch_id": launch_id(1), "cls": "batch", "queue_ms": 1500, "started_at": 0.0, "duration_s": 3.0,
        "first_byte_s": 2.0, "bytes_in": 1, "bytes_out": 2,
    }  # fmt: skip
    return RequestRecord(**{**base, **fields})


def test_data_plane_requests_are_counted_by_class_and_status(browser, services):
    services.metrics.data_plane_request(record())
    services.metrics.data_plane_request(record(status=401, cls=None, launch_id=None, first_byte_s=None))
    found = samples(browser)
    assert found["vllm_bootstrap_proxy_requests_total", "200", "batch"] == 1
    assert found["vllm_bootstrap_proxy_requests_total", "401", "none"] == 1
    assert found["vllm_bootstrap_queue_wait_seconds_sum", "batch"] == 1.5
    assert found["vllm_bootstrap_proxy_first_byte_seconds_sum", "batch"] == 2
    assert ("vllm_bootstrap_queue_wait_seconds_count", "none") not in found


def test_foreign_processes_are_named(browser, services):
    seen = services.inventory.now.gpus[1]
    process = GpuProcess(77, "bob", "train", 3 << 30)
    services.inventory.now = Snapshot("cuda", (replace(seen, processes=(process,)),))
    (shown,) = browser.get("/gpus").json()["data"]
    assert shown["others"] == [{"pid": 77, "user": "bob", "name": "train", "used_bytes": 3 << 30}]


def test_the_description_has_both_planes_and_says_who_may(browser):
    document = browser.get("/openapi.json").json()
    assert document["paths"]["/launch"]["post"]["x-scopes"] == ["admin"]
    assert document["paths"]["/livez"]["get"]["security"] == []
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert (chat["x-scopes"], "text/event-stream" in chat["responses"]["200"]["content"]) == (
        ["batch", "realtime"],
        True,
    )
    proxy = document["paths"]["/proxy/{launch_id}/{upstream_path}"]["get"]
    assert [parameter["name"] for parameter in proxy["parameters"]] == ["launch_id", "upstream_path"]
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert "x-scopes" in operation, (method, path)
            assert "default" in operation["responses"], (method, path)


def test_the_docs_page_needs_no_script_and_nothing_from_elsewhere(browser):
    answer = browser.get("/docs")
    page = answer.body.decode()
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    for foreign in ("<script", "src=", "http://", "https://", "@import", "url("):
        assert foreign not in page
    assert "/v1/chat/completions" in page
    assert 'id="LaunchRequest"' in page


def test_the_description_is_for_monitors():
    browser = Browser(make([key("talk", "realtime"), key("watch", "monitor")]), "talk")
    for path in ("/docs", "/openapi.json"):
        assert browser.get(path).error["needed_scopes"] == ["monitor"]
        assert browser.get(path, authorization="Bearer watch").status == 200


# -- idle time and models -------------------------------------------------------------------------------------------


class Idle:
    def report(self):
        gpus = (
            DeviceTime("GPU-0", 0, NOW, Spent(7200, 1800, 5400), Spent(3600, 0, 3600)),
            DeviceTime("GPU-1", 1, NOW, Spent(0, 0, 7200), Spent(0, 0, 3600)),
        )
        box = DeviceTime("box", None, NOW, Spent(7200, 1800, 5400), Spent(3600, 0, 3600))
        action = ActionView("command", "failed", 2, NOW + 3, "no rights")
        return IdleReport(12.5, None, box, gpus, after_s=600, fires_in_s=587.5, actions=(action,))


def test_stats_tell_idle_hours(browser, services):
    assert browser.get("/stats").json()["idle"] is None
    services.idle = Idle()
    idle = browser.get("/stats").json()["idle"]
    assert (idle["idle_s"], idle["busy_because"], idle["after_s"], idle["fires_in_s"]) == (12.5, None, 600, 587.5)
    first, second = idle["gpus"]
    assert first == {
        "device": "GPU-0", "index": 0, "since": "2027-01-15T08:00:00Z",
        "total": {"claimed_h": 2, "working_h": 0.5, "idle_h": 1.5},
        "this_start": {"claimed_h": 1, "working_h": 0, "idle_h": 1},
    }  # fmt: skip
    assert second["total"]["idle_h"] == 2
    assert (idle["box"]["device"], idle["box"]["index"]) == ("box", None)
    assert idle["actions"] == [{
        "name": "command", "state": "failed", "attempts": 2, "last_at": "2027-01-15T08:00:03Z",
        "last_error": "no rights",
    }]  # fmt: skip


def test_idle_time_is_counted_in_metrics(browser, services):
    assert samples(browser)["vllm_bootstrap_box_idle_seconds",] == 0
    services.idle = Idle()
    services.metrics.models.idle_hook("command", "failed")
    found = samples(browser)
    assert found["vllm_bootstrap_gpu_claimed_seconds_total", "0"] == 7200
    assert found["vllm_bootstrap_gpu_working_seconds_total", "0"] == 1800
    assert found["vllm_bootstrap_gpu_idle_seconds_total", "1"] == 7200
    assert found["vllm_bootstrap_box_idle_seconds",] == 12.5
    assert found["vllm_bootstrap_idle_hook_runs_total", "command", "failed"] == 1


def test_loads_and_what_is_put_away_are_counted(browser, services):
    metrics = services.metrics.models
    metrics.catalogue(["a", "b"])
    metrics.loaded("a", "start", 42)
    metrics.loaded("a", "wake", 1.5)
    metrics.load_failed("b", "gpu_out_of_memory")
    metrics.put_away("a", "sleep", "idle")
    metrics.downloaded(1000)
    found = samples(browser)
    assert found["vllm_bootstrap_model_loads_total", "a", "loaded"] == 2
    assert found["vllm_bootstrap_model_loads_total", "b", "gpu_out_of_memory"] == 1
    assert found["vllm_bootstrap_model_load_seconds_sum", "a", "start"] == 42
    assert found["vllm_bootstrap_model_load_seconds_count", "a", "wake"] == 1
    assert found["vllm_bootstrap_model_put_away_total", "a", "idle", "sleep"] == 1
    assert found["vllm_bootstrap_model_download_bytes_total",] == 1000


def test_names_that_clients_invent_are_no_series(browser, services):
    metrics = services.metrics.models
    metrics.catalogue(["known"])
    for number in range(50):
        metrics.load_failed(f"invented-{number}", "model_not_found")
        metrics.put_away(f"invented-{number}", "stop", "operator")
        metrics.state(f"invented-{number}", "failed")
    metrics.loaded("came to be", "start", 1)
    metrics.load_failed("came to be", "engine_died")
    found = samples(browser)
    assert found["vllm_bootstrap_model_loads_total", "model_not_found", "other"] == 50
    assert found["vllm_bootstrap_model_put_away_total", "operator", "other", "stop"] == 50
    assert found["vllm_bootstrap_model_loads_total", "came to be", "engine_died"] == 1
    assert not any("invented" in label for labels in found for label in labels)


def test_there_are_never_more_names_than_a_few_hundred(browser, services):
    for number in range(MODELS_MAX + 5):
        services.metrics.models.loaded(f"m{number}", "start", 1)
    assert samples(browser)["vllm_bootstrap_model_loads_total", "loaded", "other"] == 5


def test_states_of_models_and_who_waits_are_of_the_present(browser, services):
    services.models = FakeModels()
    services.metrics.models.catalogue(["org/chat", "b"])
    services.models.put(entry("org/chat"), state="loading", waiting={"realtime": 2, "batch": 1})
    services.models.put(entry("b"), state="loaded", waiting={"realtime": 5})
    found = samples(browser)
    assert found["vllm_bootstrap_model_state", "loading", "org/chat"] == 1
    assert found["vllm_bootstrap_model_state", "loaded", "org/chat"] == 0
    assert found["vllm_bootstrap_held_requests", "realtime"] == 2
    assert found["vllm_bootstrap_held_requests", "batch"] == 1
    del services.models.views["org/chat"]
    found = samples(browser)
    assert not any("org/chat" in labels for labels in found)
    assert found["vllm_bootstrap_model_state", "b", "loaded"] == 1
    assert found["vllm_bootstrap_held_requests", "realtime"] == 0
