"""Who owns which part of which GPU. PURE.

Invariant: the claims on one GPU sum up to at most 1000 thousandths, and more than one owner exists only where every
claim on that GPU is shared. An owner claims once, all its GPUs or none, and gives everything back at once.

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

    def claim(
        self, owner: str, uuids: Iterable[str], share_milli: int = WHOLE, shared: bool = False
    ) -> tuple[Claim, ...]:
        """Take all of ``uuids`` or nothing. Raises ``LedgerConflict``; ``ValueError`` when the owner holds already."""
        claims = tuple(Claim(uuid, share_milli, shared) for uuid in uuids)
        self._take(owner, claims)
        return claims

    def _take(self, owner: str, claims: tuple[Claim, ...]) -> None:
        if self.holds(owner):
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
        """Give back everything ``owner`` holds; what it was. Idempotent."""
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

    def restore(self, claims: Mapping[str, Iterable[Claim]]) -> None:
        """Take in stored claims by owner. Raises ``LedgerConflict`` when they contradict what is held."""
        for owner, held in claims.items():
            self._take(owner, tuple(held))
