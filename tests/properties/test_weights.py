"""Whatever a repository calls its files and an archive claims, what is fetched and what is unpacked stays in bounds."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_bootstrap.models.archives import unpack
from vllm_bootstrap.models.choosing import NothingToLoad, RepoFile, choose, is_weights
from vllm_bootstrap.models.hubcache import RepoCache, is_repo, is_revision
from vllm_bootstrap.models.lora import NotAnAdapter, check_header, place

PARTS = st.sampled_from(
    [
        "..",
        ".",
        "",
        "a",
        "b.json",
        "c.safetensors",
        "d.bin",
        "onnx",
        "original",
        "adapter_config.json",
        "e.gguf",
        "~",
        "\\",
    ]
)
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
REPO_PATHS = st.lists(
    st.sampled_from(
        ["a.safetensors", "b.bin", "config.json", "onnx", "x", "tok.model", "m.gguf", "consolidated.safetensors"]
    ),
    min_size=1,
    max_size=3,
).map("/".join)
CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": [], "base_model_name_or_path": "x"}


@given(st.lists(REPO_PATHS, unique=True, max_size=12), st.sampled_from([None, "auto", "safetensors", "mistral", "pt"]))
def test_what_is_chosen_is_of_the_repository_and_has_weights(paths: list[str], load_format: str | None) -> None:
    files = [RepoFile(path, 1) for path in paths]
    try:
        chosen = choose(files, load_format)
    except NothingToLoad:
        return
    assert set(chosen) <= set(files)
    assert len(set(chosen)) == len(chosen)
    assert any(is_weights(file.path) for file in chosen)
    assert not any("onnx" in PurePosixPath(file.path).parts[:-1] for file in chosen if not file.path.endswith(".gguf"))
    for kept in (file for file in files if file.path in {"config.json", "tok.model"}):
        assert kept in chosen


@given(st.one_of(PATHS, st.text(max_size=30)))
def test_a_path_in_an_archive_never_leads_anywhere_else(name: str) -> None:
    with contextlib.suppress(NotAnAdapter):
        parts = place(name)
        assert parts is None or not {"", ".", ".."} & set(parts)
        assert parts is None or not any("/" in part or "\\" in part or "\0" in part for part in parts)


@given(st.text(max_size=40), st.one_of(PATHS, st.text(max_size=30)))
def test_a_name_never_leads_out_of_the_cache(source: str, path: str) -> None:
    hub = Path("/cache/hub")
    if is_repo(source):
        cache = RepoCache(hub, source)
        assert cache.path.parent == hub
        with contextlib.suppress(ValueError):
            found = cache.pointer("a" * 40, path)
            assert ".." not in found.parts
            assert found.is_relative_to(cache.snapshots / ("a" * 40))
        with contextlib.suppress(ValueError):
            assert cache.blob(path).parent == cache.blobs
    if is_revision(path):
        assert ".." not in PurePosixPath(path).parts
        assert not path.startswith("/")


@settings(max_examples=60, deadline=None)
@given(st.lists(PATHS, max_size=5), st.booleans(), st.integers(0, 300))
def test_unpacking_writes_nowhere_else(names: list[str], as_zip: bool, cut: int) -> None:
    files = [
        ("adapter_config.json", json.dumps(CONFIG).encode()),
        ("w.safetensors", _tensors()),
        *((n, b"x") for n in names),
    ]
    out = io.BytesIO()
    if as_zip:
        with zipfile.ZipFile(out, "w") as pack, contextlib.suppress(ValueError):
            for name, content in dict(files).items():
                pack.writestr(zipfile.ZipInfo(name), content)
    else:
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name, content in files:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    data = out.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "archive").write_bytes(data[: len(data) - cut])
        (root / "inside").mkdir()
        with contextlib.suppress(NotAnAdapter):
            unpack(root / "archive", root / "inside", 10_000, lambda _: None)
        assert {path.name for path in root.iterdir()} == {"archive", "inside"}
        assert all(path.is_file() and not path.is_symlink() for path in (root / "inside").iterdir())


@given(st.lists(st.integers(0, 8), min_size=1, max_size=5), st.integers(0, 40))
def test_a_header_is_good_for_exactly_one_size(lengths: list[int], size: int) -> None:
    header, end = {}, 0
    for number, length in enumerate(lengths):
        header[str(number)] = {"dtype": "I8", "shape": [length], "data_offsets": [end, end + length]}
        end += length
    raw = json.dumps(header).encode()
    try:
        check_header("x", raw, size)
    except NotAnAdapter:
        assert size != end
    else:
        assert size == end


def _tensors() -> bytes:
    header = json.dumps({"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)
