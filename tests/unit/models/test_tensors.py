"""Counting what safetensors headers name."""

import json

import pytest

from vllm_bootstrap.models.tensors import count, parse_header


def tensor(dtype="BF16", shape=(4, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": None if offsets is None else list(offsets)}


def test_a_header_without_its_metadata():
    raw = json.dumps({"__metadata__": {"format": "pt"}, "a": tensor()}).encode()
    assert list(parse_header(raw)) == ["a"]


@pytest.mark.parametrize("raw", [b"[]", b"{", b'{"a": 1}', b"\xff", b"[" * 100_000])
def test_what_is_no_header(raw):
    with pytest.raises(ValueError):
        parse_header(raw)


def test_sizes_by_dtype_and_the_vocabulary():
    small = tensor("F8_E4M3", offsets=(100, 150))
    headers = [
        {"model.embed_tokens.weight": tensor(offsets=(0, 100)), "model.layers.0.mlp.weight": small},
        {"lm_head.weight": tensor(offsets=(0, 100)), "model.norm.weight": tensor("F32", (8,), None)},
    ]
    found = count(headers, {})
    assert found.by_dtype == {"BF16": 200, "F8_E4M3": 50, "F32": 32}
    assert (found.vocabulary_bytes, found.stored_bytes, found.exact) == (200, 282, True)


def test_what_the_engine_does_not_load_is_not_counted():
    names = ["lm_head.weight", "model.layers.1.x", "model.layers.2.x", "model.embed_tokens.weight"]
    header = {name: tensor(offsets=(0, 10)) for name in names}
    assert count([header], {"num_hidden_layers": 2}).stored_bytes == 40
    assert count([header], {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}).stored_bytes == 30
    assert count([header], {"num_hidden_layers": "?", "num_nextn_predict_layers": 1}).stored_bytes == 40
    assert count([header], {"text_config": {"tie_word_embeddings": True}}).stored_bytes == 30


@pytest.mark.parametrize("about", [tensor("X9", offsets=None), {"dtype": "F32"}, tensor(shape=("a",), offsets=None)])
def test_a_tensor_without_a_size(about):
    with pytest.raises(ValueError, match="no size"):
        count([{"a": about}], {})
