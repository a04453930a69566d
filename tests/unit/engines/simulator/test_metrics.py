from prometheus_client.parser import text_string_to_metric_families

from vllm_bootstrap.engines.simulator.metrics import Histogram, Metrics


def test_a_histogram_counts_below_each_bound():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert list(histogram.lines("h", 'a="b"')) == [
        'h_bucket{a="b",le="1.0"} 2',
        'h_bucket{a="b",le="2.0"} 3',
        'h_bucket{a="b",le="+Inf"} 4',
        'h_count{a="b"} 4',
        'h_sum{a="b"} 12.0',
    ]


def test_the_text_is_what_prometheus_reads():
    metrics = Metrics()
    metrics.prompt_tokens, metrics.generation_tokens = 7, 3
    metrics.finished["stop"] += 2
    metrics.observe("time_to_first_token_seconds", 0.02)
    text = metrics.render('odd"name\\\n', {"num_requests_running": 1}).decode()
    samples = {
        (s.name, s.labels.get("finished_reason"), s.labels.get("le")): s
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert samples["vllm:num_requests_running", None, None].labels == {"engine": "0", "model_name": 'odd"name\\\n'}
    assert samples["vllm:prompt_tokens_total", None, None].value == 7
    assert samples["vllm:generation_tokens_total", None, None].value == 3
    assert samples["vllm:request_success_total", "stop", None].value == 2
    assert samples["vllm:time_to_first_token_seconds_bucket", None, "0.02"].value == 1
