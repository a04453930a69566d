"""What can go wrong on this side, beyond the errors that the daemon answers with (those are in ``errors``).

The tree::

    ClientError
    ├── DaemonUnreachable   nobody answers, or the connection broke
    ├── UnexpectedAnswer    somebody answers, but not as this daemon does
    ├── LaunchFailed        a launch that was waited for has ended (``status`` says how)
    ├── LoadFailed          a model that was waited for could not be loaded (``status`` says why)
    ├── DownloadFailed      a download that was waited for has failed or was cancelled (``info``)
    ├── PrefetchFailed      likewise reading a model's files ahead
    ├── WaitTimeout         a launch that was waited for is not ready yet (also a ``TimeoutError``)
    └── EndTimeout          something else that was waited for has not ended yet (also a ``TimeoutError``)
"""

from __future__ import annotations

from vllm_bootstrap.wire import LaunchStatus
from vllm_bootstrap.wire_models import DownloadInfo, ModelStatus, PrefetchInfo


class ClientError(Exception):
    """Base of the client's own errors; ``ApiError`` is the base of those that the daemon answers with."""


class DaemonUnreachable(ClientError):
    """``never_met``: no connection could be made at all, so nothing was sent."""

    def __init__(self, url: str, reason: str, *, never_met: bool = False) -> None:
        text = f"The daemon at {url} went away: {reason}."
        if never_met:
            text = (
                f"No daemon answers at {url} ({reason}). Start one with 'vllm-bootstrap', or say where it is with "
                "VLLM_BOOTSTRAP_URL."
            )
        super().__init__(text)
        self.url, self.never_met = url, never_met


class UnexpectedAnswer(ClientError):
    """A redirect (never followed: the key would go where nobody meant it to), or no answer of this API at all."""


class LaunchFailed(ClientError):
    """``status`` is the launch as it ended; ``status.failure`` has class, telling lines and hint."""

    def __init__(self, status: LaunchStatus) -> None:
        failure = status.failure
        if failure is None:
            reason = "was stopped before it was ready"
        else:
            reason = f"failed ({failure.failure_class}): {failure.message} {failure.hint}".rstrip()
        super().__init__(f"{status.model} (launch {status.launch_id}) {reason}")
        self.status = status


class LoadFailed(ClientError):
    """``status`` is the model as it was seen then; ``status.failure`` has class and hint."""

    def __init__(self, status: ModelStatus) -> None:
        failure = status.failure
        if status.state != "failed":
            reason = f"was put away before it was loaded{f': {status.why}' if status.why else ''}"
        elif failure is None:
            reason = f"could not be loaded{f': {status.why}' if status.why else ''}"
        else:
            reason = f"could not be loaded ({failure.failure_class}): {failure.message} {failure.hint}".rstrip()
        super().__init__(f"{status.name} {reason}")
        self.status = status


class DownloadFailed(ClientError):
    """``info`` is the download as it ended."""

    def __init__(self, info: DownloadInfo) -> None:
        super().__init__(f"The download of {info.model} {_end(info.state, info.error, info.hint)}")
        self.info = info


class PrefetchFailed(ClientError):
    """``info`` is how it ended."""

    def __init__(self, info: PrefetchInfo) -> None:
        super().__init__(f"Reading {info.model} ahead {_end(info.state, info.error, None)}")
        self.info = info


def _end(state: str, error: str | None, hint: str | None) -> str:
    if state == "cancelled":
        return "was cancelled."
    return " ".join(part for part in (f"failed: {error or 'no reason given'}", hint) if part)


class WaitTimeout(ClientError, TimeoutError):
    """The launch goes on; only the waiting has ended. ``status`` is the last one seen."""

    def __init__(self, status: LaunchStatus | None, launch_id: str, timeout_s: float) -> None:
        phase = status.progress.phase if status is not None and status.progress is not None else None
        where = f" (phase: {phase})" if phase else ""
        super().__init__(f"Launch {launch_id} is not ready after {timeout_s:g} s{where}. It goes on starting.")
        self.status = status


class EndTimeout(ClientError, TimeoutError):
    """What was waited for goes on; only the waiting has ended."""

    def __init__(self, what: str, timeout_s: float) -> None:
        super().__init__(f"{what} has not ended after {timeout_s:g} s. It goes on.")
