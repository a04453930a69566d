"""A batch budget that a test sets by hand, and that notes what it is told."""

from __future__ import annotations

from typing import Any

from vllm_bootstrap.scheduler.ports import BatchBudget, BudgetReport, EngineSignals


class HandBudget(BatchBudget):
    """``most`` None: all slots. ``due``: overdue from that time on. ``too_many`` is what ``take_back`` says."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.most: int | None = None
        self.reserve = 0
        self.paced: float | None = None
        self.due: float | None = None
        self.too_many = 0
        self.change_at: float | None = None
        self.told: list[tuple[Any, ...]] = []
        self.realtime = self.batch = self.promotions = 0

    def resize(self, slots: int) -> None:
        self.slots = slots

    def realtime_arrived(self, now: float) -> None:
        self.told.append(("realtime_arrived", now))

    def realtime_granted(self, sequences: int, prompt_tokens: int, now: float) -> None:
        self.told.append(("realtime_granted", sequences, prompt_tokens, now))
        self.realtime += sequences

    def realtime_began(self, ttft_s: float, now: float) -> None:
        self.told.append(("realtime_began", ttft_s, now))

    def realtime_ended(self, sequences: int, now: float) -> None:
        self.told.append(("realtime_ended", sequences, now))
        self.realtime -= sequences

    def batch_granted(self, request: int, sequences: int, prompt_tokens: int, now: float) -> None:
        self.told.append(("batch_granted", request, sequences, prompt_tokens, now))
        self.batch += sequences

    def batch_began(self, request: int, now: float) -> None:
        self.told.append(("batch_began", request, now))

    def batch_ended(self, request: int, sequences: int, now: float, *, worked: bool = True) -> None:
        self.told.append(("batch_ended", request, sequences, now))
        if worked:
            self.told.append(("batch_worked", request))
        self.batch -= sequences

    def batch_waits(self, waiting: bool, now: float) -> None:
        self.told.append(("batch_waits", waiting, now))

    def signals(self, signals: EngineSignals, now: float) -> None:
        self.told.append(("signals", signals, now))

    def allowance(self, now: float) -> int:
        return self.slots - self.reserve if self.most is None else min(self.most, self.slots - self.reserve)

    def paced_until(self, now: float) -> float | None:
        return self.paced if self.paced is not None and now < self.paced else None

    def overdue(self, now: float) -> bool:
        return self.due is not None and now >= self.due

    def promoted(self, now: float) -> None:
        self.told.append(("promoted", now))
        self.promotions += 1
        self.due = None

    def take_back(self, now: float) -> int:
        return self.too_many

    def next_change(self, now: float) -> float | None:
        return self.change_at if self.change_at is not None and self.change_at > now else None

    def report(self, now: float) -> BudgetReport:
        return BudgetReport(self.slots, self.reserve, self.allowance(now), self.batch, self.realtime, "By hand.")

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        """What was told of that kind, without the kind."""
        return [told[1:] for told in self.told if told[0] == kind]
