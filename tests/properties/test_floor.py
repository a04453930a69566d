"""Both classes at one launch under the real budget: beside realtime without end batch goes on, one place at a time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_bootstrap.scheduler.admission import Admission
from vllm_bootstrap.scheduler.budget import BudgetPolicy
from vllm_bootstrap.scheduler.budget_floor import WINDOW_S
from vllm_bootstrap.scheduler.tickets import ByModel, Effect, Grant, Reject, Ticket
from vllm_bootstrap.serving import Advert, Endpoint, Instance, RequestClass

MODEL, MINUTES = ByModel("m"), 8
SHARE = BudgetPolicy().floor_share


class Crowded:
    """A launch at which twice as many realtime requests ask as there are places; with one of batch at a place the queue
    is full of them.
    Batch: one request always waits, or (``one_by_one``) its only client asks when the last one has been answered.
    ``starved_s``: the longest time in which batch wanted to run and none did."""

    def __init__(self, slots: int, *, one_by_one: bool) -> None:
        self.admission = Admission(max_queued=slots + 1)
        self.one_by_one = one_by_one
        instance = Instance("a", "a", "raw", "base", ("m",), Endpoint(uds="/x"), slots, ())
        self.admission.update(Advert("a", "a", "base", ("m",), "ready", instance), 0.0)
        self.slots = slots
        self.now = 0.0
        self.ids = 0
        self.realtime: list[int] = []
        self.batch: list[int] = []
        self.waiting: dict[int, bool] = {}
        self.batch_ran_at = self.starved_s = self.ran_s = 0.0
        self.promotions = 0
        self.rejected: list[Effect] = []
        for _ in range(2 * slots):
            self.comes(realtime=True)  # and the first batch request with the first of them

    def comes(self, *, realtime: bool) -> None:
        self.ids += 1
        self.waiting[self.ids] = realtime
        cls: RequestClass = "realtime" if realtime else "batch"
        grant = self.admission.request(self.ids, MODEL, Ticket(cls, cls, prompt_tokens=10, replayable=True), self.now)
        self.follow([grant] if grant is not None else [])

    def follow(self, granted: list[Grant]) -> None:
        effects = [*granted, *self.admission.take_effects()]
        self.rejected += [effect for effect in effects if isinstance(effect, Reject)]
        for grant in effects:
            if isinstance(grant, Grant):
                realtime = self.waiting.pop(grant.request)
                assert realtime or grant.promoted, "batch went before realtime that waits"
                if not realtime:
                    self.batch_starts()
                (self.realtime if realtime else self.batch).append(grant.request)
        assert len(self.realtime) + len(self.batch) <= self.slots
        assert len(self.batch) <= 1, "realtime waits for more than one place"
        if all(self.waiting.values()) and not (self.one_by_one and self.batch):
            self.comes(realtime=False)

    def batch_starts(self) -> None:
        self.promotions += 1
        self.starved_s = max(self.starved_s, self.now - self.batch_ran_at)
        self.batch_ran_at = self.now

    def ends(self, which: int) -> None:
        """One that runs, and its client comes again."""
        if self.batch:
            self.ran_s += self.now - self.batch_ran_at
            self.batch_ran_at = self.now
        running = [*self.batch, *self.realtime]
        request = running[which % len(running)]
        realtime = request in self.realtime
        (self.realtime if realtime else self.batch).remove(request)
        self.admission.began(request, self.now, streamed=True)
        self.admission.done(request, self.now)
        self.follow([])
        if realtime:
            self.comes(realtime=True)

    def goes_on(self, seconds: float) -> None:
        end = self.now + seconds
        while (change := self.admission.next_change(self.now)) is not None and change <= end:
            self.now = change
            self.admission.tick(self.now)
            self.follow([])
        self.now = end


@settings(max_examples=100, deadline=None)
@given(
    slots=st.integers(1, 5),
    lengths=st.lists(st.tuples(st.floats(0.5, 8), st.integers(0, 9)), min_size=1, max_size=30),
    one_by_one=st.booleans(),
)
def test_batch_is_never_starved_for_longer_than_a_minute_and_gets_its_share(
    slots: int, lengths: list[tuple[float, int]], one_by_one: bool
) -> None:
    """And until a slot comes free: nobody's place is taken away for it. Meanwhile what is owed does not add up."""
    crowd = Crowded(slots, one_by_one=one_by_one)
    for step in range(2000):
        seconds, which = lengths[step % len(lengths)]
        crowd.goes_on(seconds)
        crowd.ends(which)
        if crowd.now > MINUTES * WINDOW_S:
            break
    if crowd.batch:
        crowd.ran_s += crowd.now - crowd.batch_ran_at
    else:
        crowd.batch_starts()
    assert crowd.rejected == []
    longest = max(seconds for seconds, _ in lengths)
    assert crowd.starved_s <= WINDOW_S + longest + 0.001
    late_s = longest * (crowd.promotions + 1)
    assert crowd.ran_s >= SHARE * (crowd.now - late_s - WINDOW_S) - longest
