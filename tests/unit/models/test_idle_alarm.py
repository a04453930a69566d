"""Once in a spell of idleness, and again where it failed."""

from vllm_bootstrap.models.idle_alarm import ATTEMPTS, FIRST_DELAY_S, Alarm, Spell


def idle(spell, seconds):
    spell.sample(seconds, busy=False)
    return spell


def fired(alarm, spell):
    assert alarm.due(spell)
    alarm.begin()


def test_a_success_is_not_repeated_before_the_box_was_busy():
    alarm, spell = Alarm(60), Spell()
    assert alarm.state(spell) == "waiting"
    assert alarm.fires_in_s(idle(spell, 59)) == 1
    assert not alarm.due(spell)
    fired(alarm, idle(spell, 1))
    assert (alarm.state(spell), alarm.fires_in_s(spell), alarm.due(spell)) == ("running", None, False)
    alarm.ended(None, spell)
    assert not alarm.due(idle(spell, 10_000))
    assert (alarm.state(spell), alarm.fires_in_s(spell)) == ("completed", None)
    spell.sample(1, busy=True)
    assert alarm.state(spell) == "waiting"
    assert alarm.fires_in_s(spell) == 60
    assert not alarm.due(idle(spell, 59))
    fired(alarm, idle(spell, 1))


def test_a_failure_is_tried_again_later_and_later_and_then_given_up():
    alarm, spell = Alarm(10), Spell()
    idle(spell, 10)
    waits = []
    for _ in range(ATTEMPTS):
        fired(alarm, spell)
        alarm.ended("it broke", spell)
        waits.append(alarm.fires_in_s(spell))
        assert not alarm.due(spell)
        idle(spell, waits[-1] or 10_000)
    assert waits == [FIRST_DELAY_S, FIRST_DELAY_S * 4, FIRST_DELAY_S * 16, None]
    assert not alarm.due(spell)
    assert (alarm.state(spell), alarm.error, alarm.attempts) == ("given_up", "it broke", ATTEMPTS)


def test_a_failure_that_is_to_be_tried_again_says_so():
    alarm, spell = Alarm(10), Spell()
    fired(alarm, idle(spell, 10))
    alarm.ended("it broke", spell)
    assert alarm.state(spell) == "failed"


def test_what_began_in_an_earlier_spell_says_nothing_about_this_one():
    alarm, spell = Alarm(10), Spell()
    fired(alarm, idle(spell, 10))
    spell.sample(1, busy=True)
    assert not alarm.due(spell)
    assert not alarm.due(idle(spell, 10))  # it still runs
    alarm.ended(None, spell)
    fired(alarm, spell)


def test_off_is_off():
    alarm, spell = Alarm(0), Spell()
    assert not alarm.due(idle(spell, 1e9))
    assert alarm.fires_in_s(spell) is None
