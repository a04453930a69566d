from pathlib import Path

from vllm_bootstrap.engines.metrics_text import Counters, parse_counters

RECORDED = Path(__file__).resolve().parents[2] / "fixtures/engine_logs/metrics-0.32.0.txt"


def test_metrics_of_the_real_engine():
    assert parse_counters(RECORDED.read_text()) == Counters(
        0.0, 0.0, 3.0, 5.0, 0.0, 0.0, 0.00743263799995475, 2.0, 0.013561668999955145, 1.0
    )


def test_older_names():
    text = 'vllm:gpu_cache_usage_perc{model_name="m"} 0.5\nvllm:generation_tokens{model_name="m"} 7\n'
    text += 'vllm:time_per_output_token_seconds_sum{model_name="m"} 1.5\n'
    assert parse_counters(text) == Counters(generation_tokens=7.0, kv_usage=0.5, inter_token_s=1.5)


def test_several_engines_are_added_up():
    text = "\n".join(
        f'vllm:num_requests_running{{engine="{n}",model_name="a }} b"}} {n + 1}.0 1700000000' for n in range(2)
    )
    text += '\nvllm:kv_cache_usage_perc{engine="0"} 0.2\nvllm:kv_cache_usage_perc{engine="1"} 0.7\n'
    assert parse_counters(text) == Counters(running=3.0, kv_usage=0.7)


def test_what_is_missing_or_unreadable_is_unknown():
    text = "# HELP vllm:num_requests_running x\nvllm:num_requests_running\nvllm:num_requests_waiting x\n"
    text += "vllm:prompt_tokens_total NaN\n"
    assert parse_counters(text) == Counters()


def test_samples_without_labels():
    assert parse_counters("vllm:num_requests_running 2\n") == Counters(running=2.0)
