"""The ledger against a naive model: never more than a whole GPU, never an owner beside an exclusive one."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_bootstrap.gpus.ledger import WHOLE, Claim, Ledger, LedgerConflict, Parked

OWNERS = st.sampled_from([f"l{n}" for n in range(6)])
GPUS = ["GPU-a", "GPU-b", "GPU-c"]
SETS = st.lists(st.sampled_from(GPUS), min_size=1, max_size=3, unique=True)
SHARES = st.sampled_from([1, 100, 250, 333, 334, 500, 999, 1000])


class Owning(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.held: dict[str, tuple[Claim, ...]] = {}
        self.parked: dict[str, tuple[Parked, ...]] = {}

    def on(self, uuid: str) -> dict[str, Claim]:
        return {owner: c for owner, claims in self.held.items() for c in claims if c.uuid == uuid}

    def has_room(self, claim: Claim) -> bool:
        present = self.on(claim.uuid).values()
        alone = not present
        together = claim.shared and all(c.shared for c in present)
        return alone or (together and sum(c.share_milli for c in present) + claim.share_milli <= WHOLE)

    @rule(owner=OWNERS, uuids=SETS, share=SHARES)
    def take(self, owner: str, uuids: list[str], share: int) -> None:
        shared = share < WHOLE
        wanted = [Claim(uuid, share, shared) for uuid in uuids]
        full = [c for c in wanted if not self.has_room(c)]
        if owner in self.held or owner in self.parked:
            with pytest.raises(ValueError, match="holds claims already"):
                self.ledger.claim(owner, uuids, share, shared)
        elif full:
            with pytest.raises(LedgerConflict) as caught:
                self.ledger.claim(owner, uuids, share, shared)
            assert caught.value.uuid == full[0].uuid
            assert set(caught.value.owners) == set(self.on(full[0].uuid))
        else:
            self.held[owner] = self.ledger.claim(owner, uuids, share, shared)
            assert list(self.held[owner]) == wanted

    @rule(owner=OWNERS)
    def give_back(self, owner: str) -> None:
        assert set(self.ledger.release(owner)) == set(self.held.pop(owner, ()))
        self.parked.pop(owner, None)
        assert self.ledger.release(owner) == ()

    @rule()
    def be_restarted(self) -> None:
        fresh = Ledger()
        fresh.restore(self.held)
        fresh.restore_parked(self.parked)
        self.ledger = fresh

    @rule(owner=OWNERS, residue=st.integers(0, 9))
    def fall_asleep(self, owner: str, residue: int) -> None:
        if owner in self.parked:
            return
        held = self.held.pop(owner, ())
        parked = self.ledger.park(owner, {claim.uuid: residue for claim in held})
        assert set(parked) == {Parked(claim, residue) for claim in held}
        if held:
            self.parked[owner] = parked

    @rule(owner=OWNERS)
    def wake(self, owner: str) -> None:
        wanted = [each.claim for each in self.parked.get(owner, ())]
        if all(self.has_room(claim) for claim in wanted):
            assert set(self.ledger.unpark(owner)) == set(wanted)
            if owner in self.parked:
                del self.parked[owner]
                self.held[owner] = tuple(wanted)
        else:
            with pytest.raises(LedgerConflict):
                self.ledger.unpark(owner)

    @invariant()
    def what_sleeps_is_remembered_and_in_nobodys_way(self) -> None:
        for uuid in GPUS:
            here = {o: each for o, parked in self.parked.items() for each in parked if each.claim.uuid == uuid}
            assert set(self.ledger.parked_on(uuid)) == set(here)
            assert self.ledger.residue_bytes(uuid) == sum(each.residue_bytes for each in here.values())
            for owner in here:
                others = sum(each.residue_bytes for o, each in here.items() if o != owner)
                assert self.ledger.residue_bytes(uuid, without=owner) == others
        for owner, parked in self.parked.items():
            assert set(self.ledger.parked(owner)) == set(parked)
            assert self.ledger.holds(owner) == ()

    @invariant()
    def both_agree(self) -> None:
        for uuid in GPUS:
            assert dict(self.ledger.claims_on(uuid)) == self.on(uuid)
            assert set(self.ledger.owners(uuid)) == set(self.on(uuid))
        for owner, claims in self.held.items():
            assert set(self.ledger.holds(owner)) == set(claims)

    @invariant()
    def no_gpu_is_given_out_twice(self) -> None:
        for uuid in GPUS:
            claims = self.ledger.claims_on(uuid).values()
            assert self.ledger.claimed_milli(uuid) == sum(c.share_milli for c in claims) <= WHOLE
            assert len(claims) <= 1 or all(c.shared for c in claims)


TestOwning = Owning.TestCase
