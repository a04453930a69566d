"""KV blocks: how many a sequence holds, and which prompt blocks are remembered for others with the same prefix. PURE.

A block of a prompt that is complete is known by the hash of it and all before it. Sequences with the same beginning
share it; when nobody holds it any more it stays until its room is needed, the longest unused first. Generated tokens
are not remembered.

Invariant: blocks held + free + remembered but unheld = total, always; a sequence that was released holds none.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from vllm_bootstrap.engines.simulator.sequence import Sequence


def prefix_hashes(tokens: Items[object], size: int) -> tuple[int, ...]:
    """The hash of each full block of ``size`` tokens together with all before it. Valid in this process alone."""
    found: list[int] = []
    last = 0
    for start in range(0, len(tokens) - size + 1, size):
        last = hash((last, *tokens[start : start + size]))
        found.append(last)
    return tuple(found)


class Blocks:
    """The pool. ``size`` is in tokens. ``caching`` off: nothing is remembered."""

    def __init__(self, total: int, size: int, *, caching: bool = True) -> None:
        self.total = total
        self.size = size
        self.caching = caching
        self._free = total
        self._holders: dict[int, int] = {}
        self._unheld: dict[int, None] = {}

    @property
    def free(self) -> int:
        """Blocks that can be taken, remembered ones that nobody holds included."""
        return self._free + len(self._unheld)

    @property
    def usage(self) -> float:
        return 1 - self.free / self.total

    def hits(self, sequence: Sequence) -> int:
        """How many of its first blocks are there already. The last token is computed in any case, as it must be."""
        if not self.caching:
            return 0
        most = min(len(sequence.prefix), (sequence.length - 1) // self.size)
        found = 0
        while found < most and sequence.prefix[found] in self._holders:
            found += 1
        return found

    def fits(self, sequence: Sequence, hits: int) -> bool:
        """Whether all its tokens so far have room at once: it is not begun otherwise."""
        revived = sum(key in self._unheld for key in sequence.prefix[:hits])
        return self._wanted(sequence.length) - hits + revived <= self.free

    def adopt(self, sequence: Sequence, hits: int) -> None:
        """Begin with the ``hits`` first blocks, which are there."""
        for key in sequence.prefix[:hits]:
            self._unheld.pop(key, None)
            self._holders[key] += 1
            sequence.held.append(key)
        sequence.remembered = hits
        sequence.room = sequence.computed = hits * self.size

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give it room for so many tokens in all. False, and nothing is changed, when there is none."""
        more = self._wanted(tokens) - sequence.room // self.size
        if more > self.free:
            return False
        for _ in range(more):
            if self._free:
                self._free -= 1
            else:
                oldest = next(iter(self._unheld))
                del self._unheld[oldest], self._holders[oldest]
        sequence.room += max(0, more) * self.size
        return True

    def remember(self, sequence: Sequence, tokens: int) -> None:
        """Its first ``tokens`` are (about to be) computed: full blocks of the prompt among them can be shared."""
        if not self.caching:
            return
        full = min(len(sequence.prefix), tokens // self.size)
        for key in sequence.prefix[sequence.remembered : full]:
            if key not in self._holders:  # else another made the same block at the same time; this one stays its own
                self._holders[key] = 1
                sequence.held.append(key)
        sequence.remembered = max(sequence.remembered, full)

    def release(self, sequence: Sequence) -> None:
        """Take all its blocks back. Idempotent."""
        self._free += sequence.room // self.size - len(sequence.held)
        for key in reversed(sequence.held):  # the end of a prefix is forgotten before its beginning
            self._holders[key] -= 1
            if not self._holders[key]:
                self._unheld[key] = None
        sequence.held.clear()
        sequence.room = sequence.computed = sequence.remembered = 0

    def _wanted(self, tokens: int) -> int:
        return -(-tokens // self.size)
