"""Who owns which part of which GPU. PURE.

Invariant: the claims on one GPU sum up to at most 1000 thousandths, and more than one owner exists only where every
claim on that GPU is shared. An owner claims once, all its GPUs or none, and gives everything back at once.

An owner that sleeps may *park* its claims: they hold nothing then and are only remembered, with the memory it still
uses (the residue), until it takes them again, as they were, or gives them up.

The database keeps the same invariant by trigger; this is the fast first answer, that is the last word. Nothing here
knows launches, devices or memory: owners and GPUs are strings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

WHOLE = 1000


@dataclass(frozen=True, slots=True)
class Claim:
    """A part of one GPU, in thousandths. Only a shared claim may be smaller than the whole."""

    uuid: str
    share_milli: int
    shared: bool

    def __post_init__(self) -> None:
        if not 1 <= self.share_milli <= WHOLE:
            raise ValueError(f"a claim is 1 to {WHOLE} thousandths, not {self.share_milli}")
        if not self.shared and self.share_milli != WHOLE:
            raise ValueError("a claim that is not shared takes the whole GPU")


@dataclass(frozen=True, slots=True)
class Parked:
    """A claim that holds nothing until it is taken again. ``residue_bytes``: what its owner uses meanwhile."""

    claim: Claim
    residue_bytes: int = 0


class LedgerConflict(Exception):
    """A GPU has no room for the claim. ``owners`` are those who hold it."""

    def __init__(self, uuid: str, owners: tuple[str, ...]) -> None:
        super().__init__(f"{uuid} is owned by {', '.join(owners)}")
        self.uuid = uuid
        self.owners = owners


class Ledger:
    """All claims of this daemon. Not thread-safe: it belongs to the event loop."""

    def __init__(self) -> None:
        self._by_gpu: dict[str, dict[str, Claim]] = {}
        self._parked: dict[str, dict[str, Parked]] = {}

    def claim(
        self, owner: str, uuids: Iterable[str], share_milli: int = WHOLE, shared: bool = False
    ) -> tuple[Claim, ...]:
        """Take all of ``uuids`` or nothing. Raises ``LedgerConflict``; ``ValueError`` when the owner holds already."""
        claims = tuple(Claim(uuid, share_milli, shared) for uuid in uuids)
        self._take(owner, claims)
        return claims

    def _take(self, owner: str, claims: tuple[Claim, ...]) -> None:
        if self.holds(owner) or owner in self._parked:
            raise ValueError(f"{owner} holds claims already")
        if len({c.uuid for c in claims}) != len(claims):
            raise ValueError("a GPU is named twice")
        for claim in claims:
            if not self.fits(claim):
                raise LedgerConflict(claim.uuid, self.owners(claim.uuid))
        for claim in claims:
            self._by_gpu.setdefault(claim.uuid, {})[owner] = claim

    def fits(self, claim: Claim) -> bool:
        """Whether there is room for ``claim`` now."""
        present = self._by_gpu.get(claim.uuid, {}).values()
        if not present:
            return True
        all_shared = claim.shared and all(c.shared for c in present)
        return all_shared and self.claimed_milli(claim.uuid) + claim.share_milli <= WHOLE

    def release(self, owner: str) -> tuple[Claim, ...]:
        """Give back everything ``owner`` holds and forget what it parked; what it held. Idempotent."""
        self._parked.pop(owner, None)
        held = self.holds(owner)
        for claim in held:
            del self._by_gpu[claim.uuid][owner]
            if not self._by_gpu[claim.uuid]:
                del self._by_gpu[claim.uuid]
        return held

    def owners(self, uuid: str) -> tuple[str, ...]:
        """Who holds a part of this GPU, in the order of their claims."""
        return tuple(self._by_gpu.get(uuid, {}))

    def holds(self, owner: str) -> tuple[Claim, ...]:
        """What ``owner`` holds."""
        return tuple(claims[owner] for claims in self._by_gpu.values() if owner in claims)

    def claims_on(self, uuid: str) -> Mapping[str, Claim]:
        """Owner to claim, a copy."""
        return dict(self._by_gpu.get(uuid, {}))

    def claimed_milli(self, uuid: str, *, without: str | None = None) -> int:
        """Thousandths claimed on this GPU, not counting the owner ``without``."""
        return sum(c.share_milli for owner, c in self._by_gpu.get(uuid, {}).items() if owner != without)

    # -- parked claims ------------------------------------------------------------------------------------------

    def park(self, owner: str, residues: Mapping[str, int]) -> tuple[Parked, ...]:
        """Turn all claims of ``owner`` into parked ones. ``residues``: bytes it still uses, by GPU. Idempotent in that
        an owner without claims has nothing to park."""
        held = self.release(owner)
        parked = {claim.uuid: Parked(claim, residues.get(claim.uuid, 0)) for claim in held}
        if parked:
            self._parked[owner] = parked
        return tuple(parked.values())

    def unpark(self, owner: str) -> tuple[Claim, ...]:
        """Take again all that ``owner`` has parked, or nothing. Raises ``LedgerConflict``. Idempotent in that an owner
        without parked claims has nothing to take."""
        parked = self._parked.pop(owner, None)
        if parked is None:
            return ()
        claims = tuple(each.claim for each in parked.values())
        try:
            self._take(owner, claims)
        except LedgerConflict:
            self._parked[owner] = parked
            raise
        return claims

    def parked(self, owner: str) -> tuple[Parked, ...]:
        """What ``owner`` has parked."""
        return tuple(self._parked.get(owner, {}).values())

    def parked_on(self, uuid: str) -> tuple[str, ...]:
        """Who has a parked claim on this GPU."""
        return tuple(owner for owner, parked in self._parked.items() if uuid in parked)

    def residue_bytes(self, uuid: str, *, without: str | None = None) -> int:
        """What owners of parked claims use of this GPU, not counting the owner ``without``."""
        found = (parked.get(uuid) for owner, parked in self._parked.items() if owner != without)
        return sum(each.residue_bytes for each in found if each is not None)

    def restore_parked(self, parked: Mapping[str, Iterable[Parked]]) -> None:
        """Take in stored parked claims by owner. Raises ``ValueError`` when one of them holds claims."""
        for owner, claims in parked.items():
            if self.holds(owner) or owner in self._parked:
                raise ValueError(f"{owner} holds claims already")
            self._parked[owner] = {each.claim.uuid: each for each in claims}

    def restore(self, claims: Mapping[str, Iterable[Claim]]) -> None:
        """Take in stored claims by owner. Raises ``LedgerConflict`` when they contradict what is held."""
        for owner, held in claims.items():
            self._take(owner, tuple(held))
