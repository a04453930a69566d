"""The second name of a batch's input on a disk that fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vllm_bootstrap.batches.acceptance import Inputs
from vllm_bootstrap.errors import NotFound, StorageFailed, StorageFull


def failing(code: int) -> object:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_failed_sync_is_the_end_of_accepting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, source = Inputs(), tmp_path / "blob"
    source.write_text("{}")
    inputs.link(source, tmp_path / "one")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(StorageFailed):
            inputs.link(source, tmp_path / "two")
    with pytest.raises(StorageFailed):
        inputs.link(source, tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_a_full_disk_and_a_file_that_is_gone_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, source = Inputs(), tmp_path / "blob"
    with pytest.raises(NotFound):
        inputs.link(source, tmp_path / "one")
    source.write_text("{}")
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", failing(errno.ENOSPC))
        with pytest.raises(StorageFull):
            inputs.link(source, tmp_path / "one")
    inputs.link(source, tmp_path / "one")
    assert (tmp_path / "one").read_text() == "{}"
