from __future__ import annotations

import pytest

from vllm_bootstrap.gpus.ledger import Claim, Ledger, LedgerConflict, Parked


def test_all_gpus_or_none() -> None:
    ledger = Ledger()
    ledger.claim("l1", ["b"])
    with pytest.raises(LedgerConflict, match="b is owned by l1") as caught:
        ledger.claim("l2", ["a", "b"])
    assert caught.value.uuid == "b"
    assert caught.value.owners == ("l1",)
    assert ledger.owners("a") == ()
    assert ledger.holds("l2") == ()


def test_shares_add_up_to_a_whole_and_no_more() -> None:
    ledger = Ledger()
    ledger.claim("l1", ["a"], 600, True)
    assert ledger.fits(Claim("a", 400, True))
    assert not ledger.fits(Claim("a", 401, True))
    ledger.claim("l2", ["a"], 400, True)
    assert ledger.claimed_milli("a") == 1000
    assert ledger.claimed_milli("a", without="l1") == 400
    assert set(ledger.claims_on("a")) == {"l1", "l2"}


@pytest.mark.parametrize(("first", "second"), [((1000, False), (1, True)), ((1, True), (1000, False))])
def test_only_those_who_both_share_share(first: tuple[int, bool], second: tuple[int, bool]) -> None:
    ledger = Ledger()
    ledger.claim("l1", ["a"], *first)
    with pytest.raises(LedgerConflict):
        ledger.claim("l2", ["a"], *second)


def test_an_owner_claims_once() -> None:
    ledger = Ledger()
    ledger.claim("l1", ["a"])
    with pytest.raises(ValueError, match="l1 holds claims already"):
        ledger.claim("l1", ["b"])


def test_a_gpu_is_named_once() -> None:
    with pytest.raises(ValueError, match="named twice"):
        Ledger().claim("l1", ["a", "a"])


def test_release_gives_everything_back_once() -> None:
    ledger = Ledger()
    claims = ledger.claim("l1", ["a", "b"])
    assert ledger.release("l1") == claims
    assert ledger.release("l1") == ()
    ledger.claim("l2", ["a"])


def test_a_release_leaves_the_neighbour() -> None:
    ledger = Ledger()
    ledger.claim("l1", ["a"], 500, True)
    ledger.claim("l2", ["a"], 500, True)
    ledger.release("l1")
    assert ledger.owners("a") == ("l2",)


def test_restored_claims_are_checked() -> None:
    whole = Claim("a", 1000, False)
    with pytest.raises(LedgerConflict):
        Ledger().restore({"l1": [whole], "l2": [whole]})


@pytest.mark.parametrize(("milli", "shared"), [(0, True), (1001, True), (-1, True), (999, False)])
def test_impossible_claims_cannot_be_made(milli: int, shared: bool) -> None:
    with pytest.raises(ValueError, match="claim"):
        Claim("a", milli, shared)


def test_stored_parked_claims_do_not_contradict_what_is_held() -> None:
    ledger = Ledger()
    parked = {"a": [Parked(Claim("GPU-a", 1000, False), 5)]}
    ledger.restore_parked(parked)
    assert ledger.residue_bytes("GPU-a") == 5
    with pytest.raises(ValueError, match="holds claims already"):
        ledger.restore_parked(parked)
    with pytest.raises(ValueError, match="holds claims already"):
        ledger.claim("a", ["GPU-b"])
