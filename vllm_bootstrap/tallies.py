"""Counts of the data plane and of batches in plain numbers, cheap enough to keep for every request. PURE.

Invariant: adding to a tally takes a fraction of a microsecond, allocates next to nothing and takes no lock, because
one thread alone adds and reads. What the numbers are called and how they are printed is ``metrics``' business.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.gateway.limits import RequestRecord
from vllm_bootstrap.scheduler.tickets import Grant, Ticket, Watcher

MODELS_MAX = 200
OTHER = "other"

SHORT_S = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60)
WAIT_S = (0.001, 0.01, 0.1, 0.5, 1, 5, 15, 60, 300)
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
TOKEN_GAP_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)


class Spread:
    """How values are spread over buckets; a bucket holds what is at most its bound, the last one everything else."""

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(self._counts)

    def cumulated(self) -> list[tuple[str, int]]:
        """Bounds as text (``+Inf`` at the end) with the count of values up to them."""
        found, sum_so_far = [], 0
        for bound, count in zip([*map(float, self._bounds), "+Inf"], self._counts, strict=True):
            sum_so_far += count
            found.append((str(bound), sum_so_far))
        return found


class ClassTally:
    """What finished requests of one class came to. ``first_token`` and ``token_gap`` are of streamed answers."""

    __slots__ = ("first_byte", "first_token", "statuses", "token_gap", "tokens", "wait")

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.wait = Spread(WAIT_S)
        self.first_byte = Spread(SHORT_S)
        self.first_token = Spread(FIRST_TOKEN_S)
        self.token_gap = Spread(TOKEN_GAP_S)
        self.tokens: dict[str, list[int]] = {}

    def add(self, record: RequestRecord) -> None:
        """Count one finished request."""
        status, statuses = record.status, self.statuses
        statuses[status] = statuses.get(status, 0) + 1
        if record.launch_id is None:
            return
        waited = record.queue_ms / 1000
        self.wait.add(waited)
        first_byte = record.first_byte_s
        if first_byte is not None:
            self.first_byte.add(first_byte)
            if record.stream:
                self.first_token.add(waited + first_byte)
                if record.inter_token_s is not None:
                    self.token_gap.add(record.inter_token_s)
        if record.prompt_tokens is not None or record.completion_tokens is not None:
            tokens = self._tokens_of(record.model or OTHER)
            tokens[0] += record.prompt_tokens or 0
            tokens[1] += record.completion_tokens or 0

    def _tokens_of(self, model: str) -> list[int]:
        """Prompt and completion tokens of a model. Names are what launches serve, so they are few; a daemon that has
        seen very many counts the later ones together."""
        found = self.tokens.get(model)
        if found is None:
            name = model if len(self.tokens) < MODELS_MAX else OTHER
            found = self.tokens.setdefault(name, [0, 0])
        return found


class Traffic(Watcher):
    """All tallies of the data plane. Requests that were refused before they had a class are of the class ``none``."""

    def __init__(self) -> None:
        self.classes = {"realtime": ClassTally(), "batch": ClassTally(), "none": ClassTally()}
        self.admissions: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.taken_back = 0
        self.promotions = 0
        self.history_dropped = 0

    def finished(self, record: RequestRecord) -> None:
        """Count one finished request."""
        self.classes[record.cls or "none"].add(record)

    @property
    def served(self) -> int:
        """How many requests have had a place on an engine and ended."""
        return sum(tally.wait.count for tally in self.classes.values())

    # What the scheduler did with one request

    def admitted(self, ticket: Ticket, grant: Grant) -> None:  # noqa: ARG002
        self.admissions[ticket.cls, "admitted"] += 1

    def rejected(self, ticket: Ticket, model: str, error: ApiError) -> None:  # noqa: ARG002
        self.admissions[ticket.cls, error.code] += 1

    def revoked(self, ticket: Ticket, model: str, launch_id: str) -> None:  # noqa: ARG002
        self.taken_back += 1

    def promoted(self, ticket: Ticket, grant: Grant) -> None:  # noqa: ARG002
        self.promotions += 1

    def __iter__(self) -> Iterator[tuple[str, ClassTally]]:
        return iter(self.classes.items())


class BatchTally:
    """What became of lines of batches and of single items. ``retries``: attempts beyond the first of each.
    ``isolated``: those given up because engines ended over them."""

    __slots__ = ("completed", "failed", "isolated", "retries")

    def __init__(self) -> None:
        self.completed = self.failed = self.retries = self.isolated = 0

    def ended(self, *, ok: bool, attempts: int, isolated: bool) -> None:
        """One has its record."""
        self.completed += ok
        self.failed += not ok
        self.retries += max(0, attempts - 1)
        self.isolated += isolated
