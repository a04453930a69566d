"""A launch that serves several names, and fewer sequences than its engine could: at the engine, in what traffic is
told, and after a restart of the daemon."""

from __future__ import annotations

import json

from tests.support.aio import eventually, run
from tests.support.world import World
from vllm_bootstrap.engines import probe

NAMES = ("q", "chat", "support")


async def status(world: World, launch_id: str, name: str) -> int:
    body = json.dumps({"model": name, "prompt": "hello", "max_tokens": 2}).encode()
    endpoint = world.adverts[launch_id].instance.endpoint
    return (await probe.EngineClient(endpoint).request("POST", "/v1/completions", body, timeout_s=5)).status


async def check(world: World, launch_id: str) -> None:
    await eventually(lambda: launch_id in world.adverts and world.adverts[launch_id].instance)
    advert = world.adverts[launch_id]
    assert advert.served_names == advert.instance.served_names == NAMES
    assert advert.instance.slots == world.supervisor.get(launch_id).capacity == 2
    assert [await status(world, launch_id, name) for name in NAMES] == [200] * 3
    assert await status(world, launch_id, "other") == 404


def test_an_engine_serves_all_names_of_its_launch_and_goes_on_doing_so():
    async def main() -> None:
        world = await World().__aenter__()
        view = await world.ready(
            served_model_name="q", aliases=("chat",), adapters={"support": "/adapters/support"}, max_parallel=2
        )
        await check(world, view.launch_id)
        async with await world.restart() as following:
            await check(following, view.launch_id)

    run(main())
