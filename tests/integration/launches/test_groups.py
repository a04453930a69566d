"""Groups of replicas inside the supervisor: accepted whole, known by both ids, forgotten whole."""

import asyncio

import pytest

from tests.support.aio import eventually, run
from tests.support.world import World
from vllm_bootstrap.engines.external import ExternalDefinition, ExternalEngine
from vllm_bootstrap.errors import BadRequest, Conflict, Draining, GpuConflict, NotFound, StorageFull
from vllm_bootstrap.gpus.mock import MockInventory
from vllm_bootstrap.ids import is_group_id
from vllm_bootstrap.launches.types import LaunchOrder
from vllm_bootstrap.serving import Endpoint


class Box(World):
    """Four GPUs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.inventory = MockInventory(4)


def order(replicas=2, **wish):
    return LaunchOrder(**{"model": "sim", "gpu_count": 1, "replicas": replicas, **wish})


async def ready(world, replicas=2, **wish):
    group = await world.supervisor.launch_group(order(replicas, **wish), "tester")
    await eventually(lambda: world.supervisor.group(group.group_id).ready == len(group.members), 20)
    return world.supervisor.group(group.group_id)


def ids_of(group):
    return [view.launch_id for view in group.members]


def owned(world):
    return sum(world.ledger.claimed_milli(f"GPU-mock-{n}") for n in range(4))


def test_a_group_is_its_launches_and_answers_to_its_id():
    async def main():
        async with Box() as world:
            group = await ready(world)
            supervisor, group_id, ids = world.supervisor, group.group_id, ids_of(group)
            assert is_group_id(group_id)
            assert (group.state, len(set(ids))) == ("ready", 2)
            assert all(world.adverts[one].group_id == group_id for one in ids)
            with pytest.raises(BadRequest) as refused:
                supervisor.get(group_id)
            assert refused.value.details["replicas"] == ids
            with pytest.raises(BadRequest):
                supervisor.log_reader(group_id)
            alone = await world.ready()
            assert supervisor.group(alone.launch_id) is None
            assert [view.launch_id for view in supervisor.list(include_ended=False, group=group_id)] == ids[::-1]
            assert not supervisor.has_ended(group_id)
            outcome = await supervisor.stop(group_id)
            assert (outcome.state, [member.launch_id for member in outcome.members]) == ("stopped", ids)
            assert supervisor.has_ended(group_id)
            assert not supervisor.has_ended("g-unknown")
            assert owned(world) == 1000

    run(main())


def test_replicas_that_cannot_all_be_stored_leave_nothing():
    async def main():
        async with Box() as world:

            async def fail(*_args, **_kwargs):
                raise StorageFull("full")

            real, world.store.create_all = world.store.create_all, fail
            with pytest.raises(StorageFull):
                await world.supervisor.launch_group(order(4), "tester")
            assert owned(world) == 0
            assert world.supervisor.list(include_ended=True) == []
            world.store.create_all = real
            assert len((await ready(world, 4)).members) == 4

    run(main())


def test_replicas_that_do_not_all_fit_leave_nothing():
    async def main():
        async with Box() as world:
            await world.ready()
            with pytest.raises(GpuConflict) as refused:
                await world.supervisor.launch_group(order(4), "tester")
            assert refused.value.details["replicas_that_fit"] == 3
            assert owned(world) == 1000
            assert len(world.supervisor.list(include_ended=True)) == 1
            with pytest.raises(BadRequest) as beyond:
                await world.supervisor.launch_group(order(9), "tester")
            assert "VLLM_BOOTSTRAP_REPLICAS_MAX allows 8" in beyond.value.message

    run(main())


def test_a_server_that_runs_elsewhere_has_no_replicas():
    definition = ExternalDefinition(Endpoint(uds="/x"), frozenset({"sim"}), 4, "/health", ())

    async def main():
        async with Box(engines={"remote": ExternalEngine("remote", definition, {})}) as world:
            for replicas in (2, "per_gpu"):
                wish = order(replicas, engine="remote", gpu_count=None)
                with pytest.raises(BadRequest) as refused:
                    await world.supervisor.launch_group(wish, "tester")
                assert refused.value.param == "replicas"

    run(main())


def test_one_replica_on_the_only_free_gpu_is_a_group_too():
    async def main():
        async with Box() as world:
            await ready(world, 3)
            group = await ready(world, "per_gpu", gpu_count=None)
            assert is_group_id(group.group_id)
            assert len(group.members) == 1

    run(main())


def test_history_and_news_of_a_group_until_its_last_launch_has_ended():
    async def main():
        async with Box() as world:
            group = await ready(world)
            seen = []

            async def listen():
                seen.extend([(event.launch_id, event.event) async for event in world.supervisor.watch(group.group_id)])

            listening = asyncio.create_task(listen())
            first, last = ids_of(group)
            await world.supervisor.stop(first)
            await asyncio.sleep(0)
            assert not listening.done()
            await world.supervisor.stop(last)
            await asyncio.wait_for(listening, 5)
            events = ["created", "became_ready", "stop_requested", "released"]
            assert sorted(seen) == sorted((one, event) for one in (first, last) for event in events)
            stored = await world.supervisor.events(group.group_id, 0, 100)
            assert [(event.launch_id, event.event) for event in stored] == seen
            assert len(await world.supervisor.events(group.group_id, stored[4].seq, 2)) == 2

    run(main())


def test_a_group_is_forgotten_whole_once_all_of_it_has_ended():
    async def main():
        async with Box() as world:
            group = await ready(world)
            supervisor, group_id, (first, last) = world.supervisor, group.group_id, ids_of(group)
            await supervisor.stop(first)
            with pytest.raises(Conflict, match=last):
                await supervisor.delete(group_id)
            assert supervisor.get(first).state == "stopped"
            await supervisor.stop(group_id)
            await supervisor.delete(group_id)
            for gone in (group_id, first, last):
                with pytest.raises(NotFound):
                    await supervisor.stop(gone)
            assert supervisor.group(group_id) is None
            assert await world.store.group(group_id) == []

    run(main())


def test_an_idempotency_key_stays_with_the_group_as_long_as_any_of_it_is_known():
    async def main():
        async with Box() as world:
            supervisor = world.supervisor
            group = await supervisor.launch_group(order(), "tester", "k")
            assert (await supervisor.launch_group(order(), "tester", "k")).group_id == group.group_id
            with pytest.raises(Conflict):
                await supervisor.launch_group(order(3), "tester", "k")
            with pytest.raises(Conflict):
                await supervisor.launch(order(1), "tester", "k")
            first, last = ids_of(group)
            await supervisor.stop(group.group_id, force=True)
            await supervisor.delete(first)
            again = await supervisor.launch_group(order(), "tester", "k")
            assert ids_of(again) == [last]
            await supervisor.delete(group.group_id)
            assert (await supervisor.launch_group(order(), "tester", "k")).group_id != group.group_id

    run(main())


def test_a_group_found_again_is_the_same_group():
    async def main():
        world = await Box().__aenter__()
        group = await ready(world, 3)
        await world.supervisor.stop(ids_of(group)[0])
        async with await world.restart() as world:
            found = world.supervisor.group(group.group_id)
            assert ids_of(found) == ids_of(group)
            assert [view.group_size for view in found.members] == [3, 3, 3]
            assert (found.state, found.ready) == ("ready", 2)
            assert owned(world) == 2000
            outcome = await world.supervisor.stop(group.group_id)
            assert [member.state for member in outcome.members] == ["stopped"] * 3

    run(main())


def test_no_group_begins_once_the_daemon_is_about_to_end():
    async def main():
        async with Box() as world:
            launching = asyncio.create_task(world.supervisor.launch_group(order(4), "tester"))
            await asyncio.sleep(0)
            outcomes = await world.supervisor.stop_all(force=True)
            assert {outcome.state for outcome in outcomes} <= {"stopped"}
            try:
                group = await launching
                assert [outcome.launch_id for outcome in outcomes] == ids_of(group)
            except Draining:
                assert outcomes == []
            assert owned(world) == 0

    run(main())
