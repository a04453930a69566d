"""What is known about a start that is under way: phase, fraction, bytes downloaded, time left. PURE.

Invariant: progress is never readiness, and a fraction is never invented: an unknown phase shows elapsed time only.
Only a new phase, a higher fraction or more downloaded bytes counts as progress; mere log output does not, so that an
engine which chatters for ever still runs into its start timeout.
"""

from __future__ import annotations

from vllm_bootstrap.engines.base import Progress
from vllm_bootstrap.launches.types import ProgressView

WAITING_FOR_GPU = "waiting_for_gpu"
STARTING = "starting"


class StartProgress:
    """Collects what log lines and cache measurements say about one start. Times are monotonic seconds."""

    def __init__(self, now: float, estimate_s: float | None = None) -> None:
        self.started_at = now
        self.moved_at = now
        self._estimate_s = estimate_s
        self._phase: str | None = None
        self._phase_since = now
        self._fraction: float | None = None
        self._detail: str | None = None
        self._downloaded: int | None = None
        self.phase_durations: dict[str, float] = {}

    def on_line(self, progress: Progress, now: float) -> None:
        """Take in what the engine's log parser made of a line."""
        if progress.phase != self._phase:
            self._close_phase(now)
            self._phase, self._phase_since, self._fraction = progress.phase, now, progress.fraction
            self.moved_at = now
        elif progress.fraction is not None and progress.fraction > (self._fraction or 0.0):
            self._fraction = progress.fraction
            self.moved_at = now
        self._detail = progress.detail

    def on_phase(self, phase: str, now: float) -> None:
        """Enter a phase of our own making (waiting for the GPU, starting)."""
        self.on_line(Progress(phase), now)

    def on_downloaded(self, total_bytes: int, now: float) -> None:
        """Take in the size of the model's files in the cache. The first reading is the base, not progress."""
        if self._downloaded is not None and total_bytes > self._downloaded:
            self.moved_at = now
        self._downloaded = total_bytes

    def finish(self, now: float) -> dict[str, float]:
        """Close the last phase; seconds spent in each phase."""
        self._close_phase(now)
        return dict(self.phase_durations)

    def _close_phase(self, now: float) -> None:
        if self._phase is not None:
            spent = self.phase_durations.get(self._phase, 0.0) + now - self._phase_since
            self.phase_durations[self._phase] = round(spent, 3)

    def view(self, now: float) -> ProgressView:
        elapsed = now - self.started_at
        return ProgressView(
            phase=self._phase,
            fraction=self._fraction,
            detail=self._detail,
            elapsed_s=round(elapsed, 1),
            eta_s=None if self._estimate_s is None else round(max(0.0, self._estimate_s - elapsed), 1),
            downloaded_bytes=self._downloaded,
            download_total_bytes=None,
        )
