"""What the outcome of a request says of its engine and of its lines. PURE.

Invariant: nothing is kept and nothing is decided here. Must not know: lanes, batches, storage.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_bootstrap.batches import isolation, joining
from vllm_bootstrap.batches.work import Answered, Ending, GaveUp, Job, Outcome


def broke_off(outcome: Outcome) -> bool:
    """Whether an engine that ends may have answered so, or not at all."""
    if outcome.status is not None:
        return outcome.status >= 500
    return outcome.sent and outcome.error is not None and outcome.error.status >= 500


def ending(outcome: Outcome) -> Ending:
    """As the last word on a line."""
    if outcome.status is not None:
        return Answered(outcome.status, outcome.body, outcome.request_id)
    error = outcome.error
    assert error is not None  # noqa: S101 - without a status there is one
    return GaveUp(error.code, error.message)


def isolated(ending: Ending) -> bool:
    """Whether it was given up because engines ended over it."""
    return isinstance(ending, GaveUp) and ending.code == isolation.POISON_CODE


def plan(job: Job) -> joining.Plan | None:
    """How it may travel with others, None: alone."""
    try:
        return joining.plan(job.path, job.body)
    except (ValueError, RecursionError):
        return None


def joins(other: Job, jobs: Sequence[Job], wanted: joining.Plan) -> bool:
    """Whether one more may travel with ``jobs``, which are of the plan ``wanted``."""
    if other.alone or other.deaths or len(other.body) + sum(len(job.body) for job in jobs) > joining.MOST_BYTES:
        return False
    return plan(other) == wanted


def answers(jobs: Sequence[Job], outcome: Outcome) -> list[Outcome] | None:
    """The answer to a joined request as one to each job, None when it does not come apart."""
    if outcome.status != 200:
        return None
    bodies = joining.split(jobs[0].path, [job.body for job in jobs], outcome.body)
    return None if bodies is None else [outcome._replace(body=body) for body in bodies]
