"""Engine logs under stress, through the daemon: one that is frozen or dead, a flood, a volume that is full."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.small_disk import fill, mounted
from tests.support.waiting import wait_for

MB = 1_000_000
RATE = 12 * MB
SILENCE_S = 2.0
ASKED = {"model": "sim", "prompt": "a", "max_tokens": 1}


def written(folder: Path) -> int:
    """Offset after the last byte on the disk, from the names and sizes of the segments alone."""
    names = sorted(path for path in folder.glob("*") if path.is_file())
    return max((int("".join(c for c in path.stem if c.isdigit())) + path.stat().st_size for path in names), default=0)


def page(daemon: DaemonProcess, launch_id: str, offset: int, limit: int = 1_000_000) -> dict:
    answer = daemon.request("GET", f"/logs/{launch_id}?offset={offset}&limit={limit}")
    assert answer.status == 200, answer.body
    return answer.json()


@pytest.mark.parametrize("how", ["frozen", "dead"])
def test_an_engine_that_floods_its_log_is_neither_held_up_nor_forgotten_while_nobody_reads(how):
    """At 10 MB/s and more for seconds; what came meanwhile is read on by offset afterwards."""
    with DaemonProcess(devices="mock:1") as daemon:
        launch_id = daemon.ready(knobs={"log-bytes-per-second": RATE})["launch_id"]
        folder = daemon.state_dir / "logs" / launch_id / "1"
        offset = page(daemon, launch_id, 0)["size"]
        if how == "frozen":
            daemon.send_signal(signal.SIGSTOP)
        else:
            daemon.kill()
        began, first = time.monotonic(), written(folder)
        wait_for(
            lambda: time.monotonic() > began + SILENCE_S and written(folder) > first + 10 * MB * SILENCE_S, 30, 0.1
        )
        rate = (written(folder) - first) / (time.monotonic() - began)
        if how == "frozen":
            daemon.send_signal(signal.SIGCONT)
        else:
            daemon.start()
        daemon.wait_state(launch_id, "ready")
        assert rate > 5 * MB  # it was writing all the time; how fast depends on the machine
        assert daemon.request("POST", "/v1/completions", ASKED).status == 200
        text, start = "", offset
        while len(text) < 3 * MB:
            piece = page(daemon, launch_id, offset)
            assert (piece["offset"], piece["truncated_before"]) == (offset, None)
            text, offset = text + piece["content"], piece["next_offset"]
        assert offset == start + len(text.encode())
        noise = {line for line in text.split("\n")[1:-1] if "EngineCore" in line and line.endswith("...")}
        assert len(noise) == 1  # no line is torn
        assert "bytes of output dropped" not in text
        daemon.stop_launch(launch_id)


def test_a_flood_stays_within_its_cap_and_a_tail_stays_live_over_rotation():
    segment, cap = 2 * 1024**2, 8 * 1024**2
    settings = {"engine_log_segment_bytes": segment, "engine_log_max_bytes": cap}
    with DaemonProcess(devices="mock:1", **settings) as daemon:
        launch_id = daemon.ready(knobs={"log-bytes-per-second": RATE})["launch_id"]
        folder = daemon.state_dir / "logs" / launch_id / "1"
        wait_for(lambda: written(folder) > 2 * cap, 20)
        assert sum(path.stat().st_size for path in folder.glob("*")) <= cap + segment
        connection = daemon.connection()
        connection.request("GET", f"/logs/{launch_id}?offset=0", headers={"accept": "text/event-stream"})
        answer = connection.getresponse()
        reached, seen = 0, 0
        while reached < 3 * cap:
            line = answer.readline()
            assert line, "the stream ended"
            if line.startswith(b"data: "):
                chunk = json.loads(line[6:])
                if seen == 0:
                    assert chunk["truncated_before"] == chunk["offset"] > 0
                assert chunk["offset"] >= reached
                reached, seen = chunk["next_offset"], seen + 1
        connection.close()
        tail = daemon.request("GET", f"/logs/{launch_id}?tail=3").json()
        assert len(tail["content"].splitlines()) == 3  # the last may still be in the writing
        began = time.monotonic()
        assert daemon.request("POST", "/v1/completions", ASKED).status == 200
        assert daemon.request("GET", f"/status/{launch_id}").status == 200
        assert time.monotonic() - began < 2
        assert daemon.stop_launch(launch_id).json()["forced"] is False


def test_a_full_log_volume_stops_no_engine_and_the_loss_is_told(tmp_path):
    volume = tmp_path / "logs"
    with mounted(volume, "1m"), DaemonProcess(devices="mock:1", log_dir=volume) as daemon:
        launch_id = daemon.ready(knobs={"log-bytes-per-second": 200_000})["launch_id"]
        ballast = fill(volume)
        full_at = page(daemon, launch_id, 0)["size"]
        assert daemon.request("POST", "/v1/completions", ASKED).status == 200
        # Time for it to lose something, told by the metric.
        wait_for(lambda: dropped(daemon) > 0, 10, 0.2)
        os.truncate(ballast, 0)
        wait_for(lambda: "bytes of output dropped" in page(daemon, launch_id, full_at)["content"], 20, 0.2)
        assert daemon.status(launch_id)["state"] == "ready"
        assert daemon.stop_launch(launch_id).json()["state"] == "stopped"
        daemon.assert_no_leftovers()


def dropped(daemon: DaemonProcess) -> float:
    text = daemon.request("GET", "/metrics").body.decode()
    lines = [line for line in text.splitlines() if "dropped" in line and not line.startswith("#")]
    assert lines, text
    return float(lines[0].split()[-1])
