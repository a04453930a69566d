"""Token estimates before an engine has counted."""

from __future__ import annotations

import pytest

from vllm_bootstrap.gateway import estimates


def test_a_prompt_is_estimated_from_its_size() -> None:
    assert estimates.prompt_tokens(400, "x" * 400) == 100
    assert estimates.prompt_tokens(0, None) == 0
    assert estimates.prompt_tokens(50_000_000, None) == estimates.MEDIA_TOKENS
    assert estimates.prompt_tokens(10**9, "x") == estimates.MOST_TOKENS


def test_media_inside_a_body_count_by_piece() -> None:
    media = '"data:image/png;base64,' + "A" * 100_000
    text = '{"prompt":"' + "x" * 400 + '"}' + media + '"' + media + '"'
    assert 2_100 <= estimates.prompt_tokens(len(text), text) <= 2_110
    assert estimates.prompt_tokens(8, ";base64,") == 2


@pytest.mark.parametrize(
    ("path", "fields", "sequences", "tokens"),
    [
        ("/v1/chat/completions", {"max_tokens": 10}, 1, 10),
        ("/v1/chat/completions", {"max_completion_tokens": 20, "max_tokens": 10}, 3, 60),
        ("/v1/responses", {"max_output_tokens": 5}, 1, 5),
        ("/v1/completions", {}, 2, 2 * estimates.OUTPUT_TOKENS),
        ("/v1/completions", {"max_tokens": True}, 1, estimates.OUTPUT_TOKENS),
        ("/v1/completions", {"max_tokens": -1}, 1, estimates.OUTPUT_TOKENS),
        ("/v1/completions", {"max_tokens": 10**12}, 1, estimates.MOST_TOKENS),
        ("/v1/embeddings", {"max_tokens": 10}, 1, 0),
    ],
)
def test_an_answer_is_estimated_from_its_limit(path: str, fields: dict[str, int], sequences: int, tokens: int) -> None:
    assert estimates.output_tokens(path, fields, sequences) == tokens
