"""What lanes carry, and where it comes from: jobs, their ends, sources. PURE.

A *job* is one line of a batch or one single item, once it is in memory. A *source* gives out jobs for one lane and is
told what became of each: exactly one of ``ended`` and ``returned`` for every job it gave out, unless it was withdrawn
before.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from vllm_bootstrap.errors import ApiError

Key = tuple[str, int]


class Answered(NamedTuple):
    """The engine's last word on a job: a status that no other attempt would change, or not many more were allowed."""

    status: int
    body: bytes
    request_id: str


class GaveUp(NamedTuple):
    """There was no answer, and there will be none."""

    code: str
    message: str


Ending = Answered | GaveUp


class Outcome(NamedTuple):
    """How a request went: an answer (``status`` and ``body``), or an ``error`` of ours. ``sent``: an engine had it, at
    least in part."""

    status: int | None
    body: bytes
    error: ApiError | None
    sent: bool
    request_id: str


class Job:
    """``body`` is what the engine gets, a JSON object. ``attempts`` are those that count, ``deaths`` the engines that
    ended while they had it, ``uncounted`` the tries in a row that count as nothing. ``alone``: not to be joined.
    ``dropped``: nobody wants to hear of it any more, though it is under way with others."""

    __slots__ = ("alone", "attempts", "body", "deaths", "dropped", "number", "path", "source", "uncounted")

    def __init__(self, source: Source, number: int, path: str, body: bytes, attempts: int = 0, deaths: int = 0) -> None:
        self.source = source
        self.number = number
        self.path = path
        self.body = body
        self.attempts = attempts
        self.deaths = deaths
        self.uncounted = 0
        self.alone = self.dropped = False

    @property
    def key(self) -> Key:
        return self.source.id, self.number

    @property
    def executions(self) -> int:
        """How often an engine had it, as far as is known."""
        return self.attempts + self.deaths


class Source(Protocol):
    """Lines of one batch, or items of one key, that go to one lane. ``id`` is unique and sorts by age; ``deadline``
    is in unix seconds."""

    id: str
    owner: str
    priority: int
    deadline: float

    @property
    def left(self) -> int:
        """About how many of its jobs have not ended, those that were given out included."""

    def take(self) -> Job | None:
        """The next job, None when there is none at the moment: it says ``ready`` to its lane when there is again."""

    def ended(self, job: Job, ending: Ending) -> None:
        """This is what is to be recorded of it. ``job.attempts`` or ``job.deaths`` includes the last."""

    def returned(self, job: Job) -> None:
        """It was not carried out, through no fault of its own: it is to be given out again, before others."""

    def noted(self, job: Job) -> None:
        """Its attempts or deaths have changed; it is not over."""
