"""What goes wrong with downloads, in the words of launches, and when to try again. PURE.

The names of troubles are what the helper process says; nothing else of it is trusted to have a form.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from vllm_bootstrap.engines.base import FailureClass

BACKOFF_S, BACKOFF_MAX_S = 1.0, 60.0
ATTEMPTS_WITHOUT_PROGRESS = 8
"""So often in a row nothing may arrive before a download is given up; with the waits between, about three minutes."""

WINDOW_S = 20.0
"""The rate is that of the last seconds."""


class Trouble(NamedTuple):
    """``permanent``: trying again cannot help."""

    failure_class: FailureClass | None
    message: str
    hint: str
    permanent: bool


_SAYINGS: dict[str, Trouble] = {
    "gated": Trouble(
        FailureClass.GATED_REPOSITORY,
        "The model's repository is gated.",
        "Accept the model's licence on its page and set HF_TOKEN of the daemon to a token that may read it.",
        permanent=True,
    ),
    "token": Trouble(
        FailureClass.GATED_REPOSITORY,
        "The hub refused the token, or wants one.",
        "Set HF_TOKEN of the daemon to a valid token that may read this model.",
        permanent=True,
    ),
    "no_repository": Trouble(
        FailureClass.MODEL_NOT_FOUND,
        "There is no such repository on the hub.",
        "Check the spelling of the repository id. A private repository needs HF_TOKEN.",
        permanent=True,
    ),
    "no_revision": Trouble(
        FailureClass.MODEL_NOT_FOUND,
        "The repository has no such revision.",
        "Check the spelling of revision: it names a branch, a tag or a commit.",
        permanent=True,
    ),
    "no_weights": Trouble(
        FailureClass.MODEL_NOT_FOUND,
        "The repository has nothing that an engine could load.",
        "Name a repository with weights in safetensors. Converting and quantizing are not done here.",
        permanent=True,
    ),
    "offline": Trouble(
        FailureClass.MODEL_NOT_FOUND,
        "Downloads are turned off (HF_HUB_OFFLINE).",
        "Unset HF_HUB_OFFLINE of the daemon, or bring the files into HF_HOME by other means.",
        permanent=True,
    ),
    "damaged": Trouble(
        FailureClass.MODEL_NOT_FOUND,
        "What the hub sends is not what it says it sends: a file's checksum is wrong, twice.",
        "Try again later, or ask whoever runs the mirror that HF_ENDPOINT names.",
        permanent=True,
    ),
    "full": Trouble(
        None,
        "The disk has no room for the model.",
        "Delete models that are not needed (DELETE /models/NAME/files), or set HF_HOME to a larger disk.",
        permanent=True,
    ),
    "disk": Trouble(
        None,
        "The folder for downloads cannot be written.",
        "Check that the daemon's user may write HF_HOME, and the disk itself.",
        permanent=True,
    ),
    "user": Trouble(
        None,
        "The user that engines run as cannot read the daemon's Python, and downloads run as that user.",
        "Install the daemon where others may read it (not below /root), or unset VLLM_BOOTSTRAP_ENGINE_USER.",
        permanent=True,
    ),
    "connection": Trouble(
        FailureClass.MODEL_NOT_FOUND,
        "The hub cannot be reached.",
        "Check the network of this machine (proxy, DNS, HF_ENDPOINT).",
        permanent=False,
    ),
    "hub": Trouble(
        FailureClass.MODEL_NOT_FOUND,
        "The hub answers with an error.",
        "It is tried again by itself; the hub may be overloaded.",
        permanent=False,
    ),
    "died": Trouble(
        None,
        "The helper that downloads ended unexpectedly.",
        "It is started again by itself; the daemon's log has its last words.",
        permanent=False,
    ),
}


def trouble(name: str, detail: str = "") -> Trouble:
    """What a helper's word for a failure means. ``detail``: what it adds, one line. Unknown words count as a death."""
    found = _SAYINGS.get(name, _SAYINGS["died"])
    line = " ".join(detail.split())[:300]
    return found._replace(message=f"{found.message} {line}".rstrip()) if line else found


def backoff_s(failures: int, chance: float) -> float:
    """Seconds to wait after so many failures in a row (from 1). ``chance`` from 0 to 1 spreads those that failed
    together over the last quarter of it."""
    whole = min(BACKOFF_MAX_S, BACKOFF_S * 2.0 ** (failures - 1))
    return whole * (0.75 + 0.25 * chance)


class Rate:
    """Bytes a second over the last ``WINDOW_S``. Times are seconds on any clock that only goes forward."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def saw(self, now: float, done: int) -> None:
        """``done`` bytes in all. Less than before starts anew (a file was fetched again)."""
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, done))
        while len(self._seen) > 2 and self._seen[0][0] < now - WINDOW_S:
            self._seen.popleft()

    def per_second(self) -> float | None:
        """None: not known yet."""
        if len(self._seen) < 2 or self._seen[-1][0] <= self._seen[0][0]:
            return None
        (first_at, first), (last_at, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_at - first_at)

    def eta_s(self, missing: int) -> float | None:
        """Seconds until ``missing`` bytes more are there, None when that cannot be told."""
        rate = self.per_second()
        return missing / rate if rate else None
