"""What an engine is asked so that it sleeps, against simulators and against engines that say strange things."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.support.aio import run
from tests.support.simulator import Simulator
from vllm_bootstrap.engines import sleeping
from vllm_bootstrap.engines.client import ProbeError
from vllm_bootstrap.serving import Endpoint


def test_level_2_reloads_the_weights_before_it_computes() -> None:
    with Simulator(enable_sleep_mode=True) as simulator:
        endpoint = Endpoint(uds=str(simulator.uds))

        async def main() -> None:
            before = await sleeping.first_token(endpoint, "m", 5)
            await sleeping.fall_asleep(endpoint, 2, 5)
            assert await sleeping.is_sleeping(endpoint, 5)
            await sleeping.wake(endpoint, 2, 5)
            assert not await sleeping.is_sleeping(endpoint, 5)
            assert before == await sleeping.first_token(endpoint, "m", 5)
            await sleeping.fall_asleep(endpoint, 1, 5)
            await sleeping.wake(endpoint, 1, 5)

        run(main())


def test_one_that_does_not_continue_texts_says_nothing() -> None:
    with Simulator(tasks="embed") as simulator:
        assert run(sleeping.first_token(Endpoint(uds=str(simulator.uds)), "m", 5)) is None


@pytest.mark.parametrize(
    ("act", "answers", "says"),
    [
        (lambda at: sleeping.fall_asleep(at, 1, 2), {"/sleep": (404, {})}, "answered 404"),
        (lambda at: sleeping.fall_asleep(at, 1, 2), {"/is_sleeping": (200, {"is_sleeping": False})}, "it does not"),
        (lambda at: sleeping.wake(at, 1, 2), {"/is_sleeping": (200, {"is_sleeping": True})}, "still sleeps"),
        (lambda at: sleeping.is_sleeping(at, 2), {"/is_sleeping": (200, {"is_sleeping": "no"})}, "does not say"),
        (lambda at: sleeping.is_sleeping(at, 2), {"/is_sleeping": (200, [])}, "does not say"),
    ],
)
def test_what_it_says_is_checked(tmp_path, act, answers, says) -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode().partition("?")[0]
            status, body = answers.get(path, (200, {}))
            data = json.dumps(body).encode()
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(data), data))
            writer.close()

        server = await asyncio.start_unix_server(answer, tmp_path / "s")
        async with server:
            with pytest.raises(ProbeError, match=says):
                await act(Endpoint(uds=str(tmp_path / "s")))

    run(main())
