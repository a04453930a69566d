"""The page in a real browser, against a real daemon: sign in, launch, watch, read the log, stop.

May skip where no browser is installed, but not where CI runs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.waiting import wait_for

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--window-size=1200,900",
]  # fmt: skip
KEY = "the-admin-key-of-this-test"
MODEL = "org/<b>bold</b>-model"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="Chromium and its driver are not installed"),
]


class Page:
    """One browser window. Elements are found by CSS selector; waiting is for what a person would wait for."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, path: str = "/") -> None:
        self.driver.get(f"{self.url}{path}")

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def see(self, selector: str, text: str = "", timeout_s: float = 15) -> Any:
        """Wait until an element is visible and holds ``text``."""
        from selenium.common.exceptions import StaleElementReferenceException  # noqa: PLC0415

        def visible() -> Any:
            try:
                return next((e for e in self.all(selector) if e.is_displayed() and text in e.text), None)
            except StaleElementReferenceException:
                return None

        return wait_for(visible, timeout_s, what=f"to see {text!r} in {selector}")

    def gone(self, selector: str) -> None:
        script = "return [...document.querySelectorAll(arguments[0])].every((found) => !found.checkVisibility());"
        wait_for(lambda: self.driver.execute_script(script, selector), what=f"{selector} to go")

    def click(self, selector: str) -> None:
        self.see(selector).click()

    def type(self, selector: str, text: str) -> None:
        self.see(selector).send_keys(text)

    def complaints(self) -> list[str]:
        """What the browser's console says, but for answers to the page's own calls."""
        return [row["message"] for row in self.driver.get_log("browser") if row["source"] != "network"]


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(access_key=KEY) as made:
        yield made


@pytest.fixture
def page(daemon: DaemonProcess, tmp_path: Path) -> Iterator[Page]:
    from selenium import webdriver  # noqa: PLC0415 - heavy, and only here
    from selenium.webdriver.chrome.service import Service  # noqa: PLC0415

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Nothing of this machine's settings reaches the browser, proxies least of all.
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER), env=env))
    try:
        yield Page(driver, daemon.url)
    finally:
        driver.quit()


def sign_in(page: Page) -> None:
    page.open()
    page.type("#login-key", KEY)
    page.click("#login-form button")
    page.see(".headline")


def test_the_whole_way(page: Page, daemon: DaemonProcess) -> None:
    page.open()
    page.see("#login h2", "Sign in")
    assert page.all("#board") == []
    page.type("#login-key", "wrong")
    page.click("#login-form button")
    page.see("#login-error", "That key is not valid.")
    sign_in(page)
    page.see(".headline", "2 of 2 GPUs free")
    assert page.driver.get_cookie("vllm_bootstrap_session")["httpOnly"]

    page.click("#open-launch")
    page.type("#f-model", MODEL)
    page.type("#f-gpus", "1")
    page.click("#launch-form summary")
    page.type("#f-args", "boot_delay=1\nno-such-option=1")
    page.click("#launch-form [type=submit]")
    page.see("#launch-error", "no-such-option")
    field = page.see("#f-args")
    assert field.get_attribute("aria-invalid") == "true"
    field.clear()
    field.send_keys("boot_delay=1")
    page.click("#launch-form [type=submit]")
    page.gone("#launch-dialog")

    page.see(".launch h3", MODEL)  # as text: no markup came of it
    page.see(".launch .pill", "loading")
    page.see(".launch .pill", "ready")
    page.see(".headline", "1 ready · 1 of 2 GPUs free")
    page.see(".gpu .owner", MODEL)

    page.click("[data-log]")
    page.see("#log-lines div", "Application startup complete")
    page.see("#log-state", "Live")
    page.click("#log-dialog [data-close]")

    page.click("[data-stop]")
    page.see("#stop-title", MODEL)
    page.click("#stop-dialog button[value=stop]")
    page.see(".ended .pill", "stopped")
    page.see(".headline", "0 ready · 2 of 2 GPUs free")
    page.click("[data-forget]")
    page.gone(".ended")

    page.click("#sign-out")
    page.see("#login h2", "Sign in")
    assert page.all("#board") == []
    assert page.complaints() == []
    assert daemon.request("GET", "/launches").json()["data"] == []


def test_replicas_are_launched_and_stand_side_by_side(page: Page, daemon: DaemonProcess) -> None:
    sign_in(page)
    page.click("#open-launch")
    page.type("#f-model", "org/twice")
    page.click("#launch-form summary")
    page.type("#f-replicas", "3")
    page.click("#launch-form [type=submit]")
    page.see("#launch-error", "3 replicas take a GPU each, and there are 2")
    field = page.see("#f-replicas")
    assert field.get_attribute("aria-invalid") == "true"
    field.clear()
    field.send_keys("per_gpu")
    page.click("#launch-form [type=submit]")
    page.gone("#launch-dialog")
    page.see(".launch .device", "one of 2 replicas")
    assert len(page.all(".launches:not(.ended) > .launch")) == 2
    assert page.complaints() == []
    group_id = daemon.request("GET", "/launches").json()["data"][0]["group_id"]
    assert daemon.stop_launch(group_id).status == 200
    assert daemon.request("DELETE", f"/launches/{group_id}").status in (200, 204)


def test_a_link_with_a_key_leads_to_a_clean_address(page: Page) -> None:
    page.open(f"/dashboard?key={KEY}")
    page.see(".headline")
    assert page.driver.current_url == f"{page.url}/dashboard"
    page.driver.delete_all_cookies()
    page.open("/?key=wrong")
    page.see("#login-error", "That key is not valid.")
    assert page.driver.current_url == f"{page.url}/"


def test_a_log_goes_on_with_the_next_attempt(page: Page, daemon: DaemonProcess) -> None:
    sign_in(page)
    restart = {"policy": "on-failure", "max_attempts": 2, "backoff_s": 2}
    launch_id = daemon.launch("org/dies", knobs={"die_at_boot": "engine_died", "boot_delay": 1}, restart=restart)
    page.driver.execute_script("refresh();")  # the next poll might come too late for the first attempt
    page.click(f"[data-log={launch_id}]")
    page.see("#log-lines .said", "Attempt 2", timeout_s=30)
    page.see("#log-state", "This log has ended.", timeout_s=30)
    assert page.all("#log-lines .error") != []


def test_logs_are_shown_as_text_whatever_they_hold(page: Page, daemon: DaemonProcess) -> None:
    """Everything the page shows goes through ``LogTail.line``: it gets what an attacker would write."""
    sign_in(page)
    shown = page.driver.execute_script(
        """
        const made = Object.create(LogTail.prototype).line(arguments[0]);
        return [made.textContent, made.childElementCount];
        """,
        "10%\r\x1b[31m50%\x1b[0m\r<img src=x onerror=alert(1)>\x1b[2J\x1b]0;title\x07\x9b1m\r",
    )
    assert shown == ["<img src=x onerror=alert(1)>1m", 0]


def test_the_page_says_so_when_the_daemon_is_gone_and_comes_back(page: Page, daemon: DaemonProcess) -> None:
    sign_in(page)
    page.driver.execute_script("window.untouched = document.querySelector('#gpu-0');")
    page.driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    page.see("#live", "No connection")
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {**offline, "offline": False})
    page.see("#live", "Live")
    # What did not change was not replaced: focus and open details survive.
    assert page.driver.execute_script("return window.untouched === document.querySelector('#gpu-0');")


def test_a_request_is_seen_cancelled_and_remembered(page: Page, daemon: DaemonProcess) -> None:
    status = daemon.ready("org/chatty", knobs={"tokens_per_second": 20})
    asked = {"model": "org/chatty", "prompt": "a", "max_tokens": 20_000, "ignore_eos": True, "stream": True}
    connection = daemon.connection(30)
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}", "x-request-id": "mine.1"}
    connection.request("POST", "/v1/completions", json.dumps(asked), headers)
    answer = connection.getresponse()

    sign_in(page)
    page.see(".slots .figures", "1 running")
    row = page.see("#under-way .row", "org/chatty")
    assert row.get_attribute("id") == "request-mine.1"
    page.see("#under-way .pill", "running")
    page.see("#under-way .figures", "tokens so far")
    page.click("[data-cancel='mine.1']")
    page.see("#cancel-name", "org/chatty")
    page.click("#cancel-dialog button[value=cancel]")
    page.see("#under-way", "Nothing is under way.")
    page.see("#finished .row", "cancelled")
    assert b'"cancelled"' in answer.read()
    assert page.complaints() == []
    connection.close()
    daemon.stop_launch(status["launch_id"])
