"""Lanes over the real data plane, with an engine that is written by hand at its other end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.aio import eventually
from tests.support.data_plane import LAUNCH, Plane, advert, instance, run, running
from tests.support.lanes import COMPLETIONS, OWNER, Jobs
from tests.support.raw_upstream import RawUpstream, Visit, answer
from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.batches import isolation, verdicts
from vllm_bootstrap.batches.dispatch import Dispatcher
from vllm_bootstrap.batches.work import Answered, GaveUp
from vllm_bootstrap.errors import LaunchNotReady, NotFound
from vllm_bootstrap.serving import Advert


async def completes(visit: Visit) -> None:
    """Each prompt again, as vLLM would."""
    asked = json.loads(visit.body)
    prompts = asked["prompt"] if isinstance(asked["prompt"], list) else [asked["prompt"]]
    choices = [{"index": at, "text": prompt} for at, prompt in enumerate(prompts)]
    usage = {"prompt_tokens": len(prompts), "completion_tokens": len(prompts)}
    await visit.send(answer(json.dumps({"id": "c", "choices": choices, "usage": usage}).encode()))


@dataclass
class World:
    plane: Plane
    engine: RawUpstream
    dispatcher: Dispatcher
    keys: dict[str, Principal]

    def announce(self, **fields: Any) -> None:
        one = instance(self.engine.endpoint, **{"served_names": ("m",), "slots": 4, **fields})
        self.tell(advert(one))

    def tell(self, news: Advert) -> None:
        self.plane.gate.update(news)
        self.dispatcher.advert(news)

    def gone(self, state: str = "stopping") -> None:
        self.tell(Advert(LAUNCH, LAUNCH, "org/model", ("m",), state, None))

    def add(self, source: Jobs, launch_id: str | None = None) -> Jobs:
        source.ready = self.dispatcher.add(source, "m", launch_id)
        return source

    def texts(self, source: Jobs) -> dict[int, str]:
        ends = {at: end for at, end in source.endings.items() if isinstance(end, Answered)}
        return {at: json.loads(end.body)["choices"][0]["text"] for at, end in ends.items()}


@contextlib.asynccontextmanager
async def world(tmp: Path, script: Any = completes, *, max_joined: int = 1, **changes: Any) -> AsyncIterator[World]:
    keys = {OWNER: Principal(OWNER, frozenset({"batch"}))}
    async with RawUpstream(tmp / "e.sock", script).running() as engine, running(tmp, **changes) as plane:
        dispatcher = Dispatcher(plane.gateway, key_named=keys.get, attempts=2, max_joined=max_joined)
        found = World(plane, engine, dispatcher, keys)
        try:
            yield found
        finally:
            dispatcher.close()
            await eventually(lambda: not plane.gateway.calls)
            assert plane.in_use() == plane.queued() == 0
            assert plane.gateway.body_bytes == 0


@pytest.mark.parametrize("joined", [1, 4])
def test_lines_are_answered_each_with_its_own(tmp_path: Path, joined: int) -> None:
    async def go() -> None:
        async with world(tmp_path, max_joined=joined) as here:
            source = here.add(Jobs("s", 50, path=COMPLETIONS))
            assert here.dispatcher.demand() == {"m": 50}
            assert here.dispatcher.waits_for("s") == "the model 'm' is not loaded: launch it"
            here.announce()
            await eventually(lambda: len(source.endings) == 50)
            assert here.texts(source) == {at: str(at - 1) for at in range(1, 51)}
            assert len(here.engine.requests) == -(-50 // joined)
            assert here.dispatcher.under_way("s") == 0
            here.dispatcher.withdraw("s")
            here.dispatcher.withdraw("s")
            assert here.dispatcher.demand() == {}
            assert here.dispatcher.waits_for("s") is None

    run(go())


def test_work_is_reachable_while_there_is_an_engine_for_it_or_one_may_come(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path) as here:
            dispatcher = here.dispatcher
            assert not dispatcher.reachable(lambda _: True)
            source = here.add(Jobs("s", 5, path=COMPLETIONS))
            assert dispatcher.reachable(lambda model: model == "m")
            assert not dispatcher.reachable(lambda model: model != "m")
            here.gone("bootstrapping")
            assert dispatcher.reachable(lambda _: False)
            here.gone("stopped")
            assert not dispatcher.reachable(lambda _: False)
            dispatcher.withdraw(source.id)
            here.add(Jobs("t", 5, path=COMPLETIONS), LAUNCH)
            assert not dispatcher.reachable(lambda _: True)  # none but that launch will do
            here.announce()
            assert dispatcher.reachable(lambda _: False)

    run(go())


def test_a_short_queue_is_no_reason_to_ask_again_and_again(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path, max_queued=2) as here:
            here.announce(slots=1)
            source = here.add(Jobs("s", 200, path=COMPLETIONS))
            await eventually(lambda: len(source.endings) == 200)
            refused = [record for record in here.plane.records if record.status == 429]
            assert len(refused) <= 20

    run(go())


def test_lines_go_to_the_launch_that_a_batch_names(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path) as here:
            with pytest.raises(NotFound):
                here.dispatcher.check_launch(OWNER, LAUNCH)
            here.announce(served_names=("something-else", "m"))
            here.dispatcher.check_launch(OWNER, LAUNCH)
            source = here.add(Jobs("s", 5, path=COMPLETIONS), LAUNCH)
            assert here.dispatcher.demand() == {}
            await eventually(lambda: len(source.endings) == 5)
            here.keys[OWNER] = Principal(OWNER, frozenset({"batch"}), models=("none",))
            with pytest.raises(NotFound):
                here.dispatcher.check_launch(OWNER, LAUNCH)
            del here.keys[OWNER]
            here.gone("failed")
            with pytest.raises(LaunchNotReady):
                here.dispatcher.check_launch(OWNER, LAUNCH)

    run(go())


@pytest.mark.parametrize("news_first", [True, False])
def test_a_line_that_kills_its_engine_is_given_up_and_the_others_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, news_first: bool
) -> None:
    monkeypatch.setattr(verdicts, "SETTLING_S", 0.05)
    deaths = 0

    async def go() -> None:
        async def deadly(visit: Visit) -> None:
            nonlocal deaths
            if json.loads(visit.body)["prompt"] != "6":
                await completes(visit)
                return
            deaths += 1
            if news_first:
                here.gone()
                await asyncio.sleep(0.05)
            here.engine.abort_all()
            if not news_first:
                await asyncio.sleep(0.05)
                here.gone()
            asyncio.get_running_loop().call_later(0.05, here.announce)

        async with world(tmp_path, deadly) as here:
            here.announce()
            source = here.add(Jobs("s", 20, path=COMPLETIONS))
            await eventually(lambda: len(source.endings) == 20)
            assert source.endings[7] == GaveUp(isolation.POISON_CODE, isolation.POISON_MESSAGE)
            assert set(here.texts(source)) == set(range(1, 21)) - {7}
            assert deaths <= 2 + 3

    run(go())


def test_an_engine_that_is_slow_to_answer_or_has_other_slots_now_has_not_ended(tmp_path: Path) -> None:
    async def go() -> None:
        asked, go_on = asyncio.Event(), asyncio.Event()

        async def slow(visit: Visit) -> None:
            asked.set()
            await go_on.wait()
            await visit.send(answer(b"{}", status=b"500 No"))

        async with world(tmp_path, slow) as here:
            here.announce()
            source = here.add(Jobs("s", 1, path=COMPLETIONS))
            await asked.wait()
            job = next(iter(source.out))
            here.gone("ready")
            here.announce(slots=7)
            go_on.set()
            await eventually(lambda: source.notes, timeout=20)
            assert (job.deaths, job.attempts) == (0, 1)

    run(go())


def test_what_is_steered_while_under_way(tmp_path: Path) -> None:
    async def go() -> None:
        go_on = asyncio.Event()

        async def slow(visit: Visit) -> None:
            await go_on.wait()
            await completes(visit)

        async with world(tmp_path, slow) as here:
            here.announce()
            source = here.add(Jobs("s", 30, path=COMPLETIONS))
            await eventually(lambda: here.plane.queued() == 16)
            here.dispatcher.pause("s")
            assert here.plane.queued() == 0
            assert here.dispatcher.under_way("s") == here.plane.in_use() > 0
            here.dispatcher.resume("s")
            here.dispatcher.change("s", 50)
            await eventually(lambda: here.plane.queued() == 16)
            job = next(job for job in source.out if job.number == 1)
            source.out.remove(job)
            source.dropped.add(1)
            here.dispatcher.drop("s", 1)
            here.dispatcher.drop("other", 1)
            del here.keys[OWNER]
            go_on.set()
            await eventually(lambda: "is not valid now" in (here.dispatcher.waits_for("s") or ""))
            here.dispatcher.look_at_keys()
            here.keys[OWNER] = Principal(OWNER, frozenset({"batch"}))
            here.dispatcher.keys_changed()
            here.dispatcher.look_at_keys()
            await eventually(lambda: len(source.endings) == 29)
            here.dispatcher.forget(LAUNCH)
            assert "is not loaded" in (here.dispatcher.waits_for("s") or "")

    run(go())


def test_a_key_without_batch_work_is_no_key(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path) as here:
            here.keys[OWNER] = Principal(OWNER, frozenset({"realtime"}))
            here.announce()
            here.add(Jobs("s", 1, path=COMPLETIONS))
            await eventually(lambda: "may do no batch work" in (here.dispatcher.waits_for("s") or ""))
            assert not here.engine.requests

    run(go())


def test_a_key_that_loses_the_model_of_a_named_launch_waits_for_it(tmp_path: Path) -> None:
    async def go() -> None:
        async with world(tmp_path) as here:
            here.keys[OWNER] = Principal(OWNER, frozenset({"batch"}), models=("other",))
            here.announce()
            source = here.add(Jobs("s", 1, path=COMPLETIONS), LAUNCH)
            await eventually(lambda: here.dispatcher.waits_for("s"))
            assert not source.endings
            here.keys[OWNER] = Principal(OWNER, frozenset({"batch"}))
            here.dispatcher.keys_changed()
            await eventually(lambda: len(source.endings) == 1)
            assert isinstance(source.endings[1], Answered)

    run(go())
