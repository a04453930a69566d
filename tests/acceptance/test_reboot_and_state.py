"""The state directory: one daemon at a time, no database of the future, a disk that is full or cannot be written."""

import contextlib
import json
import os
import sqlite3
import subprocess
import threading
import time

import pytest

from tests.support import orphans
from tests.support.daemon import DaemonProcess
from tests.support.small_disk import fill, mounted
from tests.support.waiting import wait_for

ASKED = {"model": "sim", "prompt": "a", "max_tokens": 1}
WISH = {"model": "sim", "engine": "simulator", "gpu_ids": [1]}


def refused_start(daemon: DaemonProcess) -> str:
    """Start it where it must not start; what it says. It ends by itself, soon, with 1 and one sentence."""
    done = subprocess.run(
        daemon._command, env=daemon._env, cwd=daemon.root, capture_output=True, text=True, timeout=15, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr


def test_a_second_daemon_on_the_same_state_is_refused_by_the_pid_of_the_first():
    with DaemonProcess() as daemon:
        launch_id = daemon.ready()["launch_id"]
        said = refused_start(daemon)
        assert str(daemon.pid) in said
        assert str(daemon.state_dir) in said
        # The first one and its launch have noticed nothing.
        assert daemon.request("POST", f"/proxy/{launch_id}/v1/completions", ASKED).status == 200
        announced = json.loads((daemon.state_dir / "daemon.json").read_text())
        assert announced["pid"] == daemon.pid


def test_a_database_of_a_newer_release_is_refused_untouched():
    with DaemonProcess() as daemon:
        assert daemon.stop() == 0
        file = daemon.state_dir / "state.db"
        with contextlib.closing(sqlite3.connect(file)) as db, db:
            known = db.execute("PRAGMA user_version").fetchone()[0]
            db.execute("PRAGMA user_version=99")
            db.execute("CREATE TABLE of_the_future (x)")
        said = refused_start(daemon)
        assert "99" in said
        assert "newer" in said
        with contextlib.closing(sqlite3.connect(file)) as db, db:
            assert db.execute("PRAGMA user_version").fetchone()[0] == 99
            assert db.execute("SELECT count(*) FROM of_the_future").fetchone()[0] == 0
            db.execute(f"PRAGMA user_version={known}")
        daemon.start()


def test_a_state_directory_that_cannot_be_written_is_refused():
    daemon = DaemonProcess()
    try:
        with mounted(daemon.state_dir, "1m", "ro"):
            assert "ead-only" in refused_start(daemon)
    finally:
        daemon.close()


def test_a_damaged_database_is_refused_and_said_so():
    with DaemonProcess() as daemon:
        assert daemon.stop() == 0
        file = daemon.state_dir / "state.db"
        file.write_bytes(b"not a database at all" * 1000)
        assert str(file) in refused_start(daemon)


@contextlib.contextmanager
def daemon_on_a_small_disk(**settings):
    daemon = DaemonProcess(**settings)
    try:
        with mounted(daemon.state_dir, "2m"), daemon:
            yield daemon
    finally:
        daemon.close()


def refused_for_space(daemon: DaemonProcess) -> bool:
    """Space that was set aside before may take one more; those are ended again, as they must not stay."""
    answer = daemon.request("POST", "/launch", WISH)
    if answer.status == 507:
        assert answer.error["code"] == "storage_full"
        return True
    assert answer.status in {201, 409}, answer.body
    return False


def test_a_full_disk_refuses_new_launches_only_and_everything_works_again_with_space():
    with daemon_on_a_small_disk(stop_grace_s="1") as daemon:
        serving = daemon.ready(gpu_ids=[0])["launch_id"]
        ballast = fill(daemon.state_dir)
        wait_for(lambda: refused_for_space(daemon), 10)
        assert daemon.request("GET", "/gpus").json()["data"][1]["claims"] == []
        assert daemon.request("POST", "/v1/completions", ASKED).status == 200
        assert daemon.status(serving)["state"] == "ready"

        # Stopping works: the engine dies at once; that it has ended is written down when there is space.
        outcomes = []
        asking = threading.Thread(target=lambda: outcomes.append(daemon.stop_launch(serving)))
        began = time.monotonic()
        asking.start()
        wait_for(lambda: not orphans.marked(daemon.state_id), 5)
        assert time.monotonic() - began < 5
        assert daemon.request("POST", "/v1/completions", ASKED).status == 503
        assert daemon.request("GET", "/livez").status == 200
        os.truncate(ballast, 0)
        asking.join(10)
        assert outcomes[0].json()["state"] == "stopped"
        again = daemon.ready(gpu_ids=[1])["launch_id"]
        assert daemon.stop_launch(again).json()["state"] == "stopped"
        daemon.assert_no_leftovers()
        with contextlib.closing(sqlite3.connect(daemon.state_dir / "state.db")) as db:
            assert db.execute("PRAGMA quick_check").fetchone()[0] == "ok"


def test_a_daemon_that_is_killed_on_a_full_disk_finds_its_launches_when_there_is_space():
    with daemon_on_a_small_disk() as daemon:
        status = daemon.ready(gpu_ids=[0])
        ballast = fill(daemon.state_dir)
        wait_for(lambda: refused_for_space(daemon), 10)
        daemon.kill()
        os.truncate(ballast, 0)
        daemon.start()
        again = daemon.wait_state(status["launch_id"], "ready")
        assert again["pid"] == status["pid"]
        assert daemon.request("POST", "/v1/completions", ASKED).status == 200
        assert len(daemon.request("GET", "/launches?all=true").json()["data"]) == 1


def test_a_daemon_that_starts_on_a_full_disk_serves_what_runs():
    with daemon_on_a_small_disk() as daemon:
        daemon.ready(gpu_ids=[0])
        alive = orphans.marked(daemon.state_id)
        daemon.kill()
        ballast = fill(daemon.state_dir)
        daemon.start()
        assert daemon.request("POST", "/v1/completions", ASKED).status == 200
        assert orphans.marked(daemon.state_id) == alive
        fill(daemon.state_dir)
        wait_for(lambda: refused_for_space(daemon), 10)
        os.truncate(ballast, 0)
        wait_for(lambda: daemon.request("POST", "/launch", WISH).status in {201, 409}, 10)
        assert daemon.request("POST", "/v1/completions", ASKED).status == 200


@pytest.mark.parametrize("lost", ["daemon.json", "instance.json"])
def test_small_files_that_are_lost_are_made_again(lost):
    with DaemonProcess() as daemon:
        assert daemon.stop() == 0
        (daemon.state_dir / lost).unlink(missing_ok=True)
        daemon.start()
        daemon.stop_launch(daemon.ready()["launch_id"])
        daemon.assert_no_leftovers()
