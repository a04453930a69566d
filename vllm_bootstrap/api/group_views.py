"""A group of replicas as shown, made of its launches as shown. Pure functions, like ``views``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vllm_bootstrap.api.views import when
from vllm_bootstrap.launches.types import GroupView, StopOutcome
from vllm_bootstrap.wire import LaunchGroup, LaunchStatus, Load, StopResult


def group(view: GroupView, replicas: Sequence[LaunchStatus]) -> LaunchGroup:
    """``replicas`` are the launches of ``view`` in its order, with what the caller may see of them."""
    first = replicas[0]
    failures = [one for one in replicas if one.failure is not None]
    last = max(failures, key=lambda one: one.state_changed_at) if failures else None
    return LaunchGroup(
        group_id=view.group_id,
        node_id=first.node_id,
        owner=first.owner,
        state=view.state,
        unresponsive=view.unresponsive,
        ready=view.ready,
        model=first.model,
        engine=first.engine,
        served_model_name=first.served_model_name,
        gpus=[claim for one in replicas for claim in one.gpus],
        labels=first.labels,
        restart=first.restart,
        created_at=first.created_at,
        state_changed_at=when(view.changed_at),
        failure=last.failure if last is not None else None,
        load=load([one.load for one in replicas]),
        proxy_url=f"/proxy/{view.group_id}",
        replicas=list(replicas),
    )


def load(loads: Sequence[Load]) -> Load:
    """What runs on all of them together. A request that waits for any of them counts for each, so the longest queue
    is the group's."""
    capacities = [one.capacity for one in loads if one.capacity is not None]
    waits = [one.oldest_wait_s for one in loads if one.oldest_wait_s is not None]
    in_flight: Counter[str] = Counter()
    queued: Counter[str] = Counter()
    for one in loads:
        in_flight.update(one.in_flight)
        queued |= Counter(one.queued)
    classes = {name for one in loads for name in (*one.in_flight, *one.queued)}
    return Load(
        capacity=sum(capacities) if capacities else None,
        in_flight={name: in_flight[name] for name in sorted(classes, reverse=True)},
        queued={name: queued[name] for name in sorted(classes, reverse=True)},
        oldest_wait_s=max(waits, default=None),
    )


def stopped(outcome: StopOutcome) -> StopResult:
    """How a stop went; of a group, of each of its launches too."""
    return StopResult(
        launch_id=outcome.launch_id,
        state=outcome.state,
        forced=outcome.forced,
        unsettled_gpus=list(outcome.unsettled_gpus),
        replicas=[stopped(member) for member in outcome.members],
    )
