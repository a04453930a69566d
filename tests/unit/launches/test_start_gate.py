import asyncio

from vllm_bootstrap.launches.start_gate import StartGate


def test_starts_on_one_gpu_follow_each_other_in_order():
    async def main():
        gate = StartGate()
        first, second, third = gate.enter("a", ["g0"]), gate.enter("b", ["g0"]), gate.enter("c", ["g0"])
        assert [t.entered.done() for t in (first, second, third)] == [True, False, False]
        assert gate.ahead_of("c") == ["a", "b"]
        gate.leave(first)
        gate.leave(first)
        assert [t.entered.done() for t in (second, third)] == [True, False]

    asyncio.run(main())


def test_other_gpus_do_not_wait_but_nobody_overtakes():
    async def main():
        gate = StartGate()
        gate.enter("a", ["g0"])
        both, other, late = gate.enter("b", ["g0", "g1"]), gate.enter("c", ["g2"]), gate.enter("d", ["g1"])
        assert other.entered.done()
        assert not both.entered.done()
        assert not late.entered.done()
        gate.leave(both)
        assert both.entered.cancelled()
        assert late.entered.done()
        assert gate.ahead_of("nobody") == []

    asyncio.run(main())
