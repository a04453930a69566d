"""One lane: everything of batches that goes to one model (or one launch), and what becomes of it there.

Invariants: a job that was taken from its source is in exactly one place: under way, waiting for the verdict on its
engine, waiting for its next try, or kept as a suspect; it leaves the lane by ``ended``, ``returned`` or ``withdraw``
only. No more is under way than the engines have slots, and a few to fill them the moment they are free: the rest waits
on disk, not in the scheduler's queue. What decides lies in ``turns``, ``retrying`` and ``isolation``.

Must not know: batches, storage, HTTP, how a request reaches an engine.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.batches import isolation, outcomes, retrying, turns
from vllm_bootstrap.batches.brakes import Brakes
from vllm_bootstrap.batches.flight import Desk, Flight
from vllm_bootstrap.batches.verdicts import Broken, Verdict, Verdicts
from vllm_bootstrap.batches.work import GaveUp, Job, Key, Outcome, Source
from vllm_bootstrap.errors import Cancelled, InternalError, ModelNotFound, QueueFull, TooManyRequests

log = logging.getLogger(__name__)

FULL_KEY_S = 5.0
"""A key that has as many requests under way as it may is asked again so much later, or when one of them ends."""
SUSPECT_DELAY_S = 1.0
"""The longest that a suspect waits for its next try, since all others wait for it."""


class Lane:
    """``attempts``: how often a line is tried. ``max_joined``: so many may travel as one request."""

    def __init__(self, desk: Desk, *, attempts: int, max_joined: int) -> None:
        self._desk, self._attempts, self._max_joined = desk, attempts, max_joined
        self._loop = asyncio.get_running_loop()
        self._turns = turns.Turns()
        self._isolation: isolation.Isolation[Key] = isolation.Isolation()
        self._sources: dict[str, Source] = {}
        self._brakes = Brakes(self.ready, self._wake)
        self._flights: dict[Flight, None] = {}
        self._suspects: dict[Key, Job] = {}
        self._verdicts = Verdicts(self._judged)
        self._later: dict[Job, asyncio.TimerHandle] = {}
        self._flown = self._under_way = self._waiting = 0
        self._slots, self._absence, self._wakes = 0, "nothing serves it", False

    # Sources

    def add(self, source: Source) -> None:
        """From now on its jobs are carried."""
        self._sources[source.id] = source
        self._turns.put(turns.Source(source.id, source.owner, source.priority, source.deadline))
        self._wake()

    def ready(self, source_id: str) -> None:
        """It has something to give again."""
        if not self._brakes.stops(source_id):
            self._turns.set_ready(source_id, True)
            self._wake()

    def pause(self, source_id: str) -> None:
        """Begin nothing more of it, take back what no engine has yet; what engines have ends. Idempotent."""
        self._brakes.pause(source_id)
        self._turns.set_ready(source_id, False)
        for flight in [one for one in self._flights if one.source.id == source_id and one.launch is None]:
            self._cancel(flight)
            for job in flight.jobs:
                if not job.dropped:
                    job.source.returned(job)
        self._return_all(source_id)
        self._wake()

    def resume(self, source_id: str) -> None:
        self._brakes.resume(source_id)

    def change(self, source_id: str, priority: int) -> None:
        """It has another priority. Of what is under way nothing changes."""
        self._sources[source_id].priority = priority
        self._turns.change(source_id, priority)

    def withdraw(self, source_id: str) -> None:
        """Drop it and end what is under way of it: its source hears nothing more of its jobs. Idempotent."""
        if self._sources.pop(source_id, None) is None:
            return
        self._turns.drop(source_id)
        self._brakes.forget(source_id)
        for flight in [flight for flight in self._flights if flight.source.id == source_id]:
            self._cancel(flight)
        for job in self._verdicts.take_out(lambda job: job.source.id == source_id):
            self._isolation.withdrawn(job.key)
        self._let_go(lambda job: job.source.id == source_id)
        self._wake()

    def drop(self, key: Key) -> None:
        """One job is not wanted any more, wherever it is: its source hears nothing more of it. What travels with it
        goes on, its answer is not used, but whether its engine dies of it still matters. Idempotent."""
        for flight in list(self._flights):
            for job in flight.jobs:
                job.dropped = job.dropped or job.key == key
            if all(job.dropped for job in flight.jobs):
                self._cancel(flight)
        self._verdicts.drop(key)
        self._let_go(lambda job: job.key == key)
        self._wake()

    def _cancel(self, flight: Flight) -> None:
        if flight.carriage is not None:
            flight.carriage.cancel()
        self._landed(flight)
        self._brakes.eased(flight.source.owner)
        for job in flight.jobs:
            self._isolation.withdrawn(job.key)

    def _let_go(self, wanted: Callable[[Job], bool]) -> list[Job]:
        """Take out what waits here for its next try or as a suspect."""
        waiting = [job for job in [*self._later, *self._suspects.values()] if wanted(job)]
        for job in waiting:
            if job in self._later:
                self._later.pop(job).cancel()
            self._suspects.pop(job.key, None)
            self._isolation.withdrawn(job.key)
        return waiting

    @property
    def left(self) -> int:
        """About how many jobs have not ended, of sources that nothing keeps from going on."""
        return sum(source.left for source in self._sources.values() if not self._brakes.stops(source.id))

    @property
    def empty(self) -> bool:
        """Whether it may be thrown away."""
        return not self._sources

    def close(self) -> None:
        """End everything. Idempotent."""
        for source_id in list(self._sources):
            self.withdraw(source_id)
        self._verdicts.close()
        self._brakes.close()

    # Engines and keys

    def engines(self, slots: int, absence: str) -> None:
        """So many slots there are now; ``absence`` says in words why there are none."""
        self._slots, self._absence = slots, absence
        self._brakes.engines_changed()

    def engine_ended(self, launch_id: str, verdict: Verdict = Verdict.DIED) -> None:
        """That engine is gone, or about to go: it died, or somebody stopped it."""
        self._verdicts.engine_ended(launch_id, verdict)

    @property
    def wait_for_keys(self) -> bool:
        """Whether any of its sources waits for its key."""
        return self._brakes.wait_for_keys

    def keys_changed(self) -> None:
        self._brakes.keys_changed()

    def waits_for(self, source_id: str) -> str | None:
        """Why nothing of a source is under way, in words; None where something is, or is about to be."""
        mine = [flight for flight in self._flights if flight.source.id == source_id]
        if any(flight.launch is not None for flight in mine):
            return None
        reason = self._brakes.reason(source_id) or (self._brakes.still if self._slots else self._absence)
        if reason is not None:
            return reason
        if self._verdicts.waiting:
            return "an engine broke requests off: whether it has ended is being found out"
        if self._isolation.isolating:
            return "an engine ended while it had lines: the one that did it is being looked for"
        if mine:
            return "realtime requests and others come first"
        if any(job.source.id == source_id for job in self._later):
            return "the next try is due in a moment"
        return "the lines of others come first" if self._flights else None

    def under_way(self, source_id: str) -> int:
        """Its jobs that engines have or that wait for a place."""
        return sum(len(flight.jobs) for flight in self._flights if flight.source.id == source_id)

    # Beginning

    def _wake(self) -> None:
        """Look whether anything can begin, once, a moment later."""
        if not self._wakes:
            self._wakes = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._wakes = False
        while self._has_room() and (job := self._choose()) is not None:
            self._begin(job)

    def _has_room(self) -> bool:
        if not self._slots or self._brakes.still is not None or self._waiting >= self._brakes.lookahead:
            return False
        return self._under_way < self._slots + self._brakes.lookahead

    def _choose(self) -> Job | None:
        if self._isolation.isolating:
            wanted = (self._suspects.pop(key, None) for key in self._isolation.wanted())
            return next((job for job in wanted if job is not None), None)
        while (source_id := self._turns.next()) is not None:
            job = self._sources[source_id].take()
            if job is None:
                self._turns.set_ready(source_id, False)
            elif not job.deaths or self._isolation.admits(job.key, job.deaths):
                return job
            else:  # it has seen an engine end before: not beside others
                self._suspects[job.key] = job
                return self._choose()
        return None

    def _begin(self, job: Job) -> None:
        source = job.source
        if (principal := self._desk.principal(source.owner)) is None:
            self._brakes.hold(source.id, f"the key {source.owner!r} is not valid now, or may do no batch work")
            return self._stopped(job)
        most = principal.max_parallel
        if most is not None and sum(one.source.owner == source.owner for one in self._flights) >= most:
            reason = f"the key {source.owner!r} may have no more than {most} requests at once"
            self._brakes.rest(source.id, source.owner, reason, FULL_KEY_S)
            return self._stopped(job)
        jobs, cost = self._company(job, principal)
        self._flown += 1
        flight = Flight(self, jobs, self._flown, cost)
        self._flights[flight] = None
        self._under_way += cost
        self._waiting += 1
        for one in jobs:
            self._isolation.started(one.key)
        self._turns.taken(source.id, cost)
        try:
            flight.carriage = self._desk.send(flight, principal)
        except Exception:
            log.exception("A request of batches could not be sent")
            self.flight_ended(flight, Outcome(None, b"", InternalError("The daemon failed to send it"), False, ""))

    def _stopped(self, job: Job) -> None:
        """Its source begins nothing for now: what waits here of it goes back."""
        self._turns.set_ready(job.source.id, False)
        self._give_back(job)
        self._return_all(job.source.id)

    def _return_all(self, source_id: str) -> None:
        for job in self._let_go(lambda job: job.source.id == source_id):
            job.source.returned(job)

    def _company(self, job: Job, principal: Principal) -> tuple[list[Job], int]:
        """The job and what goes with it as one request; and the sequences that makes, which are no more than its key
        may ask for at once."""
        plan = None
        if self._max_joined > 1 and not job.alone and not self._isolation.isolating:
            plan = outcomes.plan(job)
        if plan is None:
            return [job], 1
        jobs, most = [job], self._max_joined
        if principal.max_sequences is not None:
            most = min(most, principal.max_sequences // plan.sequences)
        while len(jobs) < most:
            other = job.source.take()
            if other is None:
                break
            if not outcomes.joins(other, jobs, plan):
                job.source.returned(other)
                break
            jobs.append(other)
        return jobs, len(jobs) * plan.sequences

    # From flights: their methods of the same names are the way to call these

    def placed(self) -> None:
        self._waiting -= 1
        self._wake()

    def unplaced(self) -> None:
        self._waiting += 1

    def _landed(self, flight: Flight) -> None:
        del self._flights[flight]
        self._under_way -= flight.cost
        self._waiting -= flight.launch is None

    def flight_ended(self, flight: Flight, outcome: Outcome) -> None:
        self._landed(flight)
        if not isinstance(outcome.error, TooManyRequests):  # that one had no room, and makes none
            self._brakes.eased(flight.source.owner)
        joined = len(flight.jobs) > 1
        if flight.launch is not None and outcomes.broke_off(outcome):
            broken = [Broken(flight.number, job, outcome, joined) for job in flight.jobs]
            self._verdicts.add(flight.launch, flight.placed_at, broken)
        else:
            answers = outcomes.answers(flight.jobs, outcome) if joined else None
            for at, job in enumerate(flight.jobs):
                self._conclude(job, outcome if answers is None else answers[at], joined=joined and answers is None)
        self._wake()

    def _judged(self, broken: Sequence[Broken], verdict: Verdict) -> None:
        poison = self._isolation.died([one.job.key for one in broken]) if verdict is Verdict.DIED else None
        for one in broken:
            if one.job.dropped or verdict is Verdict.LIVES:
                self._conclude(one.job, one.outcome, joined=one.joined)
            elif verdict is Verdict.DIED:
                self._survives(one.job, poison)
            else:
                self._isolation.came_back(one.job.key)
                self._give_back(one.job)
        self._wake()

    def _conclude(self, job: Job, outcome: Outcome, *, joined: bool) -> None:
        if job.dropped:
            self._isolation.withdrawn(job.key)
        else:
            self._decide(job, outcome, joined=joined)

    def _survives(self, job: Job, poison: Key | None) -> None:
        """Its engine has died."""
        job.deaths += 1
        if job.key == poison:
            job.source.ended(job, GaveUp(isolation.POISON_CODE, isolation.POISON_MESSAGE))
            return
        job.source.noted(job)
        self._give_back(job)

    def _decide(self, job: Job, outcome: Outcome, *, joined: bool) -> None:
        """``joined``: it travelled with others, and what happened need not be its own doing."""
        facts = retrying.Facts(
            job.attempts + 1,
            self._attempts,
            random.random(),  # noqa: S311 - spreads retries
            status=outcome.status,
            error=outcome.error,
            sent=outcome.sent,
            uncounted=job.uncounted,
        )
        match retrying.decide(facts):
            case retrying.Final() | retrying.Again(counts=True) if joined and not isinstance(outcome.error, Cancelled):
                self._isolation.ended(job.key)
                job.alone = True
                job.source.returned(job)
            case retrying.Final():
                self._isolation.ended(job.key)
                job.attempts += 1
                job.source.ended(job, outcomes.ending(outcome))
            case retrying.Again(delay_s, counts=True):
                self._isolation.ended(job.key)
                job.attempts, job.uncounted = job.attempts + 1, 0
                job.source.noted(job)
                self._try_later(job, delay_s)
            case retrying.Again(delay_s):
                self._isolation.came_back(job.key)
                job.uncounted += 1
                self._try_later(job, delay_s)
            case retrying.WaitForModel(delay_s, reason) | retrying.SlowDown(delay_s, reason):
                self._isolation.came_back(job.key)
                self._make_way(job, outcome, delay_s, reason)
            case retrying.WaitForKey(reason):
                self._brakes.hold(job.source.id, reason)
                self._stopped(job)

    def _make_way(self, job: Job, outcome: Outcome, delay_s: float, reason: str) -> None:
        """There was no room for it, or nothing to go to."""
        error = outcome.error
        if isinstance(error, TooManyRequests | ModelNotFound) and not isinstance(error, QueueFull):  # its key's affair
            self._brakes.rest(job.source.id, job.source.owner, reason, delay_s)
            self._stopped(job)
            return
        self._give_back(job)
        if isinstance(error, QueueFull):
            self._brakes.queue_full(self._waiting, reason, delay_s)
        else:
            self._brakes.stand_still(reason, delay_s)

    def _try_later(self, job: Job, delay_s: float) -> None:
        if self._brakes.stops(job.source.id):
            self._give_back(job)
            return
        delay_s = min(delay_s, SUSPECT_DELAY_S) if job.key in self._isolation.suspects else delay_s
        self._later[job] = self._loop.call_later(delay_s, self._due, job)

    def _due(self, job: Job) -> None:
        del self._later[job]
        self._give_back(job)
        self._wake()

    def _give_back(self, job: Job) -> None:
        """To its source, or if it is a suspect to those that are kept here."""
        if self._brakes.stops(job.source.id):
            self._isolation.withdrawn(job.key)
            job.source.returned(job)
        elif job.key in self._isolation.suspects:
            self._suspects[job.key] = job
        else:
            job.source.returned(job)
