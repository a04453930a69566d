"""Weights on this machine: what is there, what is warm, what may be removed. Real files, real helper processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.models.test_downloads import MIB, REPO, WEIGHTS, content, ended, files, inherited
from tests.support import hub as stand_in
from tests.support.aio import eventually, run
from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import BadRequest, Conflict, NotEnoughMemory, NotFound
from vllm_bootstrap.models import downloads as module
from vllm_bootstrap.models import prefetch as prefetch_module
from vllm_bootstrap.models import residency
from vllm_bootstrap.models.prefetch import Prefetches
from vllm_bootstrap.models.types import ModelEntry
from vllm_bootstrap.models.weights import Weights, WeightsConfig

ENTRY = ModelEntry("tiny", REPO)


@pytest.fixture
def hub() -> Iterator[stand_in.Hub]:
    with stand_in.running() as found:
        yield found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "backoff_s", lambda failures, chance: 0.01)
    monkeypatch.setattr(module, "TELL_EVERY_S", 0.05)


@contextlib.asynccontextmanager
async def weights(folder: Path, server: stand_in.Hub | None = None, **changes: Any) -> AsyncIterator[Weights]:
    db = Database.open(folder / "state" / "state.db")
    env = {**inherited(), **(server.env() if server else {})}
    ports = {name: changes.pop(name) for name in ("needed", "on_bytes") if name in changes}
    found = Weights(db, WeightsConfig(**{"hf_home": folder, "base_env": env, **changes}), **ports)
    try:
        await found.start()
        yield found
    finally:
        await found.close()
        db.close()


def drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def test_a_download_is_seen_on_disk_served_by_its_commit_and_removed(hub: stand_in.Hub, tmp_path: Path) -> None:
    wanted = files()
    commit = hub.repo(REPO, wanted).branches["main"]
    in_use: list[str] = []
    arrived: list[int] = []

    async def main() -> None:
        def needed(_: str) -> str | None:
            return in_use[0] if in_use else None

        async with weights(tmp_path, hub, needed=needed, on_bytes=arrived.append) as found:
            assert (await found.on_disk(ENTRY)).files == ()
            assert found.resolved(ENTRY) is None
            assert found.resolved(replace(ENTRY, source="/a/folder")) is None
            view = await found.download(ENTRY, "ann")
            with pytest.raises(NotFound):
                found.newest(replace(ENTRY, revision="next"))
            assert found.newest(replace(ENTRY, name="other")).id == view.id
            assert await ended(found, view.id) == found.get(view.id)
            assert sum(arrived) == view.bytes_total
            disk = await found.on_disk(ENTRY)
            assert (disk.complete, disk.commit, disk.incomplete_bytes) == (True, commit, 0)
            assert disk.bytes == sum(file.bytes for file in disk.files) == view.bytes_total
            assert disk.cached_bytes is not None
            folder = tmp_path / "hub" / "models--org--tiny" / "snapshots" / commit
            assert found.resolved(ENTRY) == (commit, str(folder))
            assert found.resolved(replace(ENTRY, extra_args={"load-format": "mistral"})) == (commit, None)
            assert [one.id for one in found.downloads()] == [view.id]
            in_use.append("l1")
            with pytest.raises(Conflict, match="l1"):
                await found.delete(ENTRY)
            in_use.clear()
        async with weights(tmp_path, hub) as again:
            assert again.resolved(ENTRY) == (commit, str(folder))
            (folder / WEIGHTS).unlink()  # by somebody else
            assert again.resolved(ENTRY) == (commit, None)
            assert await again.delete(ENTRY) >= disk.bytes
            assert again.resolved(ENTRY) is None
            assert (await again.on_disk(ENTRY)).files == ()
            assert [path.name for path in (tmp_path / "hub").iterdir()] == [".locks"]
            with pytest.raises(NotFound):
                await again.delete(ENTRY)

    run(main())


def test_a_revision_is_removed_without_what_others_share(hub: stand_in.Hub, tmp_path: Path) -> None:
    old = files(seed=1)
    new = old | {WEIGHTS: content(MIB, 77)}
    repo = hub.repo(REPO, old)
    first = repo.branches["main"]
    second = repo.push(new, "next")
    other = replace(ENTRY, name="next", revision="next")

    async def main() -> None:
        async with weights(tmp_path, hub) as found:
            for entry in (ENTRY, other):
                await ended(found, (await found.download(entry, "ann")).id)
            assert [one and one.commit for one in map(found.resolved, (ENTRY, other))] == [first, second]
            gone = await found.delete(other)
            assert MIB <= gone < 2 * MIB
            assert (await found.on_disk(ENTRY)).complete
            assert (await found.on_disk(other)).files == ()
            with pytest.raises(NotFound):
                await found.delete(other)

    run(main())


def test_what_is_half_there_is_said_to_be(hub: stand_in.Hub, tmp_path: Path) -> None:
    hub.repo(REPO, files(4 * MIB))
    hub.hold_at = 2 * MIB

    async def main() -> None:
        async with weights(tmp_path, hub) as found:
            view = await found.download(ENTRY, "ann")
            await eventually(lambda: found.get(view.id).bytes_done >= 2 * MIB)
            disk = await found.on_disk(ENTRY)
            assert disk.incomplete_bytes == 2 * MIB
            assert not disk.complete
            with pytest.raises(Conflict, match="downloaded"):
                await found.delete(ENTRY)
            await found.cancel(view.id)
            await found.delete(ENTRY)
            assert not (tmp_path / "hub" / "models--org--tiny").exists()

    run(main())


def test_a_folder_of_the_operator_is_looked_at_and_never_touched(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "part").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "m-1.safetensors").write_bytes(b"x" * 10)
    entry = ModelEntry("mine", str(folder))

    async def main() -> None:
        async with weights(tmp_path) as found:
            assert (await found.on_disk(entry)).complete is False
            (folder / "m-2.safetensors").write_bytes(b"x" * 10)
            disk = await found.on_disk(entry, residency=False)
            assert (disk.complete, disk.commit, disk.path) == (True, None, str(folder))
            assert disk.cached_bytes is None
            with pytest.raises(BadRequest, match="folder of yours"):
                await found.delete(entry)
            with pytest.raises(BadRequest):
                await found.download(entry, "ann")
            with pytest.raises(Conflict, match="download it first"):
                await found.prefetch(ModelEntry("gone", str(tmp_path / "nowhere")))

    run(main())
    assert len(list(folder.iterdir())) == 5


@pytest.mark.parametrize("source", ["../../etc", "a/b/c", "org/..", "org/--x", ".hidden/x", "org/na me"])
def test_a_name_that_is_no_repository_leads_nowhere(tmp_path: Path, source: str) -> None:
    async def main() -> None:
        async with weights(tmp_path) as found:
            entry = ModelEntry("odd", source)
            for ask in (found.download(entry, "ann"), found.delete(entry)):
                with pytest.raises(BadRequest):
                    await ask
            assert (await found.on_disk(entry)).files == ()
            with pytest.raises(BadRequest):
                await found.download(replace(ENTRY, revision="../../x"), "ann")

    run(main())


def test_links_that_lead_out_of_the_cache_are_not_followed(tmp_path: Path) -> None:
    commit = "a" * 40
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_text("x")
    (snapshot / "config.json").symlink_to(secret)

    async def main() -> None:
        async with weights(tmp_path) as found:
            entry = replace(ENTRY, revision=commit)
            assert (await found.on_disk(entry)).files == ()
            await found.delete(entry)

    run(main())
    assert secret.exists()
    assert not snapshot.exists()


def model(folder: Path, size: int = 24 * MIB) -> ModelEntry:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(size))
    return ModelEntry("mine", str(folder))


def test_prefetch_brings_files_into_the_page_cache(tmp_path: Path) -> None:
    entry = model(tmp_path / "mine")
    path = tmp_path / "mine" / "model.safetensors"

    async def main() -> None:
        async with weights(tmp_path) as found:
            drop(path)
            cold = (await found.on_disk(entry)).cached_bytes
            assert cold is not None
            with pytest.raises(NotFound):
                found.prefetch_state(entry)
            begun = await found.prefetch(entry)
            assert begun.state == "running"
            await eventually(lambda: found.prefetch_state(entry).state != "running")
            view = found.prefetch_state(entry)
            assert (view.state, view.bytes_done, view.error) == ("completed", view.bytes_total, None)
            warm = await found.on_disk(entry)
            # The kernel may take a page back at any time; a file that was not read has none.
            assert warm.cached_bytes is not None
            assert warm.cached_bytes > 0.75 * warm.bytes > cold
            assert (await found.cancel_prefetch(entry)).state == "completed"
            assert [one.model for one in found.prefetches()] == [entry.name]

    run(main())


def test_prefetch_refuses_what_memory_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)

    async def main() -> None:
        found = Prefetches({}, reserve_bytes=100, available=lambda: 1099)
        with pytest.raises(NotEnoughMemory) as caught:
            found.begin("m", [path], 1000)
        assert caught.value.details == {"needed_bytes": 1000, "available_bytes": 1099, "reserve_bytes": 100}
        found = Prefetches({}, reserve_bytes=100, available=lambda: 1100)
        found.begin("m", [path], 1000)
        with pytest.raises(NotEnoughMemory):
            found.begin("n", [path], 1000)  # what the first needs is promised to it
        assert found.begin("m", [path], 1000).model == "m"
        assert (await found.wait("m")).state == "completed"
        found.begin("n", [path], 1000)
        await found.close()

    run(main())


def fake_vmtouch(folder: Path, script: str) -> dict[str, str]:
    folder.mkdir()
    program = folder / "vmtouch"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(stat.S_IRWXU)
    return inherited() | {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_vmtouch_is_used_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5000)
    env = fake_vmtouch(tmp_path / "bin", f'shift 2; cat "$@" > /dev/null; echo "$@" > {tmp_path}/asked')

    async def main() -> None:
        found = Prefetches(env)
        begun = found.begin("m", [path], 5000)
        assert begun.method == "vmtouch"
        view = await found.wait("m")
        assert (view.state, view.bytes_done) == ("completed", 5000)
        broken = Prefetches(fake_vmtouch(tmp_path / "broken", "exit 3"))
        broken.begin("m", [path], 5000)
        view = await broken.wait("m")
        assert view.state == "failed"
        assert "status 3" in (view.error or "")

    run(main())
    assert (tmp_path / "asked").read_text().strip() == str(path)


@pytest.mark.parametrize("how", ["cancel", "kill"])
def test_a_prefetch_that_ends_early_leaves_no_process(tmp_path: Path, how: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5000)
    env = fake_vmtouch(tmp_path / "bin", f"echo $$ > {tmp_path}/pid; exec sleep 60")

    async def main() -> None:
        found = Prefetches(env)
        found.begin("m", [path], 5000)
        pid_file = tmp_path / "pid"
        await eventually(lambda: pid_file.exists() and pid_file.read_text().strip())
        touching = psutil.Process(int(pid_file.read_text()))
        assert touching.nice() == min(19, os.nice(0) + 15)
        if how == "cancel":
            assert (await found.cancel("m")).state == "cancelled"
        else:
            os.kill(touching.ppid(), signal.SIGKILL)
            view = await found.wait("m")
            assert view.state == "failed"
            assert "SIGKILL" in (view.error or "")
        await eventually(lambda: not touching.is_running() or touching.status() == psutil.STATUS_ZOMBIE)

    run(main())


def test_a_file_that_cannot_be_read_fails_its_prefetch(tmp_path: Path) -> None:
    async def main() -> None:
        found = Prefetches(inherited() | {"PATH": "/nowhere"})
        found.begin("m", [tmp_path / "gone"], 10)
        view = await found.wait("m")
        assert view.state == "failed"
        assert "gone" in (view.error or "")

    run(main())


def test_only_so_many_prefetches_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_module, "KEPT", 1)
    path = tmp_path / "file"
    path.write_bytes(b"x")

    async def main() -> None:
        found = Prefetches({"PATH": "/nowhere"})
        for name in ("a", "b", "c"):
            found.begin(name, [path], 1)
            await found.wait(name)
        assert {view.model for view in found.all()} == {"b", "c"}

    run(main())


def test_residency_is_that_of_the_kernel(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * MIB + 1))
    drop(path)
    assert residency.cached_bytes(path) == 0
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 10, MIB)
    assert residency.cached_bytes(path) == os.sysconf("SC_PAGESIZE")
    path.read_bytes()
    assert residency.cached_bytes(path) == 3 * MIB + 1
    assert residency.cached_bytes(tmp_path / "none") is None
    empty = tmp_path / "empty"
    empty.touch()
    assert residency.cached_bytes(empty) == 0


def test_memory_is_that_of_the_container_where_it_is_less(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable: 1000 kB\n")
    assert residency.available_bytes(tmp_path, tmp_path / "none") == 1000 * 1024
    for name, text in {
        "memory.max": "500000",
        "memory.current": "450000",
        "memory.stat": "anon 1\ninactive_file 9000",
    }.items():
        (tmp_path / name).write_text(text + "\n")
    assert residency.available_bytes(tmp_path, tmp_path) == 59_000
    (tmp_path / "memory.max").write_text("max\n")
    assert residency.available_bytes(tmp_path, tmp_path) == 1000 * 1024
    assert residency.available_bytes(tmp_path / "none", tmp_path) is None
    assert (residency.available_bytes() or 0) > 0


def test_an_interrupted_removal_is_finished_at_the_start(tmp_path: Path) -> None:
    left = tmp_path / "hub" / ".models--org--x.1234.deleted"
    left.mkdir(parents=True)
    (left / "blob").write_bytes(b"x")

    async def main() -> None:
        async with weights(tmp_path):
            assert not left.exists()

    run(main())


def test_the_number_of_downloads_at_once_is_the_setting(hub: stand_in.Hub, tmp_path: Path) -> None:
    for name in ("org/a", "org/b"):
        hub.repo(name, files())
    hub.hold_at = MIB

    async def main(at_once: int) -> int:
        async with weights(tmp_path / str(at_once), hub, downloads_at_once=at_once) as found:
            for name in ("a", "b"):
                await found.download(ModelEntry(name, f"org/{name}"), "ann")
            deadline = time.monotonic() + 10
            await eventually(lambda: _fetching(found) == at_once or time.monotonic() > deadline)
            return _fetching(found)

    assert run(main(1)) == 1
    assert run(main(2)) == 2


def _fetching(found: Weights) -> int:
    return sum(view.bytes_done >= MIB for view in found.downloads())
