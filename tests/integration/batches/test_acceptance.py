"""The second name of a batch's input on a disk that fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vllm_bootstrap.batches.acceptance import take
from vllm_bootstrap.batches.blobs import Folder
from vllm_bootstrap.errors import NotFound, StorageFailed, StorageFull


def failing(code: int) -> object:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_failed_sync_is_the_end_of_accepting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, source = Folder(tmp_path, reserve_bytes=0), tmp_path / "blob"
    source.write_text("{}")
    take(folder, source, tmp_path / "one")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(StorageFailed):
            take(folder, source, tmp_path / "two")
    with pytest.raises(StorageFailed):
        take(folder, source, tmp_path / "three")
    assert not (tmp_path / "three").exists()
    folder.close()


def test_a_full_disk_and_a_file_that_is_gone_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, source = Folder(tmp_path, reserve_bytes=0), tmp_path / "blob"
    with pytest.raises(NotFound):
        take(folder, source, tmp_path / "one")
    source.write_text("{}")
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", failing(errno.ENOSPC))
        with pytest.raises(StorageFull):
            take(folder, source, tmp_path / "one")
    take(folder, source, tmp_path / "one")
    assert (tmp_path / "one").read_text() == "{}"
    folder.close()
