"""Downloads through the real helper process, against a stand-in for the hub that misbehaves as networks do."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import hub as stand_in
from tests.support import small_disk
from tests.support.aio import eventually, run
from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import NotFound, StorageFull
from vllm_bootstrap.models import download_rows
from vllm_bootstrap.models import downloads as module
from vllm_bootstrap.models.download_rows import DownloadRows
from vllm_bootstrap.models.downloads import DownloadConfig, Downloads

REPO = "org/tiny"
WEIGHTS = "model.safetensors"
MIB = 1024**2
PASSED_ON = ("PATH", "HOME", "LD_LIBRARY_PATH", "COVERAGE_")


def inherited() -> dict[str, str]:
    """What helpers get of this process's environment; more only when they are measured."""
    return {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def files(weights_bytes: int = 2 * MIB, seed: int = 0) -> dict[str, bytes]:
    return {
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "tokenizer.json": content(5000, seed + 1),
        WEIGHTS: content(weights_bytes, seed + 2),
        "pytorch_model.bin": content(weights_bytes, seed + 3),
        "original/consolidated.00.pth": content(5000, seed + 4),
        ".gitattributes": b"*.bin filter=lfs",
    }


@pytest.fixture
def hub() -> Iterator[stand_in.Hub]:
    with stand_in.running() as found:
        yield found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts; that it is waited is the pure part's affair."""
    monkeypatch.setattr(module, "backoff_s", lambda failures, chance: 0.01)
    monkeypatch.setattr(module, "TELL_EVERY_S", 0.05)


def config(server: stand_in.Hub, folder: Path, **changes: Any) -> DownloadConfig:
    env = inherited() | {**server.env(), "HF_HOME": str(folder), "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    return DownloadConfig(**{"hub": folder / "hub", "env": env, **changes})


@contextlib.asynccontextmanager
async def downloads(server: stand_in.Hub, folder: Path, **changes: Any) -> AsyncIterator[Downloads]:
    db = Database.open(folder / "state" / "state.db")
    found = Downloads(config(server, folder, **changes), DownloadRows(db))
    try:
        await found.start()
        yield found
    finally:
        await found.close()
        db.close()


async def ended(found: Downloads, download_id: str) -> Any:
    async with asyncio.timeout(30):
        return [view async for view in found.watch(download_id)][-1]


def snapshot(folder: Path, commit: str, repo: str = REPO) -> Path:
    return folder / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / commit


def assert_whole(folder: Path, commit: str, wanted: dict[str, bytes]) -> None:
    root = snapshot(folder, commit)
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    assert set(found) == {"config.json", "tokenizer.json", WEIGHTS}
    for name, path in found.items():
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(wanted[name]).digest()
        assert path.is_symlink()


def starts(server: stand_in.Hub, commit: str) -> list[int]:
    """From where in the file of weights the hub was asked to send."""
    path = f"/lfs/{REPO}/{commit}/{WEIGHTS}"
    return [one.start for one in server.asked if one.path == path and one.method == "GET"]


def helpers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "fetching" in " ".join(_argv(child))]


def _argv(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_what_an_engine_needs_arrives_in_the_layout_that_huggingface_hub_reads(
    hub: stand_in.Hub, tmp_path: Path
) -> None:
    wanted = files()
    commit = hub.repo(REPO, wanted).branches["main"]

    async def main() -> Any:
        async with downloads(hub, tmp_path) as found:
            return await ended(found, (await found.download("tiny", REPO, "main", "ann")).id)

    view = run(main())
    assert (view.state, view.commit, view.owner, view.model) == ("completed", commit, "ann", "tiny")
    assert (
        view.bytes_done
        == view.bytes_total
        == sum(len(wanted[name]) for name in ("config.json", "tokenizer.json", WEIGHTS))
    )
    assert view.files_done == view.files_total == 3
    assert_whole(tmp_path, commit, wanted)
    assert hub.sent("pytorch_model.bin") == 0
    program = (
        "from huggingface_hub import snapshot_download;"
        f"print(snapshot_download({REPO!r}, local_files_only=True, allow_patterns=['*.safetensors', '*.json']))"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    asked = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert asked.stdout.strip() == str(snapshot(tmp_path, commit))


def test_cut_connections_cost_nothing_but_the_wait(hub: stand_in.Hub, tmp_path: Path) -> None:
    wanted = files(3 * MIB)
    commit = hub.repo(REPO, wanted).branches["main"]
    hub.cuts = [100_000, 1, 700_000, 50_000, 0, 300_000, 200_001, 99_999]

    async def main() -> Any:
        async with downloads(hub, tmp_path) as found:
            return await ended(found, (await found.download("tiny", REPO, "main", "ann")).id)

    assert run(main()).state == "completed"
    assert not hub.cuts
    assert_whole(tmp_path, commit, wanted)
    assert hub.sent(f"/lfs/{REPO}/{commit}/{WEIGHTS}") == len(wanted[WEIGHTS])


@pytest.mark.parametrize("no_ranges", [False, True])
def test_a_server_that_ignores_ranges_is_asked_for_all_of_it(
    hub: stand_in.Hub, tmp_path: Path, no_ranges: bool
) -> None:
    wanted = files()
    commit = hub.repo(REPO, wanted).branches["main"]
    hub.no_ranges, hub.cuts = no_ranges, [500_000]

    async def main() -> Any:
        async with downloads(hub, tmp_path) as found:
            return await ended(found, (await found.download("tiny", REPO, "main", "ann")).id)

    assert run(main()).state == "completed"
    assert_whole(tmp_path, commit, wanted)


def test_a_killed_helper_is_started_again_and_goes_on_where_it_was(hub: stand_in.Hub, tmp_path: Path) -> None:
    wanted = files(4 * MIB)
    commit = hub.repo(REPO, wanted).branches["main"]
    hub.hold_at = 2 * MIB

    async def main() -> Any:
        async with downloads(hub, tmp_path) as found:
            view = await found.download("tiny", REPO, "main", "ann")
            await eventually(hub.holding.is_set)
            await eventually(lambda: found.get(view.id).bytes_done >= 2 * MIB)
            [helper] = helpers()
            assert helper.nice() == min(19, os.nice(0) + 10)
            helper.kill()
            hub.go.set()
            return await ended(found, view.id)

    assert run(main()).state == "completed"
    assert_whole(tmp_path, commit, wanted)
    assert starts(hub, commit) == [0, 2 * MIB]


def test_a_cancelled_download_stays_where_it_was_and_the_next_goes_on(hub: stand_in.Hub, tmp_path: Path) -> None:
    wanted = files(4 * MIB)
    commit = hub.repo(REPO, wanted).branches["main"]
    hub.hold_at = 2 * MIB

    async def main() -> Any:
        async with downloads(hub, tmp_path) as found:
            view = await found.download("tiny", REPO, "main", "ann")
            await eventually(lambda: found.get(view.id).bytes_done >= 2 * MIB)
            cancelled = await found.cancel(view.id)
            assert cancelled.state == "cancelled"
            assert cancelled.ended_at is not None
            assert not helpers()
            assert (await found.cancel(view.id)).state == "cancelled"
            hub.go.set()
            again = await found.download("tiny", REPO, "main", "ben")
            assert again.id != view.id
            done = await ended(found, again.id)
            assert await found.cancel(again.id) == done
            return done

    assert run(main()).state == "completed"
    assert_whole(tmp_path, commit, wanted)
    assert starts(hub, commit) == [0, 2 * MIB]


def test_two_requests_for_the_same_are_one_download(hub: stand_in.Hub, tmp_path: Path) -> None:
    hub.repo(REPO, files())
    hub.hold_at = MIB

    async def main() -> None:
        async with downloads(hub, tmp_path) as found:
            views = await asyncio.gather(
                *(found.download("tiny", REPO, "main", owner) for owner in ("ann", "ben", "cy"))
            )
            assert len({view.id for view in views}) == 1
            hub.go.set()
            await ended(found, views[0].id)
            assert len(found.all()) == 1

    run(main())


def test_only_so_many_fetch_at_once(hub: stand_in.Hub, tmp_path: Path) -> None:
    for name in ("org/a", "org/b"):
        hub.repo(name, files())
    hub.hold_at = MIB

    async def main(at_once: int, folder: Path) -> list[str]:
        async with downloads(hub, folder, at_once=at_once) as found:
            first = await found.download("a", "org/a", "main", "ann")
            second = await found.download("b", "org/b", "main", "ann")
            await eventually(lambda: found.get(first.id).bytes_done >= MIB)
            if at_once == 2:
                await eventually(lambda: found.get(second.id).bytes_done >= MIB)
            return [found.get(first.id).state, found.get(second.id).state]

    assert run(main(1, tmp_path / "one")) == ["running", "queued"]
    assert run(main(2, tmp_path / "two")) == ["running", "running"]


def test_a_download_that_waits_its_turn_can_be_cancelled(hub: stand_in.Hub, tmp_path: Path) -> None:
    for name in ("org/a", "org/b"):
        hub.repo(name, files())
    hub.hold_at = MIB

    async def main() -> None:
        async with downloads(hub, tmp_path) as found:
            first = await found.download("a", "org/a", "main", "ann")
            second = await found.download("b", "org/b", "main", "ann")
            assert (await found.cancel(second.id)).state == "cancelled"
            hub.go.set()
            assert (await ended(found, first.id)).state == "completed"
            assert [view async for view in found.watch(second.id)] == [found.get(second.id)]

    run(main())


def test_files_that_a_power_cut_has_emptied_are_fetched_anew(hub: stand_in.Hub, tmp_path: Path) -> None:
    wanted = files()
    commit = hub.repo(REPO, wanted).branches["main"]

    async def main() -> Any:
        async with downloads(hub, tmp_path) as found:
            await ended(found, (await found.download("tiny", REPO, "main", "ann")).id)
            os.truncate(snapshot(tmp_path, commit) / WEIGHTS, 0)
            again = await found.download("tiny", REPO, "main", "ann")
            return await ended(found, again.id)

    assert run(main()).state == "completed"
    assert_whole(tmp_path, commit, wanted)


def test_a_state_that_cannot_be_stored_ends_it_and_the_next_start_takes_it_up(
    hub: stand_in.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repo(REPO, files())

    async def full(*_: object) -> None:
        raise StorageFull("The disk of the state directory is full.")

    async def before() -> str:
        async with downloads(hub, tmp_path) as found:
            monkeypatch.setattr(found._rows, "update", full)
            view = await found.download("tiny", REPO, "main", "ann")
            assert view.state == "failed"
            assert "full" in (view.error or "")
            return view.id

    async def after(download_id: str) -> Any:
        async with downloads(hub, tmp_path) as found:
            return await ended(found, download_id)

    assert run(after(run(before()))).state == "completed"


def test_the_commit_is_settled_before_the_first_byte(hub: stand_in.Hub, tmp_path: Path) -> None:
    old = files(seed=10)
    repo = hub.repo(REPO, old)
    commit = repo.branches["main"]
    hub.hold_at = MIB

    async def main() -> Any:
        async with downloads(hub, tmp_path) as found:
            view = await found.download("tiny", REPO, "main", "ann")
            await eventually(hub.holding.is_set)
            repo.push(files(seed=20))
            hub.cuts = [0, 0]  # it has to ask again, while main is elsewhere
            hub.go.set()
            return await ended(found, view.id)

    view = run(main())
    assert (view.state, view.commit) == ("completed", commit)
    assert_whole(tmp_path, commit, old)
    assert (tmp_path / "hub" / "models--org--tiny" / "refs" / "main").read_text() == commit


def test_a_download_is_gone_on_with_after_a_restart_of_the_daemon(hub: stand_in.Hub, tmp_path: Path) -> None:
    wanted = files(4 * MIB, seed=30)
    repo = hub.repo(REPO, wanted)
    commit = repo.branches["main"]
    hub.hold_at = 2 * MIB

    async def before() -> str:
        async with downloads(hub, tmp_path) as found:
            view = await found.download("tiny", REPO, "main", "ann")
            await eventually(lambda: found.get(view.id).bytes_done >= 2 * MIB)
            return view.id

    async def after(download_id: str) -> Any:
        async with downloads(hub, tmp_path) as found:
            return await ended(found, download_id)

    download_id = run(before())
    assert not helpers()
    repo.push(files(seed=40))
    hub.go.set()
    view = run(after(download_id))
    assert (view.state, view.commit, view.owner) == ("completed", commit, "ann")
    assert_whole(tmp_path, commit, wanted)
    assert starts(hub, commit) == [0, 2 * MIB]


def test_the_helper_dies_with_the_daemon_and_leaves_no_lock(hub: stand_in.Hub, tmp_path: Path) -> None:
    commit = hub.repo(REPO, files(4 * MIB)).branches["main"]
    hub.hold_at = 2 * MIB
    found = config(hub, tmp_path)
    task = {"mode": "fetch", "repo": REPO, "revision": "main", "hub": str(found.hub), "commit": commit}
    task["files"] = [[WEIGHTS, 4 * MIB, None]]
    program = (
        "import json, os, subprocess, sys, time;"
        "task = json.loads(sys.argv[1]) | {'parent': os.getpid()};"
        "helper = subprocess.Popen([sys.executable, '-m', 'vllm_bootstrap.models.fetching'], stdin=subprocess.PIPE);"
        "helper.stdin.write(json.dumps(task).encode()); helper.stdin.close();"
        "print(helper.pid, flush=True); time.sleep(60)"
    )
    env = {**found.env, "PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen([sys.executable, "-c", program, json.dumps(task)], env=env, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        helper = psutil.Process(int(parent.stdout.readline()))
        assert hub.holding.wait(20)
        parent.send_signal(signal.SIGKILL)
    assert helper.wait(10) is None
    locks = list((tmp_path / "hub" / ".locks").rglob("*.lock"))
    assert locks
    for lock in locks:
        with lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_disk_without_room_is_refused_with_numbers(hub: stand_in.Hub, tmp_path: Path) -> None:
    hub.repo(REPO, files(4 * MIB))
    with small_disk.mounted(tmp_path / "small", "3m"):

        async def main() -> None:
            async with downloads(hub, tmp_path, hub=tmp_path / "small" / "hub", reserve_bytes=MIB) as found:
                with pytest.raises(StorageFull) as caught:
                    await found.download("tiny", REPO, "main", "ann")
                assert caught.value.details["reserve_bytes"] == MIB
                assert caught.value.details["needed_bytes"] > 4 * MIB > caught.value.details["free_bytes"]
                [view] = found.all()
                assert view.state == "failed"
                assert str(caught.value.details["needed_bytes"]) in (view.error or "")

        run(main())
    assert not any(one.path.endswith(WEIGHTS) for one in hub.asked)


def test_a_disk_that_fills_up_meanwhile_ends_it_and_room_lets_it_go_on(hub: stand_in.Hub, tmp_path: Path) -> None:
    wanted = files(6 * MIB)
    commit = hub.repo(REPO, wanted).branches["main"]
    hub.hold_at = 2 * MIB
    home = tmp_path / "small"
    with small_disk.mounted(home, "12m"):

        async def main() -> None:
            async with downloads(hub, tmp_path, hub=home / "hub") as found:
                view = await found.download("tiny", REPO, "main", "ann")
                await eventually(lambda: found.get(view.id).bytes_done >= 2 * MIB)
                ballast = small_disk.fill(home)
                hub.go.set()
                full = await ended(found, view.id)
                assert full.state == "failed"
                assert "no room" in (full.error or "")
                assert full.hint
                ballast.unlink()
                again = await found.download("tiny", REPO, "main", "ann")
                assert (await ended(found, again.id)).state == "completed"

        run(main())
        assert_whole(home, commit, wanted)


@pytest.mark.parametrize(
    ("gated", "token", "words"),
    [(True, None, "gated"), (True, "hf_wrong", "gated"), ("hf_right", "hf_right", None)],
)
def test_gated_repositories_need_a_token_that_may_read_them(
    hub: stand_in.Hub, tmp_path: Path, gated: str | bool, token: str | None, words: str | None
) -> None:
    hub.repo(REPO, files()).gated = gated

    async def main() -> Any:
        found_config = config(hub, tmp_path)
        env = {**found_config.env, **({"HF_TOKEN": token} if token else {})}
        async with downloads(hub, tmp_path, env=env) as found:
            return await ended(found, (await found.download("tiny", REPO, "main", "ann")).id)

    view = run(main())
    if words is None:
        assert view.state == "completed"
        # The storage that files lie on is another host: the token is none of its business.
        assert {one.token for one in hub.asked if one.path.startswith("/lfs/")} == {None}
    else:
        assert view.state == "failed"
        assert words in view.error
        assert "HF_TOKEN" in view.hint


@pytest.mark.parametrize(
    ("repo", "revision", "words"),
    [("org/none", "main", "no such repository"), (REPO, "v9", "no such revision")],
)
def test_what_is_not_there_is_said_at_once(
    hub: stand_in.Hub, tmp_path: Path, repo: str, revision: str, words: str
) -> None:
    hub.repo(REPO, files())

    async def main() -> Any:
        async with downloads(hub, tmp_path) as found:
            with pytest.raises(NotFound):
                found.get("download_nothing")
            return await found.download("tiny", repo, revision, "ann")

    view = run(main())
    assert view.state == "failed"
    assert words in view.error


def test_errors_of_the_hub_pass(hub: stand_in.Hub, tmp_path: Path) -> None:
    hub.repo(REPO, files())
    hub.failing = [503, 500, 502]

    async def main() -> Any:
        async with downloads(hub, tmp_path) as found:
            return await ended(found, (await found.download("tiny", REPO, "main", "ann")).id)

    assert run(main()).state == "completed"


def test_a_hub_that_stays_broken_is_given_up(
    hub: stand_in.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repo(REPO, files())
    hub.failing = [500] * 100
    monkeypatch.setattr(module, "ATTEMPTS_WITHOUT_PROGRESS", 2)

    async def main() -> Any:
        async with downloads(hub, tmp_path) as found:
            return await ended(found, (await found.download("tiny", REPO, "main", "ann")).id)

    view = run(main())
    assert view.state == "failed"
    assert "500" in view.error


@pytest.mark.parametrize("lie", [content(2 * MIB, 99), content(MIB, 99), content(3 * MIB, 99)])
def test_what_has_the_wrong_checksum_or_size_is_never_given_a_name(
    hub: stand_in.Hub, tmp_path: Path, lie: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.repo(REPO, files()).branches["main"]
    hub.lies[WEIGHTS] = lie
    monkeypatch.setattr(module, "ATTEMPTS_WITHOUT_PROGRESS", 2)

    async def main() -> Any:
        async with downloads(hub, tmp_path) as found:
            return await ended(found, (await found.download("tiny", REPO, "main", "ann")).id)

    assert run(main()).state == "failed"
    assert not (snapshot(tmp_path, commit) / WEIGHTS).exists()
    assert not (tmp_path / "hub" / "models--org--tiny" / "refs" / "main").exists()


def test_a_silent_hub_counts_as_a_cut(hub: stand_in.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repo(REPO, files())
    hub.silent = True
    monkeypatch.setattr(module, "PLAN_TIMEOUT_S", 1.0)
    monkeypatch.setattr(module, "ATTEMPTS_WITHOUT_PROGRESS", 1)

    async def main() -> Any:
        async with downloads(hub, tmp_path) as found:
            return await ended(found, (await found.download("tiny", REPO, "main", "ann")).id)

    view = run(main())
    assert view.state == "failed"
    assert "cannot be reached" in view.error


def test_room_that_others_need_is_not_promised_twice(hub: stand_in.Hub, tmp_path: Path) -> None:
    for name in ("org/a", "org/b"):
        hub.repo(name, files(4 * MIB))
    hub.hold_at = MIB
    home = tmp_path / "small"
    with small_disk.mounted(home, "7m"):

        async def main() -> None:
            async with downloads(hub, tmp_path, hub=home / "hub") as found:
                await found.download("a", "org/a", "main", "ann")
                with pytest.raises(StorageFull) as caught:
                    await found.download("b", "org/b", "main", "ann")
                assert caught.value.details["promised_bytes"] > 0
                assert caught.value.details["free_bytes"] > caught.value.details["needed_bytes"]

        run(main())


async def failed(found: Any) -> Any:
    """A download that fails, once it has: on a busy machine that is after the answer to who asked for it."""
    view = await found.download("tiny", REPO, "main", "ann")
    await eventually(lambda: found.get(view.id).state == "failed", 60)
    return found.get(view.id)


def test_downloads_that_are_turned_off_say_so(hub: stand_in.Hub, tmp_path: Path) -> None:
    hub.repo(REPO, files())

    async def main() -> Any:
        env = {**config(hub, tmp_path).env, "HF_HUB_OFFLINE": "1"}
        async with downloads(hub, tmp_path, env=env) as found:
            return await failed(found)

    view = run(main())
    assert "turned off" in view.error


def test_a_repository_without_weights_is_refused(hub: stand_in.Hub, tmp_path: Path) -> None:
    hub.repo(REPO, {"README.md": b"# nothing", "a.gguf": b"x", "b.gguf": b"x"})

    async def main() -> Any:
        async with downloads(hub, tmp_path) as found:
            return await failed(found)

    view = run(main())
    assert "2 GGUF files" in view.error


def test_files_that_come_only_in_chunks_are_left_to_the_library(hub: stand_in.Hub, tmp_path: Path) -> None:
    wanted = files()
    commit = hub.repo(REPO, wanted).branches["main"]
    found = config(hub, tmp_path)
    program = (
        "import sys; from vllm_bootstrap.models import fetching as f;"
        "hub, commit = sys.argv[1:]; f.ONLY_IN_CHUNKS_BYTES = 2**20; said = [];"
        f"f.work(f.Task('plan', {REPO!r}, 'main', hub), said.append); files = said[-1]['files'];"
        f"f.work(f.Task('fetch', {REPO!r}, 'main', hub, commit, files), said.append); print(said[-1]);"
        f"f.work(f.Task('plan', {REPO!r}, 'main', hub, commit), said.append); print(said[-1]['missing'])"
    )
    asked = subprocess.run(
        [sys.executable, "-c", program, str(found.hub), commit],
        env={**found.env, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout.split("\n")[:2] == ["{'done': True}", "0"]
    assert_whole(tmp_path, commit, wanted)


def test_a_folder_that_cannot_be_written_is_said(hub: stand_in.Hub, tmp_path: Path) -> None:
    hub.repo(REPO, files())
    (tmp_path / "hub").write_text("a file")

    async def main() -> Any:
        async with downloads(hub, tmp_path) as found:
            return await ended(found, (await found.download("tiny", REPO, "main", "ann")).id)

    view = run(main())
    assert view.state == "failed"
    assert "cannot be written" in view.error


def test_a_helper_that_does_not_start_is_tried_again_and_given_up(
    hub: stand_in.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROGRAM", "vllm_bootstrap.no_such_program")
    monkeypatch.setattr(module, "ATTEMPTS_WITHOUT_PROGRESS", 2)

    async def main() -> Any:
        async with downloads(hub, tmp_path) as found:
            return await found.download("tiny", REPO, "main", "ann")

    view = run(main())
    assert view.state == "failed"
    assert "no_such_program" in view.error


def test_only_so_many_ended_downloads_are_remembered(
    hub: stand_in.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_rows, "KEPT", 2)

    async def main() -> None:
        async with downloads(hub, tmp_path) as found:
            for number in range(4):
                await found.download("tiny", f"org/none-{number}", "main", "ann")
            assert [view.repo for view in found.all()] == ["org/none-3", "org/none-2", "org/none-1"]

    run(main())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_it_is_done_as_the_user_that_engines_run_as(hub: stand_in.Hub, tmp_path: Path) -> None:
    """Whether that user can read this interpreter is a fact of the machine; either way root writes nothing there."""
    hub.repo(REPO, files())
    nobody = 65534
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        open_to_all = Path(name)
        open_to_all.chmod(0o777)

        async def main() -> Any:
            async with downloads(hub, tmp_path, hub=open_to_all / "hub", uid=nobody, gid=nobody) as found:
                return await ended(found, (await found.download("tiny", REPO, "main", "ann")).id)

        view = run(main())
        if view.state == "failed":
            assert "cannot read the daemon's Python" in view.error
            assert "/root" in view.error
        else:
            assert view.state == "completed"
        assert {path.lstat().st_uid for path in open_to_all.rglob("*")} <= {nobody}
