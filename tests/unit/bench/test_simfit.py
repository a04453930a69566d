"""The arithmetic of the simulator's fit: what it finds must be what made the samples."""

import json

import pytest

from bench.simfit import fit, trace, virtual
from bench.simfit.__main__ import comparison
from vllm_bootstrap.engines.simulator.stepcost import Profile, profile_of

TRUE = {
    "step_base_s": 0.002, "step_sequence_s": 1e-4, "step_context_token_s": 4e-7, "step_prompt_s": 0.001,
    "step_prefill_token_s": 3e-5, "step_prefill_pair_s": 2e-8, "passage": 0.004,
}  # fmt: skip


def swept():
    """What an engine would measure that costs exactly ``TRUE``."""
    made = {
        "decode": [
            {
                "decodes": n,
                "context": n * c,
                "prompt": c,
                "step_cpu_s": 2e-4 + n * 5e-5,
                "requests_a_step": 0.0,
                "step_s": 1,
            }
            for n in (1, 4, 16, 32)
            for c in (50, 500)
        ],
        "mixed": [{"decodes": 8, "context": 800, "prompt": p, "step_s": 1} for p in (30, 300, 900)],
        "prefill": [{"prompt": p, "ttft_s": 1, "request_cpu_s": 1e-3} for p in (4, 64, 256, 1024)],
        "busy": [
            {
                "streams": 8,
                "steps": 100,
                "decodes": 700,
                "context": 9e4,
                "requests": 9,
                "prefill": 3e3,
                "pairs": 1e6,
                "seconds": 1,
            }
        ],
        "block_size": 128,
        "kv_blocks": 100,
    }
    times = iter(dict.fromkeys(row.said(TRUE) for row in fit.rows(made)))  # the busy ones count several times
    for kind, name in (("decode", "step_s"), ("mixed", "step_s"), ("busy", "seconds"), ("prefill", "ttft_s")):
        for sample in made[kind]:
            sample[name] = next(times) * sample.get("steps", 1)
    return made


def test_the_fit_finds_what_made_the_samples():
    found = fit.coefficients(swept())
    assert found == pytest.approx(TRUE, rel=1e-3)


def test_the_fit_makes_a_profile_that_the_simulator_takes():
    made = profile_of(json.dumps(fit.profile(swept(), name="n", source="s", budget=256)))
    assert made.step_prefill_pair_s == pytest.approx(2e-8, rel=0.01)
    assert (made.api_request_s, made.api_step_s, made.api_token_s) == pytest.approx((1e-3, 2e-4, 5e-5), rel=0.01)
    assert made.latency_s == pytest.approx(0.004 - 1e-3 - 2e-4 - 5e-5, rel=0.01)
    assert (made.block_size, made.kv_blocks, made.max_num_batched_tokens) == (128, 100, 256)


def test_no_coefficient_falls_below_zero():
    assert fit.least_squares([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)], [3.0, 2.0, 1.0])[1] == 0


def test_a_trace_is_written_and_read(tmp_path):
    made = trace.poisson(20, 5, seed=1)
    trace.write(made, tmp_path / "t.jsonl")
    assert trace.read(tmp_path / "t.jsonl") == made == trace.poisson(20, 5, seed=1)
    assert {request.cls for request in made} == {"realtime", "batch"}
    (tmp_path / "t.jsonl").write_text('{"at": 1}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl:1"):
        trace.read(tmp_path / "t.jsonl")


def test_prompts_are_the_same_in_every_replay_and_share_what_they_shall():
    one, two = (trace.Request(0.0, 20, 1, shared_prefix=8) for _ in range(2))
    assert trace.prompt_ids(one, 1) == trace.prompt_ids(two, 1)
    assert trace.prompt_ids(one, 1)[:8] == trace.prompt_ids(one, 2)[:8]
    assert trace.prompt_ids(one, 1)[8:] != trace.prompt_ids(one, 2)[8:]
    assert len(trace.prompt_ids(one, 1)) == 20


def test_a_replay_costs_no_time_and_is_the_same_each_time():
    profile = Profile("n", "s", False, 0.01, step_sequence_s=0.001)
    requests = trace.poisson(10, 20, seed=3)
    found = virtual.replay(profile, requests, slots=4)
    assert found == virtual.replay(profile, requests, slots=4)
    assert found["requests"] == len(requests)
    assert min(found["ttft_s"]) >= 0.01
    assert virtual.capacity(profile, requests, slots=4) > 1
    assert comparison([found] * 3, [found] * 3).count("+0%") == 15
