"""What keeps a line from travelling with others although it asks for the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from vllm_bootstrap.batches import joining, outcomes
from vllm_bootstrap.batches.work import Job
from vllm_bootstrap.gateway.entry import REPLAYED_BYTES

SOURCE = cast("Any", SimpleNamespace(id="s"))


def job(number: int, chars: int = 10, deaths: int = 0) -> Job:
    body = b'{"model": "m", "prompt": "%b"}' % (b"x" * chars)
    return Job(SOURCE, number, joining.COMPLETIONS, body, deaths=deaths)


def test_company_is_bounded_so_that_it_can_be_taken_back() -> None:
    first = job(1, joining.MOST_BYTES // 2)
    plan = outcomes.plan(first)
    assert plan is not None
    assert outcomes.joins(job(2), [first], plan)
    assert not outcomes.joins(job(2, joining.MOST_BYTES // 2), [first], plan)
    assert joining.MOST_BYTES < REPLAYED_BYTES


def test_a_suspect_and_one_that_was_refused_in_company_go_alone() -> None:
    first = job(1)
    plan = outcomes.plan(first)
    assert plan is not None
    assert not outcomes.joins(job(2, deaths=1), [first], plan)
    refused = job(3)
    refused.alone = True
    assert not outcomes.joins(refused, [first], plan)
