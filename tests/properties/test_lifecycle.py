"""A launch as a state machine against a model of what may be true of it: its tree, its GPUs, what was asked for."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_bootstrap.launches.lifecycle import (
    BOOTSTRAPPING,
    TERMINAL,
    TRANSITIONS,
    Event,
    Phase,
    State,
    Why,
    advance,
    is_routable,
    is_stale,
    owns_gpus,
)


class Launch(RuleBasedStateMachine):
    """Posts events the way attempts and callers do: possibly late, of attempts that are over."""

    def __init__(self) -> None:
        super().__init__()
        self.phase: Phase = BOOTSTRAPPING
        self.attempt = 1
        self.alive = True
        self.stop_wished = False
        self.ends = 0
        self.history: list[Phase] = [BOOTSTRAPPING]

    def post(self, event: Event, attempt: int, *, restart: bool = False) -> None:
        if is_stale(attempt, self.attempt):
            return
        following = advance(self.phase, event, restart=restart)
        if event is Event.RELEASED and following == BOOTSTRAPPING:
            self.attempt += 1
            self.alive = True
        if following.state in TERMINAL and self.phase.state not in TERMINAL:
            self.ends += 1
        self.phase = following
        self.history.append(following)

    @precondition(lambda self: self.phase == BOOTSTRAPPING)
    @rule()
    def becomes_ready(self) -> None:
        self.post(Event.BECAME_READY, self.attempt)

    @precondition(lambda self: self.phase == BOOTSTRAPPING)
    @rule()
    def takes_too_long(self) -> None:
        self.post(Event.BOOT_TIMED_OUT, self.attempt)

    @precondition(lambda self: self.phase.state is State.READY)
    @rule()
    def does_no_work(self) -> None:
        self.post(Event.PROBES_FAILED, self.attempt)

    @precondition(lambda self: self.phase.state is State.READY)
    @rule()
    def begins_to_sleep(self) -> None:
        self.post(Event.SLEEP_BEGUN, self.attempt)

    @precondition(lambda self: self.phase.state is State.FALLING_ASLEEP)
    @rule(event=st.sampled_from([Event.FELL_ASLEEP, Event.STAYED_AWAKE, Event.WAKE_FAILED, Event.PROBES_FAILED]))
    def is_told_how_the_sleep_went(self, event: Event) -> None:
        self.post(event, self.attempt)

    @precondition(lambda self: self.phase.state is State.ASLEEP)
    @rule()
    def begins_to_wake(self) -> None:
        self.post(Event.WAKE_BEGUN, self.attempt)

    @precondition(lambda self: self.phase.state is State.WAKING)
    @rule(event=st.sampled_from([Event.WOKE, Event.STAYED_ASLEEP, Event.WAKE_FAILED]))
    def is_told_how_the_waking_went(self, event: Event) -> None:
        self.post(event, self.attempt)

    @precondition(lambda self: self.phase.state is State.STOPPING)
    @rule(event=st.sampled_from([Event.FELL_ASLEEP, Event.STAYED_AWAKE, Event.WOKE, Event.WAKE_FAILED]))
    def a_rest_ends_too_late(self, event: Event) -> None:
        before = self.phase
        self.post(event, self.attempt)
        assert self.phase == before

    @rule()
    def is_to_stop(self) -> None:
        self.stop_wished = self.stop_wished or self.phase.state not in TERMINAL
        self.post(Event.STOP_REQUESTED, self.attempt)

    @precondition(lambda self: self.alive)
    @rule(event=st.sampled_from([Event.MAIN_EXITED, Event.SHIM_LOST]))
    def dies(self, event: Event) -> None:
        self.alive = False
        self.post(event, self.attempt)

    @precondition(lambda self: self.phase.state is State.STOPPING)
    @rule(restart=st.booleans())
    def is_released(self, restart: bool) -> None:
        self.alive = False
        self.post(Event.RELEASED, self.attempt, restart=restart)

    @rule(event=st.sampled_from(list(Event)), age=st.integers(1, 3))
    def an_old_attempt_speaks(self, event: Event, age: int) -> None:
        before = self.phase
        self.post(event, self.attempt - age, restart=True)
        assert self.phase == before

    @precondition(lambda self: self.phase.state in TERMINAL)
    @rule(event=st.sampled_from(list(Event)), restart=st.booleans())
    def anything_after_the_end(self, event: Event, restart: bool) -> None:
        before = self.phase
        self.post(event, self.attempt, restart=restart)
        assert self.phase == before

    @invariant()
    def what_is_routable_is_alive_and_owned(self) -> None:
        if is_routable(self.phase, unresponsive=False):
            assert self.alive
            assert owns_gpus(self.phase)
            assert not self.stop_wished

    @invariant()
    def what_is_alive_owns_its_gpus_or_sleeps(self) -> None:
        if self.alive:
            assert owns_gpus(self.phase) or self.phase.state is State.ASLEEP

    @invariant()
    def a_launch_ends_once_and_stays_ended(self) -> None:
        assert self.ends == (1 if self.phase.state in TERMINAL else 0)

    @invariant()
    def the_operators_wish_decides_how_it_ends(self) -> None:
        if self.stop_wished:
            assert self.phase.state in {State.STOPPING, State.STOPPED}
            assert self.phase.why in {None, Why.OPERATOR}
        if self.phase.state is State.STOPPED:
            assert self.stop_wished

    @invariant()
    def gpus_are_given_away_only_by_sleeping_or_ending(self) -> None:
        for before, after in zip(self.history, self.history[1:], strict=False):
            if owns_gpus(before) and not owns_gpus(after):
                assert after.state in TERMINAL or before.state in {State.FALLING_ASLEEP, State.WAKING}
            if not owns_gpus(before) and is_routable(after, unresponsive=False):
                raise AssertionError("traffic before its GPUs were its own again")

    @invariant()
    def ready_is_only_reached_from_bootstrapping_and_sleep(self) -> None:
        for before, after in zip(self.history, self.history[1:], strict=False):
            if after.state is State.READY:
                assert before.state in {State.BOOTSTRAPPING, State.READY, State.FALLING_ASLEEP, State.WAKING}
            if before != after and after == BOOTSTRAPPING:
                assert before.state is State.STOPPING


TestLaunch = Launch.TestCase


def test_every_phase_can_end() -> None:
    for phase in TRANSITIONS:
        stopping = advance(phase, Event.STOP_REQUESTED)
        assert advance(stopping, Event.RELEASED).state in TERMINAL
