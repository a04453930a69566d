"""Idle time adds up whatever is seen, and an idle box is told so once, or a few times where telling fails."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_bootstrap.models.idle_alarm import ATTEMPTS, Alarm, Spell
from vllm_bootstrap.models.idle_time import MAX_GAP_S, IdleAccount, Spent, Use

NAMES = ("GPU-0", "GPU-1", "GPU-2")
uses = st.builds(Use, st.booleans(), st.booleans())
steps = st.one_of(st.floats(0, MAX_GAP_S), st.floats(MAX_GAP_S * 1.01, 1e6), st.floats(-100, -0.01))
samples = st.lists(st.tuples(steps, st.dictionaries(st.sampled_from(NAMES), uses)), max_size=60)
spents = st.builds(lambda work, more, idle: Spent(work + more, work, idle), *[st.floats(0, 1e9)] * 3)


@given(samples, st.dictionaries(st.sampled_from(NAMES), spents))
def test_the_sums_add_up(seen: list[tuple[float, dict[str, Use]]], before: dict[str, Spent]) -> None:
    account, now, counted, last = IdleAccount(before), 1000.0, 0.0, set[str]()
    expected = dict.fromkeys(NAMES, 0.0)
    for step, devices in seen:
        now += step
        got = account.sample(now, devices)
        assert 0 <= got <= MAX_GAP_S
        assert got <= max(0.0, step) * (1 + 1e-9) + 1e-6
        for name in last & set(devices):
            expected[name] += got
        counted, last = counted + got, set(devices)
    for name in NAMES:
        mine, total = account.this_start(name), account.total(name)
        assert abs(mine.observed_s - expected[name]) <= 1e-6 * max(1.0, expected[name])
        assert mine.observed_s <= counted + 1e-6
        assert 0 <= mine.working_s <= mine.claimed_s <= mine.observed_s + 1e-6
        assert total.working_s <= total.claimed_s  # exactly: the database holds us to it
        assert total == before.get(name, Spent()) + mine
    assert set(account.totals()) == {name for _, devices in seen for name in devices}


@given(
    st.lists(st.tuples(st.floats(0, 5), st.booleans(), st.booleans(), st.booleans()), max_size=200), st.floats(0, 60)
)
def test_telling_is_neither_early_nor_repeated(seen: list[tuple[float, bool, bool, bool]], after_s: float) -> None:
    """Each step: seconds, whether the box is busy, whether what runs ends now, and whether it has worked."""
    alarm, spell = Alarm(after_s), Spell()
    idle, running, begun, worked = 0.0, False, 0, False
    running_is_old = False
    for seconds, busy, ends, works in seen:
        spell.sample(seconds, busy=busy)
        if busy:
            idle, begun, worked, running_is_old = 0.0, 0, False, running
        else:
            idle += seconds
        if running and ends:
            alarm.ended(None if works else "it broke", spell)
            worked = worked or (works and not running_is_old)
            running = running_is_old = False
        wait = alarm.fires_in_s(spell)
        assert wait is None or wait >= 0
        if alarm.due(spell):
            assert after_s > 0
            assert idle >= after_s
            assert not running
            assert not worked
            assert begun < ATTEMPTS
            alarm.begin()
            running, begun = True, begun + 1
            assert alarm.state(spell) == "running"
        elif wait == 0:
            assert busy or after_s == 0 or running
