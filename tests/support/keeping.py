"""A keeper of models over real launches (simulator, mock GPUs) and a real gate; the catalogue is a dictionary."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.support.aio import eventually
from tests.support.world import World
from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.launches.types import LaunchOrder
from vllm_bootstrap.models import orders
from vllm_bootstrap.models.keeper import Keeper
from vllm_bootstrap.models.outlook import Outlook
from vllm_bootstrap.models.planning import Policy
from vllm_bootstrap.models.ports import KeeperConfig, KeeperDeps
from vllm_bootstrap.models.types import GpuNeed, Group, ModelEntry
from vllm_bootstrap.scheduler.gate import ByModel, Gate, Lease, Ticket
from vllm_bootstrap.scheduler.ports import NoProspects

QUICK = Policy(min_loaded_s=0.0, max_wait_s=2.0, batch_turn_s=0.5, quiet_s=0.1)


class Shelf:
    """A catalogue as a dictionary."""

    def __init__(self, *entries: ModelEntry, groups: Sequence[Group] = ()) -> None:
        self.models = {entry.name: entry for entry in entries}
        self.together = groups

    def entries(self) -> Mapping[str, ModelEntry]:
        return self.models

    def groups(self) -> Sequence[Group]:
        return self.together

    def find(self, name: str) -> ModelEntry | None:
        return next((entry for entry in self.models.values() if name in entry.served_names), None)

    def adhoc(self, name: str) -> ModelEntry | None:
        return ModelEntry(name, name, origin="request") if name.isidentifier() else None

    def order_of(
        self, entry: ModelEntry, *, gpu_count: int | None = None, gpu_ids: Sequence[int | str] | None = None
    ) -> LaunchOrder:
        return orders.order_of(entry, gpu_count=gpu_count, gpu_ids=gpu_ids)

    def fingerprint(self, entry: ModelEntry) -> str:
        return orders.fingerprint(entry)


def model(name: str, **fields: Any) -> ModelEntry:
    """A model of one mock GPU. ``knobs`` are the simulator's."""
    knobs = fields.pop("knobs", {})
    return ModelEntry(name, f"org/{name}", extra_args=knobs, **{"gpus": GpuNeed(count=1), **fields})


class Told:
    """What the keeper counts."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, ...]] = []

    def loaded(self, name: str, how: str, seconds: float) -> None:
        assert seconds >= 0
        self.notes.append(("loaded", name, how))

    def load_failed(self, name: str, failure_class: str) -> None:
        self.notes.append(("failed", name, failure_class))

    def put_away(self, name: str, how: str, why: str) -> None:
        self.notes.append(("put away", name, how, why))


class Keeping:
    """Enter it: the keeper runs. ``hold_s``: how long requests are held."""

    def __init__(
        self,
        *entries: ModelEntry,
        groups: Sequence[Group] = (),
        policy: Policy = QUICK,
        hold_s: float = 20.0,
        home: Path | None = None,
        world: World | None = None,
        **config: Any,
    ) -> None:
        self.warmed: list[str] = []
        self.book, self.told, self.lines = Shelf(*entries, groups=groups), Told(), dict[str, int]()
        self.world = world or World(home)
        self._hold_s = hold_s
        self._config = {
            "on_demand": "catalogue", "policy": policy, "ttl_s": 0.0, "asleep_ttl_s": 0.0, "backoff_s": 0.2,
            "backoff_max_s": 1.0, "busy_bytes": 2**30, "replicas_max": 8, **config,
        }  # fmt: skip

    async def __aenter__(self) -> Self:
        await self.world.__aenter__()
        world, supervisor = self.world, self.world.supervisor
        self.gate = Gate(hold_s=self._hold_s, prospects=_Late(self), ended=supervisor.has_ended)
        config = KeeperConfig(**self._config)
        deps = KeeperDeps(
            launches=supervisor, queues=self.gate, book=self.book, devices=world.inventory, ledger=world.ledger,
            gpus=world.gpus, smallest=_unknown, estimate=_unknown, batch_lines=lambda: self.lines, tally=self.told,
            tick=time.monotonic, clock=time.time, warm=lambda entry: self.warmed.append(entry.name),
        )  # fmt: skip
        self.keeper = Keeper(config, deps)
        self.outlook = Outlook(config, deps, self.keeper)
        world.on_advert = self._advert
        world.on_forget = self.gate.forget
        for advert in world.adverts.values():
            self.gate.update(advert)
        await self.keeper.start()
        return self

    def _advert(self, advert: Any) -> None:
        self.gate.update(advert)
        self.keeper.advert(advert)

    async def __aexit__(self, *exc: object) -> None:
        await self.keeper.close()
        await self.world.__aexit__(*exc)

    # -- short forms --------------------------------------------------------------------------------------------

    async def acquire(self, name: str, cls: Any = "realtime", **options: Any) -> Lease:
        return await self.gate.acquire(ByModel(name), Ticket("me", cls), **options)

    async def use(self, name: str, cls: Any = "realtime", **options: Any) -> str:
        """One request; the launch that took it."""
        lease = await self.acquire(name, cls, **options)
        lease.release()
        return lease.instance.launch_id

    async def refused(self, name: str, **options: Any) -> ApiError:
        try:
            (await self.acquire(name, **options)).release()
        except ApiError as error:
            return error
        raise AssertionError(f"{name} was served")

    def state(self, name: str) -> str:
        return self.keeper.seen(name).state

    async def until(self, name: str, state: str, timeout: float = 20) -> None:
        await eventually(lambda: self.state(name) == state, timeout)

    def launches_of(self, name: str) -> list[Any]:
        """All there ever were, oldest first."""
        views = self.world.supervisor.list(include_ended=True)
        return sorted((v for v in views if v.labels.get(orders.MODEL_LABEL) == name), key=lambda v: v.launch_id)


class _Late(NoProspects):
    """The outlook, which is made after the gate."""

    def __init__(self, keeping: Keeping) -> None:
        self._keeping = keeping

    def base_of(self, name: str) -> str | None:
        return self._keeping.outlook.base_of(name)

    def refusal(self, name: str) -> ApiError | None:
        return self._keeping.outlook.refusal(name)

    def asked(self, name: str, cls: Any, *, comes_back: bool) -> None:
        self._keeping.outlook.asked(name, cls, comes_back=comes_back)

    def ready_in_s(self, name: str) -> float | None:
        return self._keeping.outlook.ready_in_s(name)

    def waits_for(self, name: str) -> str | None:
        return self._keeping.outlook.waits_for(name)


async def _unknown(_entry: ModelEntry) -> None:
    return None


async def gather(*work: Any) -> list[Any]:
    return list(await asyncio.gather(*work))
