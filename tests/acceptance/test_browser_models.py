"""The page's models in a real browser: their states, loading and unloading, on a desk and on a phone, light and dark.

The application is the real one behind a real server; the catalogue below it is a stand-in, so that every state can be
shown.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from tests.acceptance.test_browser import BROWSER, DRIVER, Page, page
from tests.support.control_plane import make, view
from tests.support.model_desk import OOM, FakeModels, entry
from tests.support.waiting import wait_for
from vllm_bootstrap.api.app import build_api
from vllm_bootstrap.models.types import ModelProgress

__all__ = ["page"]

EVIL = "org/<img src=x onerror=alert(1)> & co"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="Chromium and its driver are not installed"),
]


class Served:
    """The control plane on a port, with a catalogue of every state."""

    def __init__(self) -> None:
        self.models = FakeModels()
        self.services = make()
        self.services.models = self.models
        self.services.supervisor.add(view(1))  # type: ignore[attr-defined]
        for state in ("unloaded", "loaded", "asleep", "falling_asleep"):
            self.models.put(entry(f"org/{state}"), state=state, load_est_s=42.0, idle_s=75.0)
        progress = ModelProgress("weights", 0.4, 12.0, 30.0)
        self.models.put(entry("org/loading"), state="loading", progress=progress, waiting={"realtime": 3})
        self.models.put(entry(EVIL), state="failed", trouble=OOM, why="It is tried again in 30 s.")
        config = uvicorn.Config(build_api(self.services), port=0, log_level="critical", lifespan="off", ws="none")
        self.server = uvicorn.Server(config)

    def run(self) -> None:
        asyncio.run(self.server.serve())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture(scope="module")
def daemon() -> Iterator[Served]:
    served = Served()
    thread = threading.Thread(target=served.run)
    thread.start()
    try:
        wait_for(lambda: served.server.started, what="the server")
        yield served
    finally:
        served.server.should_exit = True
        thread.join()


def row(name: str) -> str:
    return f"#models .row[data-name='{name}']"


def test_models_are_loaded_and_unloaded_with_their_buttons(page: Page, daemon: Served) -> None:
    page.open()
    page.see("#models-title .count", "1 failed · 1 loading")
    page.see(f"{row('org/loading')} .start", "loading weights 40 % · 12 s · about 30 s left")
    page.see(f"{row('org/loading')} .figures", "3 waiting")
    page.see(f"{row('org/loaded')} .figures", "0 in flight · idle 1 m 15 s")
    page.see(f"{row(EVIL)} .who", EVIL)  # as text: no markup came of it
    page.see(f"{row(EVIL)} .failure", "Give it more GPUs.")
    assert page.all(f"{row('org/falling_asleep')} button") == []

    page.click(f"{row('org/unloaded')} [data-load]")
    page.see(f"{row('org/unloaded')} .start", "loading weights 50 %")
    page.click(f"{row('org/unloaded')} [data-unload]")
    page.see(f"{row('org/unloaded')} [data-load]", "Load")
    page.click(f"{row(EVIL)} [data-load]")  # its name goes into an address
    page.see(f"{row(EVIL)} .start", "loading weights 50 %")
    assert daemon.models.calls == [
        ("load", "org/unloaded", False), ("unload", "org/unloaded", False), ("load", EVIL, False),
    ]  # fmt: skip
    assert page.complaints() == []


def width(page: Page, script: str) -> Any:
    return page.driver.execute_script(f"return {script};")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("across", "down"), [(1200, 900), (390, 844)])
def test_they_fit_on_a_desk_and_on_a_phone(page: Page, scheme: str, across: int, down: int, tmp_path: Path) -> None:
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": across, "height": down, "deviceScaleFactor": 1, "mobile": across < 500},
    )
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    page.open()
    page.see("#models .row")
    assert width(page, "document.documentElement.scrollWidth") <= across
    for part in page.all("#models .row > *"):
        if part.is_displayed():
            assert part.rect["x"] >= 0
            assert part.rect["x"] + part.rect["width"] <= across
    for bar in page.all("#models .bar"):
        assert bar.rect["width"] > across / 5
    ground = width(page, "getComputedStyle(document.querySelector('#models')).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is (scheme == "light")
    assert page.driver.save_screenshot(str(tmp_path / "page.png"))
