"""Which files of a repository are fetched, and when a folder counts as whole."""

from __future__ import annotations

import pytest

from vllm_bootstrap.models.choosing import NothingToLoad, RepoFile, choose, is_complete, is_weights

SMALL = ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "modeling_x.py"]


def chosen(*paths: str, load_format: str | None = None) -> list[str]:
    return [file.path for file in choose([RepoFile(path, 1) for path in paths], load_format)]


def test_safetensors_are_preferred_to_the_same_as_pickles() -> None:
    shards = ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    assert chosen(*SMALL, *shards, "pytorch_model.bin", "model.pt", "x.pth") == [*SMALL, *shards]
    assert chosen(*SMALL, "pytorch_model.bin") == [*SMALL, "pytorch_model.bin"]
    assert chosen("model.safetensors", "pytorch_model.bin", load_format="pt") == [
        "model.safetensors",
        "pytorch_model.bin",
    ]


def test_it_is_chosen_folder_by_folder() -> None:
    paths = ["model.safetensors", "1_Pooling/config.json", "2_Dense/pytorch_model.bin", "3_Dense/model.safetensors"]
    assert chosen(*paths, "3_Dense/pytorch_model.bin") == paths


@pytest.mark.parametrize(
    "path",
    [
        "original/consolidated.00.pth", "onnx/model.onnx", "model.onnx_data", "openvino/x.json", "gguf/x.gguf",
        "x.gguf", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "metal/model.bin", ".gitattributes",
        ".cache/x.json", "figures/loss.png", "training_args.bin", "optimizer.pt", "rng_state_0.pth",
        "checkpoint-500/model.safetensors", "runs/events.out.tfevents.1.x", "coreml/a/b.mlmodel", "README.pdf",
    ],
)  # fmt: skip
def test_what_no_engine_reads_is_left_out(path: str) -> None:
    assert chosen("config.json", "model.safetensors", path) == ["config.json", "model.safetensors"]


def test_weights_in_two_forms_are_both_taken_unless_it_is_said_which() -> None:
    both = ["params.json", "consolidated.safetensors", "model-1.safetensors", "model.safetensors.index.json"]
    assert chosen(*both) == both
    assert "consolidated.safetensors" not in chosen(*both, load_format="safetensors")
    assert "model-1.safetensors" not in chosen(*both, load_format="mistral")
    assert chosen("consolidated.safetensors", load_format="hf") == ["consolidated.safetensors"]


def test_a_single_gguf_is_taken_where_there_is_nothing_else() -> None:
    assert chosen("config.json", "model-Q4.gguf") == ["config.json", "model-Q4.gguf"]
    with pytest.raises(NothingToLoad, match="2 GGUF files"):
        chosen("a.gguf", "b.gguf")
    with pytest.raises(NothingToLoad, match="no weights"):
        chosen("README.md", "data.parquet")


def test_weights_are_known_by_their_ending() -> None:
    assert is_weights("a/b.safetensors")
    assert not is_weights("config.json")


@pytest.mark.parametrize(
    ("sizes", "indexed", "whole"),
    [
        ({}, {}, False),
        ({"config.json": 1}, {}, False),
        ({"model.safetensors": 1}, {}, False),
        ({"config.json": 1, "model.safetensors": 1}, {}, True),
        ({"params.json": 1, "consolidated.safetensors": 1}, {}, True),
        ({"config.json": 1, "x/model.safetensors": 1}, {}, False),
        ({"config.json": 1, "part.safetensors": 1}, {}, None),
        ({"one.gguf": 1}, {}, True),
        ({"one.gguf": 1, "two.gguf": 1}, {}, None),
        ({"config.json": 1, "a.safetensors": 1}, {"i": ["a.safetensors", "b.safetensors"]}, False),
        ({"config.json": 1, "a.safetensors": 1, "b.safetensors": 0}, {"i": ["a.safetensors", "b.safetensors"]}, False),
        ({"config.json": 1, "a.safetensors": 1}, {"i": ["b.safetensors"], "j": ["a.safetensors"]}, True),
    ],
)
def test_whether_a_folder_is_whole(sizes: dict[str, int], indexed: dict[str, list[str]], whole: bool | None) -> None:
    assert is_complete(sizes, indexed) is whole
