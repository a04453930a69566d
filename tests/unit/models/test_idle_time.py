"""What counts as work, what as idleness, and what as nothing at all."""

from vllm_bootstrap.models.idle_time import MAX_GAP_S, IdleAccount, Spent, Use

FREE, LOADED, WORKING = Use(False, False), Use(True, False), Use(True, True)


def spent(*samples, before=None, device="a"):
    account = IdleAccount(before or {})
    for now, use in samples:
        account.sample(now, {} if use is None else {device: use})
    return account


def test_a_loaded_model_that_nobody_uses_is_idle_time():
    assert spent((0, FREE), (1, LOADED), (2, WORKING), (3, FREE)).this_start("a") == Spent(2, 1, 2)


def test_nobody_works_on_what_nobody_owns():
    assert spent((0, FREE), (1, Use(False, True))).this_start("a") == Spent(0, 0, 1)
    assert Spent(3, 2, 1).observed_s == 3


def test_the_first_look_and_a_gap_count_as_nothing():
    gap = MAX_GAP_S + 0.1
    assert spent((0, WORKING)).this_start("a") == Spent()
    assert spent((0, WORKING), (gap, WORKING)).this_start("a") == Spent()
    assert spent((0, WORKING), (gap, WORKING), (gap + 1, WORKING)).this_start("a") == Spent(1, 1, 0)
    assert spent((5, WORKING), (3, WORKING), (4, WORKING)).this_start("a") == Spent(1, 1, 0)


def test_a_device_that_was_away_is_not_counted_for_that_time():
    assert spent((0, LOADED), (1, None), (2, LOADED), (3, LOADED)).this_start("a") == Spent(1, 0, 1)


def test_earlier_starts_are_in_the_total_only():
    account = spent((0, LOADED), (2, WORKING), before={"a": Spent(10, 5, 20), "gone": Spent(1, 1, 1)})
    assert account.total("a") == Spent(12, 7, 20)
    assert account.this_start("a") == Spent(2, 2, 0)
    assert account.totals() == {"a": Spent(12, 7, 20)}
    assert account.total("gone") == Spent(1, 1, 1)
    assert account.total("never") == Spent()
