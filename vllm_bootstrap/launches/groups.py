"""What several launches are as one: the state of a group of replicas, and how its stop went. PURE.

The state of a group, first match counts:

1. every replica has ended, one at least failed → failed
2. every replica has ended → stopped
3. one at least is ready → ready, as long as there is one: the group serves; ``ready`` says how many do
4. one at least starts, or waits for its next attempt → bootstrapping
5. one at least sleeps, or is on its way to or from it → asleep
6. otherwise → stopping

Nothing here decides anything: a replica lives and dies by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vllm_bootstrap.launches.lifecycle import TERMINAL, State
from vllm_bootstrap.launches.types import GroupView, LaunchView, StopOutcome

SLEEPING = frozenset({State.FALLING_ASLEEP.value, State.ASLEEP.value, State.WAKING.value})
ENDED = frozenset(state.value for state in TERMINAL)


def state_of(states: Collection[str]) -> str:
    """The module's decision tree. ``states`` holds at least one."""
    if all(state in ENDED for state in states):
        found = State.FAILED if State.FAILED in states else State.STOPPED  # 1, 2
    elif State.READY in states:
        found = State.READY  # 3
    elif State.BOOTSTRAPPING in states:
        found = State.BOOTSTRAPPING  # 4
    elif not SLEEPING.isdisjoint(states):
        found = State.ASLEEP  # 5
    else:
        found = State.STOPPING  # 6
    return found.value


def view_of(group_id: str, members: Sequence[LaunchView]) -> GroupView:
    """The group of ``members``, which are at least one."""
    oldest_first = tuple(sorted(members, key=lambda view: view.launch_id))
    ready = [view for view in oldest_first if view.state == State.READY]
    failures = [view for view in oldest_first if view.failure is not None]
    last = max(failures, key=lambda view: view.changed_at) if failures else None
    return GroupView(
        group_id=group_id,
        state=state_of([view.state for view in oldest_first]),
        unresponsive=bool(ready) and all(view.unresponsive for view in ready),
        ready=len(ready),
        changed_at=max(view.changed_at for view in oldest_first),
        failure=last.failure if last is not None else None,
        members=oldest_first,
    )


def outcome_of(group_id: str, members: Sequence[StopOutcome]) -> StopOutcome:
    """How the stop of a group went: forced when any of its launches had to be, None while that is known of none."""
    known = [member.forced for member in members if member.forced is not None]
    return StopOutcome(
        launch_id=group_id,
        state=state_of([member.state for member in members]),
        forced=any(known) if known else None,
        unsettled_gpus=tuple(sorted({uuid for member in members for uuid in member.unsettled_gpus})),
        members=tuple(members),
    )
