"""What an uploaded adapter must be."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from vllm_bootstrap.models.lora import (
    NotAnAdapter,
    check_config,
    check_header,
    check_name,
    common_folder,
    header_length,
    place,
)

CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear",
    "base_model_name_or_path": "org/base",
}  # fmt: skip


def config(**changes: Any) -> bytes:
    return json.dumps(CONFIG | changes).encode()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.json", ("a.json",)),
        ("./x//a.json", ("x", "a.json")),
        ("x/", ("x",)),
        ("", None),
        ("__MACOSX/a.json", None),
        ("x/.DS_Store", None),
        ("x/._a.json", None),
    ],
)
def test_paths_in_archives(name: str, parts: tuple[str, ...] | None) -> None:
    assert place(name) == parts


@pytest.mark.parametrize(
    "name", ["/a", "../a", "a/../b", "a\\b", "C:/a", "a\0b", "a\nb", "x" * 1001, "a/\u202eb", "\ud800"]
)
def test_paths_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(NotAnAdapter):
        place(name)


def test_names_that_are_taken() -> None:
    for name in ("a.safetensors", "adapter_config.json", "README.md", "LICENSE", "tokenizer.model", "merges.txt"):
        check_name(name)
    for name in ("a.bin", "a.PT", "x.pkl", "a.py", "run.sh", ".env", "a", "a.exe", ".json"):
        with pytest.raises(NotAnAdapter):
            check_name(name)


def test_files_lie_in_one_folder() -> None:
    assert common_folder([("a", "x"), ("a", "y")]) == 1
    assert common_folder([("x",), ("y",)]) == 0
    assert common_folder([("a", "b", "x")]) == 2
    for paths in ([], [("x",), ("a", "y")], [("a", "x"), ("b", "y")], [("x",), ("x",)]):
        with pytest.raises(NotAnAdapter):
            common_folder(paths)


def test_the_largest_rank_counts() -> None:
    assert check_config(config()) == 8
    assert check_config(config(rank_pattern={"q_proj": 32}, lora_alpha=1.5, target_modules=["q"])) == 32
    assert check_config(config(init_lora_weights="gaussian", modules_to_save=None)) == 8


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "object"),
        (config(peft_type="IA3"), "only LORA"),
        (config(r=0), "rank"),
        (config(r=True), "rank"),
        (config(r="8"), "rank"),
        (config(lora_alpha=None), "lora_alpha"),
        (config(lora_alpha=True), "lora_alpha"),
        (config(target_modules=None), "target_modules"),
        (config(base_model_name_or_path=""), "base_model"),
        (config(base_model_name_or_path=None), "base_model"),
        (config(use_dora=True), "use_dora"),
        (config(init_lora_weights="pissa_niter_4"), "changes the base"),
        (config(rank_pattern=[1]), "rank_pattern"),
        (config(rank_pattern={"q": "x"}), "rank_pattern"),
        (config(rank_pattern={"q": 0}), "rank_pattern"),
    ],
)
def test_configs_that_are_refused(raw: bytes, words: str) -> None:
    with pytest.raises(NotAnAdapter, match=words):
        check_config(raw)


def tensor(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_header_that_describes_all_there_is() -> None:
    header = {"__metadata__": {"format": "pt"}, "a": tensor(), "b": tensor("BF16", [3], [16, 22])}
    raw = json.dumps(header).encode()
    check_header("x", raw, 22)
    assert header_length("x", struct.pack("<Q", len(raw)), 8 + len(raw) + 22) == len(raw)


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": tensor()}, 15),
        ({"a": tensor()}, 17),
        ({}, 0),
        ({"__metadata__": {}}, 0),
        ({"a": tensor(), "b": tensor()}, 16),
        ({"a": tensor(), "b": tensor(offsets=(20, 36))}, 36),
        ({"a": tensor(dtype="F99")}, 16),
        ({"a": tensor(dtype=[])}, 16),
        ({"a": tensor(shape=[2, -2])}, 16),
        ({"a": tensor(shape="22")}, 16),
        ({"a": tensor(shape=[2, 3])}, 16),
        ({"a": tensor(offsets=(0,))}, 16),
        ({"a": tensor(offsets=None)}, 16),
        ({"a": 1}, 16),
        ([], 16),
    ],
)
def test_headers_that_are_refused(header: Any, size: int) -> None:
    with pytest.raises(NotAnAdapter):
        check_header("x", json.dumps(header).encode(), size)


@pytest.mark.parametrize(
    ("first", "size"), [(b"", 0), (b"1234567", 100), (struct.pack("<Q", 93), 100), (struct.pack("<Q", 1), 100)]
)
def test_files_that_are_no_safetensors(first: bytes, size: int) -> None:
    with pytest.raises(NotAnAdapter):
        header_length("x", first, size)
