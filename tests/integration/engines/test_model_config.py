import json

import pytest

from vllm_bootstrap.engines.model_config import attention_heads, lora_rank, read_config


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"num_attention_heads": 32}, 32),
        ({"n_head": 12}, 12),
        ({"text_config": {"num_attention_heads": 16}, "vision_config": {"num_attention_heads": 7}}, 16),
        ({"thinker_config": {"text_config": {"num_attention_heads": 28}}}, 28),
        ({"num_attention_heads": 0}, None),
        ({"num_attention_heads": "32"}, None),
        ({"text_config": {"text_config": {"text_config": {"text_config": {"n_head": 1}}}}}, None),
        ({"text_config": []}, None),
        ({}, None),
        ([], None),
    ],
)
def test_heads_in_a_models_folder(tmp_path, config, heads):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert attention_heads(str(tmp_path), None) == heads


@pytest.mark.parametrize("text", ["{", "\xff" * 3, "[" * 100_000])
def test_configurations_that_cannot_be_read(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert attention_heads(str(tmp_path), None) is None


def test_nothing_is_known_of_what_is_not_here(tmp_path):
    assert attention_heads(str(tmp_path / "none"), None) is None
    assert attention_heads("org/model", None) is None
    assert attention_heads("org/model", tmp_path) is None


def cached(hf_home, commit, heads, ref=None):
    repository = hf_home / "hub/models--org--model"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
    if ref is not None:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)


def test_the_cache_by_branch_and_by_commit(tmp_path):
    cached(tmp_path, "aaa", 32, "main")
    cached(tmp_path, "bbb", 16, "v2")
    assert attention_heads("org/model", tmp_path) == 32
    assert attention_heads("org/model", tmp_path, "v2") == 16
    assert attention_heads("org/model", tmp_path, "bbb") == 16
    assert attention_heads("org/model", tmp_path, "v3") is None
    assert read_config("org/model", tmp_path) == {"num_attention_heads": 32}


@pytest.mark.parametrize(("config", "rank"), [({"r": 16}, 16), ({"r": True}, None), ({"r": 0}, None), ({}, None)])
def test_the_rank_of_an_adapter(tmp_path, config, rank):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert lora_rank(str(tmp_path), None) == rank


def test_the_rank_of_an_adapter_that_is_not_here(tmp_path):
    assert lora_rank(str(tmp_path), None) is None
    assert lora_rank("org/adapter", tmp_path) is None
