"""Uploaded adapters: real archives, real files, and what hostile ones must not do."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.aio import run
from vllm_bootstrap.db import Database
from vllm_bootstrap.errors import AdapterRefused, Conflict, NotFound, PayloadTooLarge, StorageFull
from vllm_bootstrap.models.adapters import Adapters

MIB = 1024**2
CONFIG = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "org/base",
}


def safetensors(size: int = 64) -> bytes:
    header = json.dumps({"a.lora_A.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


def adapter(**changes: bytes) -> dict[str, bytes]:
    files = {"adapter_config.json": json.dumps(CONFIG).encode(), "adapter_model.safetensors": safetensors()}
    return files | {name.replace("__", "."): content for name, content in changes.items()}


def tar(files: dict[str, bytes], *, packed: bool = False, extra: list[tarfile.TarInfo] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if packed else "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in extra or []:
            archive.addfile(info)
    return out.getvalue()


def zipped(files: dict[str, bytes], modes: dict[str, int] | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (modes or {}).get(name, 0) << 16
            archive.writestr(info, content)
    return out.getvalue()


@contextlib.asynccontextmanager
async def adapters(folder: Path, **changes: Any) -> AsyncIterator[Adapters]:
    db = Database.open(folder / "state.db")
    found = Adapters(db, folder / "adapters", **{"max_bytes": 4 * MIB, "reserve_bytes": 0, **changes})
    await found.start()
    try:
        yield found
    finally:
        found.close()
        db.close()


async def pieces(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def in_folder(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


@pytest.mark.parametrize(
    "archive",
    [
        tar(adapter()),
        tar(adapter(), packed=True),
        zipped(adapter()),
        tar(in_folder("./my-adapter", adapter(README__md=b"# hi", tokenizer__json=b"{}")), packed=True),
        zipped(in_folder("a/b", adapter()) | {"__MACOSX/._x": b"1", "a/b/.DS_Store": b"1"}),
        tar(in_folder("x", adapter(pad__safetensors=safetensors(512)))),
    ],
)
def test_an_adapter_is_taken_from_any_usual_archive(tmp_path: Path, archive: bytes) -> None:
    async def main() -> None:
        async with adapters(tmp_path) as found:
            told: list[int] = []
            found.on_change(lambda: told.append(len(found.all())))
            view = await found.receive("ann", "base", "mine", pieces(archive))
            assert (view.name, view.base, view.owner, view.rank) == ("mine", "base", "ann", 8)
            names = {path.name for path in Path(view.path).iterdir()}
            assert {"adapter_config.json", "adapter_model.safetensors"} <= names
            assert view.bytes == sum(path.stat().st_size for path in Path(view.path).iterdir())
            [entry] = found.entries_for("base")
            assert (entry.name, entry.source) == ("mine", view.path)
            assert found.entries_for("other") == ()
            assert found.max_rank("base") == 8
            assert told == [1]
            with pytest.raises(Conflict):
                await found.receive("ben", "base", "mine", pieces(archive))
            assert [path.name for path in (tmp_path / "adapters").iterdir()] == [Path(view.path).name]
        async with adapters(tmp_path) as again:
            assert again.get("mine") == view

    run(main())


def link(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("extra.json")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def bomb() -> bytes:
    """A few kilobytes of gzip that unpack to a tar with one large file."""
    return tar(adapter(big__json=bytes(64 * MIB)), packed=True)


def long_name() -> bytes:
    """A header that says that a name of gigabytes follows."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 3 * 1024 * MIB
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(20 * MIB))


@pytest.mark.parametrize(
    ("archive", "words"),
    [
        (tar(adapter() | {"../evil.json": b"{}"}), "leads out"),
        (tar(adapter() | {"/etc/evil.json": b"{}"}), "leads out"),
        (zipped(adapter() | {"..\\evil.json": b"{}"}), "leads out"),
        (tar(adapter(), extra=[link(tarfile.SYMTYPE)]), "link"),
        (tar(adapter(), extra=[link(tarfile.LNKTYPE)]), "link"),
        (tar(adapter(), extra=[link(tarfile.CHRTYPE)]), "device"),
        (tar(adapter(), extra=[link(tarfile.FIFOTYPE)]), "device"),
        (zipped(adapter() | {"l.json": b"/etc/passwd"}, {"l.json": stat.S_IFLNK | 0o777}), "link"),
        (tar(adapter(adapter_model__bin=b"x")), "can run code"),
        (tar(adapter(training_args__pt=b"x")), "can run code"),
        (tar(adapter(modeling__py=b"x")), "data only"),
        (tar(adapter(what__exe=b"x")), "may have files"),
        (tar(adapter() | {"l" * 300 + ".txt": b"x"}), "File name too long"),
        (zipped(adapter() | {"é" * 150 + ".txt": b"x"}), "File name too long"),
        (tar(adapter() | {"other/x.json": b"{}"}), "one folder"),
        (tar(in_folder("a", adapter()) | {"b/x.json": b"{}"}), "one folder"),
        (zipped({"adapter_config.json": json.dumps(CONFIG).encode()}), "no weights"),
        (tar({"adapter_model.safetensors": safetensors()}), "no adapter_config.json"),
        (tar({}), "no archive"),
        (zipped({}), "no archive"),
        (zipped({"x/.DS_Store": b""}), "empty"),
        (b"not an archive" * 100, "no archive"),
        (b"", "no archive"),
        (tar(adapter(), packed=True)[:-20], "damaged"),
        (zipped(adapter())[:-30], "damaged"),
        (bomb(), "more than is allowed"),
        (zipped(adapter(big__json=bytes(64 * MIB))), "more than is allowed"),
        (long_name(), "tables"),
        (zipped({f"{n}.json": b"{}" for n in range(2100)}), "more than 2000 entries"),
        (tar({f"{n}.json": b"{}" for n in range(300)}), "more than 200 files"),
        (tar(adapter(adapter_config__json=json.dumps({**CONFIG, "peft_type": "IA3"}).encode())), "only LORA"),
        (tar(adapter(adapter_config__json=b"[]")), "object"),
        (tar(adapter(adapter_model__safetensors=safetensors()[:-1])), "cut off"),
        (tar(adapter(adapter_model__safetensors=b"\x80\x04pickle, really")), "not a safetensors"),
    ],
)
def test_what_is_no_adapter_or_is_dangerous_leaves_nothing_behind(tmp_path: Path, archive: bytes, words: str) -> None:
    async def main() -> None:
        async with adapters(tmp_path) as found:
            with pytest.raises(AdapterRefused) as caught:
                await found.receive("ann", "base", "mine", pieces(archive))
            assert words in caught.value.message
            assert list((tmp_path / "adapters").iterdir()) == []
            assert found.all() == []
            await found.receive("ann", "base", "mine", pieces(tar(adapter())))

    run(main())
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"adapters", "state.db"}


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    data = bytearray(zipped(adapter()))
    at = data.find(b"PK\x01\x02")
    data[at + 8] |= 1

    async def main() -> None:
        async with adapters(tmp_path) as found:
            with pytest.raises(AdapterRefused, match="encrypted"):
                await found.receive("ann", "base", "mine", pieces(bytes(data)))

    run(main())


def test_the_allowed_size_is_the_setting(tmp_path: Path) -> None:
    archive = tar(adapter())

    async def main(max_bytes: int) -> None:
        async with adapters(tmp_path / str(max_bytes), max_bytes=max_bytes) as found:
            await found.receive("ann", "base", "mine", pieces(archive))

    run(main(len(archive)))
    with pytest.raises(PayloadTooLarge):
        run(main(len(archive) - 1))


def test_the_reserve_of_the_disk_stays_free(tmp_path: Path) -> None:
    async def main() -> None:
        async with adapters(tmp_path, reserve_bytes=2**60) as found:
            with pytest.raises(StorageFull):
                await found.receive("ann", "base", "mine", pieces(tar(adapter())))
            assert list((tmp_path / "adapters").iterdir()) == []

    run(main())


def test_an_adapter_goes_when_its_owner_wants_and_nobody_serves_it(tmp_path: Path) -> None:
    serving: set[tuple[str, str]] = {("base", "mine")}

    async def main() -> None:
        def needed(base: str, name: str) -> str | None:
            return "l123" if (base, name) in serving else None

        async with adapters(tmp_path, needed=needed) as found:
            view = await found.receive("ann", "base", "mine", pieces(tar(adapter())))
            with pytest.raises(NotFound):
                await found.delete("mine", "ben")
            with pytest.raises(Conflict, match="l123"):
                await found.delete("mine", "ann")
            serving.clear()
            await found.delete("mine", None)
            assert not Path(view.path).exists()
            with pytest.raises(NotFound):
                found.get("mine")
        async with adapters(tmp_path) as again:
            assert again.all() == []

    run(main())


def test_what_a_crash_left_is_removed_at_the_start(tmp_path: Path) -> None:
    async def main() -> None:
        async with adapters(tmp_path) as found:
            await found.receive("ann", "base", "mine", pieces(tar(adapter())))
        folder = tmp_path / "adapters"
        (folder / "adapter_half.part").mkdir()
        (folder / "adapter_half.part" / "archive").write_bytes(b"x")
        (folder / "adapter_without_row").mkdir()
        (folder / "of somebody else").mkdir()
        async with adapters(tmp_path) as again:
            names = {path.name for path in folder.iterdir()}
            assert names == {Path(again.get("mine").path).name, "of somebody else"}

    run(main())


def test_a_client_that_goes_away_leaves_nothing(tmp_path: Path) -> None:
    async def cut() -> AsyncIterator[bytes]:
        yield tar(adapter())[:2000]
        raise ConnectionResetError("gone")

    async def main() -> None:
        async with adapters(tmp_path) as found:
            with pytest.raises(ConnectionResetError, match="gone"):
                await found.receive("ann", "base", "mine", cut())
            task = asyncio.create_task(found.receive("ann", "base", "mine", _never()))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert list((tmp_path / "adapters").iterdir()) == []

    run(main())


async def _never() -> AsyncIterator[bytes]:
    yield b"x"
    await asyncio.Event().wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files to a group")
def test_engines_of_another_user_may_read_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with adapters(tmp_path, gid=12345) as found:
            view = await found.receive("ann", "base", "mine", pieces(tar(adapter())))
            found_stat = (Path(view.path) / "adapter_config.json").stat()
            assert (found_stat.st_gid, stat.S_IMODE(found_stat.st_mode)) == (12345, 0o640)
            assert Path(view.path).parent.stat().st_mode & 0o011 == 0o011

    run(main())
