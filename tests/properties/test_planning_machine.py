"""A box with little room, models that come and go, requests at random: what the policy promises holds at every step."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_bootstrap.models.planning import Facts, Keep, Load, Plan, Policy, PutAway, Retire, Wake, plan
from vllm_bootstrap.models.types import Group

POLICY = Policy(min_loaded_s=5.0, max_wait_s=8.0, batch_turn_s=30.0, quiet_s=4.0)
NAMES = ("a", "b", "c", "d")
ROOM = 2
STEP_S = 1.0


class Box:
    """Room for two models of one unit, or one of two."""

    def __init__(self, models: dict[str, Facts], sizes: dict[str, int]) -> None:
        self.models, self.sizes = models, sizes

    def fits(self, name: str, gone: frozenset[str], coming: tuple[str, ...]) -> bool:
        held = [m.name for m in self.models.values() if m.state in ("loading", "loaded", "changing")]
        there = [one for one in held if one not in gone and one != name]
        return sum(self.sizes[one] for one in [*there, *coming, name]) <= ROOM

    fits_elsewhere = fits


class Planning(RuleBasedStateMachine):
    @initialize(
        sizes=st.lists(st.integers(1, ROOM), min_size=4, max_size=4),
        pins=st.sets(st.sampled_from(NAMES), max_size=1),
        sleepers=st.sets(st.sampled_from(NAMES)),
        priorities=st.lists(st.integers(-1, 1), min_size=4, max_size=4),
        apart=st.booleans(),
    )
    def begin(self, sizes, pins, sleepers, priorities, apart) -> None:
        self.sizes = dict(zip(NAMES, sizes, strict=True))
        self.models = {
            name: Facts(name, "unloaded", pin=name in pins, can_sleep=name in sleepers, priority=priorities[at])
            for at, name in enumerate(NAMES)
        }
        self.groups = [Group("apart", frozenset({"a", "b"}), together=False)] if apart else []
        self.waited_free: dict[str, float] = dict.fromkeys(NAMES, 0.0)

    def change(self, name: str, **values: object) -> None:
        self.models[name] = replace(self.models[name], **values)

    # What requests do

    @rule(name=st.sampled_from(NAMES), batch=st.booleans())
    def arrives(self, name: str, batch: bool) -> None:
        model = self.models[name]
        if model.state == "loaded" and not model.retired:
            field = "running_batch" if batch else "running"
            quiet = {} if batch else {"quiet_s": 0.0}
            self.change(name, **{field: getattr(model, field) + 1}, idle_s=0.0, **quiet)
        else:
            field = "batch" if batch else "realtime"
            self.change(name, **{field: getattr(model, field) + 1})

    @rule(name=st.sampled_from(NAMES), goes=st.booleans())
    def waits_elsewhere(self, name: str, goes: bool) -> None:
        """Who waited here was told to come back, or has come back."""
        self.change(name, absent=goes)

    @rule(name=st.sampled_from(NAMES))
    def all_end(self, name: str) -> None:
        quiet = {"quiet_s": 0.0} if self.models[name].running else {}
        self.change(name, running=0, running_batch=0, idle_s=0.0, **quiet)

    @rule(name=st.sampled_from(NAMES))
    def gives_up(self, name: str) -> None:
        self.change(name, realtime=0, batch=0, waits_s=0.0, batch_waits_s=0.0)

    # What launches do

    @rule(name=st.sampled_from(NAMES))
    def settles(self, name: str) -> None:
        model = self.models[name]
        if model.state == "loading":
            self.change(
                name, state="loaded", loaded_s=0.0, idle_s=0.0, quiet_s=0.0, running=model.realtime,
                running_batch=model.batch, realtime=0, batch=0, waits_s=0.0, batch_waits_s=0.0,
            )  # fmt: skip
        elif model.state == "changing":
            self.change(name, state="asleep" if model.can_sleep else "unloaded", retired=False)

    @rule()
    def time_passes(self) -> None:
        for name, model in self.models.items():
            waits = model.waits_s + STEP_S if model.realtime else 0.0
            batch_waits = model.batch_waits_s + STEP_S if model.batch else 0.0
            self.change(name, waits_s=waits, batch_waits_s=batch_waits, loaded_s=model.loaded_s + STEP_S)
            if not model.in_flight:
                self.change(name, idle_s=model.idle_s + STEP_S)
            if not model.running:
                self.change(name, quiet_s=model.quiet_s + STEP_S)

    # What is decided

    @rule()
    def look(self) -> None:
        box = Box(self.models, self.sizes)
        decided = plan(self.models.values(), box, self.groups, POLICY)
        assert plan(self.models.values(), box, self.groups, POLICY) == decided
        self.check(decided)
        for action in decided.actions:
            self.carry_out(action)

    def check(self, decided: Plan) -> None:
        touched = [action.name for action in decided.actions]
        assert len(touched) == len(set(touched)), "two things were decided for one model"
        for action in decided.actions:
            model = self.models[action.name]
            if isinstance(action, PutAway):
                assert not model.in_flight
                assert not model.pin
                assert model.state in ("loaded", "asleep")
                assert model.loaded_s >= POLICY.min_loaded_s
                assert action.how == "unload" or model.can_sleep
            elif isinstance(action, Retire):
                assert model.state == "loaded"
                assert not model.pin
                assert model.loaded_s >= POLICY.min_loaded_s
                assert model.in_flight
                wanted = self.models[action.wanted_by]
                if model.running or model.realtime:
                    assert wanted.realtime
                    assert wanted.waits_s >= POLICY.max_wait_s or wanted.priority > model.priority
            elif isinstance(action, Load | Wake):
                assert model.realtime or model.batch
                assert model.state == ("asleep" if isinstance(action, Wake) else "unloaded")
            else:
                assert isinstance(action, Keep)
                assert model.retired
        self.check_that_who_is_absent_takes_nobodys_room(decided)
        started = {action.name for action in decided.actions if isinstance(action, Load | Wake)}
        assert not started & set(decided.waits)
        idle = {m.name for m in self.models.values() if m.wanted is not None}
        assert idle <= started | set(decided.waits) | {a.name for a in decided.actions}, "somebody was forgotten"

    def check_that_who_is_absent_takes_nobodys_room(self, decided: Plan) -> None:
        """Of the same class and priority, one for whom somebody waits here would have been given what was free."""
        box, before = Box(self.models, self.sizes), []
        started = [action.name for action in decided.actions if isinstance(action, Load | Wake)]
        for name in started:
            model = self.models[name]
            for other in self.models.values() if model.absent and not self.groups else ():
                same = (other.wanted, other.priority) == (model.wanted, model.priority)
                if same and not other.absent and other.name not in before:
                    assert not box.fits(other.name, frozenset(), tuple(before)), f"{name} came before {other.name}"
            before.append(name)

    def carry_out(self, action: object) -> None:
        name = action.name
        if isinstance(action, Load | Wake):
            self.change(name, state="loading")
        elif isinstance(action, PutAway):
            self.change(name, state="changing", retired=True)
        else:
            self.change(name, retired=isinstance(action, Retire))

    @invariant()
    def never_more_than_there_is_room_for(self) -> None:
        if hasattr(self, "sizes"):
            held = [m.name for m in self.models.values() if m.state in ("loading", "loaded", "changing")]
            assert sum(self.sizes[name] for name in held) <= ROOM

    @invariant()
    def groups_that_are_kept_apart_are(self) -> None:
        if getattr(self, "groups", None):
            states = [self.models[name].state for name in ("a", "b")]
            assert not all(state in ("loading", "loaded") for state in states)

    # Nobody waits for ever

    @precondition(lambda self: any(m.realtime for m in self.models.values()))
    @rule()
    def in_the_end_who_waits_is_served(self) -> None:
        """When running requests end and nothing new comes, every realtime waiter gets its model; pinned ones aside."""
        if any(m.pin and m.state == "loaded" for m in self.models.values()):
            return
        waiting = [name for name, model in self.models.items() if model.realtime]
        served: set[str] = {name for name in waiting if self.models[name].state == "loaded"}
        for name in served:
            self.change(name, running=self.models[name].realtime, realtime=0, waits_s=0.0)
        for _ in range(80):
            for name in NAMES:
                self.all_end(name)
            self.time_passes()
            self.look()
            for name in NAMES:
                if self.models[name].state == "loading":
                    served.add(name)
                self.settles(name)
                if self.models[name].state == "loaded" and self.models[name].realtime:
                    self.change(name, running=self.models[name].realtime, realtime=0, waits_s=0.0)
            if any(m.pin and m.state == "loaded" for m in self.models.values()):
                return
        assert set(waiting) <= served


Planning.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
test_planning = Planning.TestCase
