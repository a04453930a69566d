"""What others may ask of admission: who serves what, who waits, who runs. PURE.

Invariant: a question changes nothing. Answers are copies or immutable.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_bootstrap.auth.types import Principal
from vllm_bootstrap.scheduler.directory import Directory
from vllm_bootstrap.scheduler.limits import KeyLimits, RateState
from vllm_bootstrap.scheduler.ports import BudgetReport, Demand
from vllm_bootstrap.scheduler.queues import Request
from vllm_bootstrap.scheduler.tickets import Target
from vllm_bootstrap.serving import Advert, Instance, LoadReport, RequestClass


class Questions:
    """To be inherited by who keeps the books."""

    limits: KeyLimits
    _directory: Directory
    _requests: dict[int, Request]

    def instance(self, target: Target, principal: Principal | None) -> Instance:
        """The launch a request that needs no slot goes to. Raises as ``request`` does in cases 2 and 3."""
        launches = self._directory.lane(target, principal).launches
        if not launches:
            raise self._directory.refusal(target, principal)
        launch = min(launches, key=lambda one: one.busyness) if len(launches) > 1 else launches[0]
        assert launch.instance is not None  # noqa: S101 - what a lane's launches mean
        return launch.instance

    def adverts(self) -> list[Advert]:
        return [launch.advert for launch in self._directory.launches.values()]

    def serves(self, model: str) -> bool:
        """Whether that is a name under which requests are counted."""
        return self._directory.shelf(model) is not None

    def model_of(self, request_id: int) -> str:
        """The served model a request counts under."""
        return self._requests[request_id].lane.shelf.name

    def is_served(self, request_id: int) -> bool:
        """Whether any launch may serve a request that waits."""
        return bool(self._requests[request_id].lane.launches)

    def demand(self) -> dict[str, Demand]:
        """Who waits by model name, of those who wait for a model and not for one launch."""
        return self._directory.demand()

    def last_ends(self, launch_id: str) -> Mapping[RequestClass, float]:
        """When a request ended there last, by class; classes of which none did are left out."""
        launch = self._directory.launches.get(launch_id)
        return {} if launch is None else dict(launch.ended_at)

    def is_retired(self, launch_id: str) -> bool:
        launch = self._directory.launches.get(launch_id)
        return launch is not None and launch.retired

    def load(self, launch_id: str) -> LoadReport:
        """In flight on one launch; queued for it by id or under any model name it serves."""
        return self._directory.load(launch_id)

    def queues(self) -> dict[str, LoadReport]:
        """Running and waiting by served model, for all models that are announced."""
        return self._directory.queues()

    def budgets(self, now: float) -> dict[str, BudgetReport]:
        """The batch budgets of the launches that can be routed to."""
        launches = self._directory.launches.items()
        return {key: launch.budget.report(now) for key, launch in launches if launch.instance is not None}

    def rate(self, principal: Principal, now: float) -> RateState | None:
        return self.limits.rate(principal, now)
