"""How settings open and close a daemon to strangers: no key at all, a generated one, everything protected."""

from __future__ import annotations

import itertools
import stat

import pytest

from tests.support.daemon import SERVE, DaemonProcess

EXAMPLE = "example-admin-token"


def test_without_any_key_a_loopback_daemon_is_open_but_not_to_web_pages() -> None:
    with DaemonProcess() as daemon:
        assert daemon.request("GET", "/launches").status == 200
        assert daemon.request("GET", "/launches", key="anything").status == 200
        launch = daemon.launch("m")
        assert daemon.status(launch)["owner"] == "local"
        foreign = daemon.request("POST", f"/stop/{launch}", headers={"origin": "http://evil.example"})
        assert (foreign.status, foreign.error["code"]) == (403, "forbidden_origin")
        for host, status in (("evil.example", 421), ("a/#@b", 400)):
            sent = f"GET /launches HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
            assert daemon.raw(sent).startswith(f"HTTP/1.1 {status} ".encode())
        form = daemon.request("POST", "/launch", b"model=m", {"content-type": "text/plain"})
        assert (form.status, form.error["code"]) == (415, "unsupported_media_type")


def test_on_a_public_address_a_key_is_made_and_kept_secret() -> None:
    with DaemonProcess(host="0.0.0.0") as daemon:
        path = daemon.state_dir / "access_key"
        key = path.read_text().strip()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert daemon.request("GET", "/launches").status == 401
        assert daemon.request("GET", "/launches", key=key).status == 200
        assert key not in daemon.log
        assert str(path) in daemon.log
        assert "without TLS" in daemon.log
        daemon.restart()
        assert daemon.request("GET", "/launches", key=key).status == 200


def test_insecure_opens_a_public_address() -> None:
    with DaemonProcess(host="0.0.0.0", insecure="true") as daemon:
        assert daemon.request("GET", "/launches").status == 200
        assert not (daemon.state_dir / "access_key").exists()
        assert "--insecure" in daemon.log


def test_protect_all_leaves_livez_and_shared_keys_open_everything() -> None:
    with DaemonProcess(protect_all="true", access_key="shared-key-one", orchestrator_token="shared-key-two") as daemon:
        assert daemon.request("GET", "/livez", key="").status == 200
        for path in ("/healthz", "/health", "/version"):
            assert daemon.request("GET", path, key="").status == 401
        for key in ("shared-key-one", "shared-key-two"):
            for path in ("/healthz", "/launches", "/v1/models", "/metrics"):
                assert daemon.request("GET", path, key=key).status == 200


@pytest.mark.parametrize("setting", [{"access_key": EXAMPLE}, {"auth_keys_file": "FILE"}])
def test_example_tokens_are_refused_where_others_can_reach(setting: dict[str, str]) -> None:
    daemon = DaemonProcess(host="0.0.0.0", command=SERVE)
    try:
        keys = daemon.root / "keys.json"
        keys.write_text(f'{{"keys": [{{"name": "a", "token": "{EXAMPLE}", "scopes": ["admin"]}}]}}')
        for name, value in setting.items():
            daemon._env[f"VLLM_BOOTSTRAP_{name.upper()}"] = str(keys) if value == "FILE" else value
        with pytest.raises(AssertionError, match="the daemon ended"):
            daemon.start()
        assert "example token" in daemon.log
        assert "Traceback" not in daemon.log
        assert EXAMPLE not in daemon.log
    finally:
        daemon.close()


def test_a_draining_daemon_says_so_and_ends_its_streams() -> None:
    with DaemonProcess(access_key="shared-key-one") as daemon:
        launch = daemon.ready("slow", knobs={"slow_stop": 1.5})["launch_id"]
        stream = daemon.connection()
        stream.request(
            "GET", f"/status/{launch}/events", headers={"accept": "text/event-stream", "x-api-key": daemon.key}
        )
        answer = stream.getresponse()
        assert answer.readline().startswith(b"id: ")
        daemon.send_signal(15)
        answers = (daemon.request("GET", "/healthz") for _ in itertools.count())
        refused = next(answer for answer in answers if answer.status == 503)
        assert (refused.json()["status"], refused.error["code"]) == ("draining", "draining")
        answer.read()
        stream.close()
