"""Fit before launch, for models of the catalogue and for launches: facts, GPUs and wishes brought together.

Invariant: a launch is refused only where ``fit`` is sure; whatever cannot be told (a model that is not on this machine,
an engine that is not vLLM's kind, arguments that change what is needed) lets it go on. Files are read in threads, and
what they said is kept until the model's folder changes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from vllm_bootstrap.engines import vllm_command
from vllm_bootstrap.engines.base import Gpu, LaunchSpec, Placement
from vllm_bootstrap.errors import DoesNotFit
from vllm_bootstrap.gpus.inventory import Inventory, Snapshot
from vllm_bootstrap.launches.types import LaunchOrder
from vllm_bootstrap.models import advice, facts, orders
from vllm_bootstrap.models.advice import Case
from vllm_bootstrap.models.facts import ModelFacts
from vllm_bootstrap.models.fit import Room, Wish
from vllm_bootstrap.models.shape import read_shape
from vllm_bootstrap.models.types import FitReport, ModelEntry

log = logging.getLogger(__name__)

JUDGED_KINDS = {"cuda", "mock"}
WHOLE_MILLI = 1000
IN_THE_WAY_RETRY_S = 10
"""Where only what others use just now is in the way."""
READING_PATIENCE_S = 5.0
REMEMBERED = 64
# Arguments beside the typed ones that change what is needed in ways that are not reckoned with here.
_UNRECKONED = frozenset({
    "cpu-offload-gb", "kv-offloading-size", "hf-overrides", "data-parallel-size", "decode-context-parallel-size",
    "prefill-context-parallel-size", "load-format", "speculative-config", "hf-config-path", "config-format",
    "num-gpu-blocks-override", "cpu-offload-params", "offload-backend", "model-impl", "convert", "runner",
})  # fmt: skip


class Fitter:
    """See the module. ``hf_home`` and ``hf_token`` are the engines'; ``refusing`` False judges, but refuses nothing;
    ``endpoint`` is the hub's address, None for the usual one. Single event loop."""

    def __init__(
        self,
        inventory: Inventory,
        *,
        hf_home: Path | None = None,
        hf_token: str | None = None,
        refusing: bool = True,
        endpoint: str | None = None,
    ) -> None:
        self._inventory, self._hf_home, self._hf_token = inventory, hf_home, hf_token
        self._refusing, self._endpoint = refusing, endpoint
        self._known: OrderedDict[tuple[str, int, int], ModelFacts] = OrderedDict()

    async def check(
        self,
        entry: ModelEntry,
        *,
        gpu_count: int | None = None,
        max_model_len: int | None = None,
        online: bool = False,
    ) -> FitReport:
        """Whether the model would fit on GPUs of this machine that nobody uses; ``free_bytes`` says what they have
        free now. ``gpu_count`` None: as the entry says, else the fewest it fits on. ``online``: ask the hub where
        nothing is here, which takes up to 20 s.

        Raises ``BadRequest`` when the entry asks for more of a GPU than its share.
        """
        known = await self._facts(entry.source, entry.revision, online=online)
        snapshot = await self._large_enough(entry)
        if (why := _unjudged(snapshot.kind, snapshot.unknown)) is not None:
            return FitReport(None, f"Cannot be told: {why}.")
        order = orders.order_of(entry)
        if max_model_len is not None:
            order = replace(order, fields={**order.fields, "max_model_len": max_model_len})
        if gpu_count is None:
            gpu_count = _said(order) or self._smallest(order, known, snapshot) or 1
        elif gpu_count != _said(order):
            order = replace(order, gpu_ids=None, tensor_parallel_size=None)
        return self._on(order, known, snapshot, gpu_count)

    async def smallest(self, entry: ModelEntry) -> int | None:
        """The fewest GPUs of this machine the model is sure to fit on, None when that cannot be told or it fits on
        none. Asks nobody but this machine."""
        known = await self._facts(entry.source, entry.revision)
        snapshot = await self._large_enough(entry)
        if _unjudged(snapshot.kind, snapshot.unknown) is not None:
            return None
        return self._smallest(orders.order_of(entry), known, snapshot)

    async def refuse(self, spec: LaunchSpec, placement: Placement) -> None:
        """Raise ``DoesNotFit`` for a launch that needs more than it may use of its GPUs, or than is free there (then
        it says when to try again)."""
        if not self._refusing or placement.kind not in JUDGED_KINDS or not placement.gpus:
            return
        try:
            async with asyncio.timeout(READING_PATIENCE_S):
                known = await self._facts(spec.model, spec.fields.get("revision"))
        except TimeoutError:
            log.warning("the files of %s answer too slowly to judge whether it fits", spec.model)
            return
        snapshot = await self._inventory.snapshot()
        room = Room(min(gpu.total_bytes for gpu in placement.gpus), _free(snapshot, placement.gpus))
        found = _report(spec, placement, known, room, len(snapshot.gpus))
        if found.fits is False:
            alone = _report(spec, placement, known, Room(room.total_bytes), len(snapshot.gpus))
            raise DoesNotFit(
                _message(spec.model, found),
                param=_param(found),
                details=_details(found),
                retry_after=None if alone.fits is False else IN_THE_WAY_RETRY_S,
            )
        log.debug("fit of %s: %s", spec.model, found.why)

    # -- inside -------------------------------------------------------------------------------------------------

    async def _large_enough(self, entry: ModelEntry) -> Snapshot:
        """The GPUs that the entry may run on."""
        snapshot = await self._inventory.snapshot()
        least = entry.gpus.min_memory or 0
        return replace(snapshot, gpus=tuple(one for one in snapshot.gpus if one.gpu.total_bytes >= least))

    def _smallest(self, order: LaunchOrder, known: ModelFacts, snapshot: Snapshot) -> int | None:
        """The fewest GPUs, of those that divide the heads, on which the answer is yes."""
        heads = read_shape(known.config).heads if known.config is not None else 0
        tries = advice.counts(len(snapshot.gpus), heads, order.pipeline_parallel_size or 1)
        open_order = replace(order, gpu_ids=None, gpu_count=None, tensor_parallel_size=None)
        return next((n for n in tries if self._on(open_order, known, snapshot, n).fits), None)

    def _on(self, order: LaunchOrder, known: ModelFacts, snapshot: Snapshot, count: int) -> FitReport:
        gpus = _chosen(order, snapshot, count)
        if not gpus:
            return FitReport(False, f"{count} GPUs are wanted, {len(snapshot.gpus)} are here.", gpu_count=count)
        pipeline = order.pipeline_parallel_size or 1
        share = WHOLE_MILLI if order.gpu_share is None else max(1, round(order.gpu_share * WHOLE_MILLI))
        tensor = order.tensor_parallel_size or max(1, count // pipeline)
        placement = Placement(snapshot.kind, gpus, share, tensor, pipeline)
        spec = LaunchSpec(
            order.model, order.engine or "vllm", order.served_model_name or order.model,
            fields={name: value for name, value in order.fields.items() if value is not None},
            extra_args=order.extra_args,
        )  # fmt: skip
        room = Room(min(gpu.total_bytes for gpu in gpus))
        return replace(
            _report(spec, placement, known, room, len(snapshot.gpus)), free_bytes=_free(snapshot, gpus), gpu_count=count
        )

    async def _facts(self, source: str, revision: str | None, *, online: bool = False) -> ModelFacts:
        where = await asyncio.to_thread(facts.stamp, source, self._hf_home, revision)
        known = self._known.get(where) if where is not None else None
        if known is None:
            known = await asyncio.to_thread(facts.read_local, source, self._hf_home, revision)
            if where is not None and known.why is None:  # what is incomplete may change without its folder's knowing
                self._known[where] = known
                while len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
        if known.weights is not None or not online:
            return known
        remote = await facts.read_remote(source, revision, token=self._hf_token, endpoint=self._endpoint)
        return known if remote.config is None and known.config is not None else remote


def _unjudged(kind: str, unknown: str | None) -> str | None:
    if unknown is not None:
        return unknown
    return None if kind in JUDGED_KINDS else "there is no GPU here"


def _said(order: LaunchOrder) -> int | None:
    """The number of GPUs that the order itself names."""
    if order.gpu_ids is not None:
        return len(order.gpu_ids)
    if order.gpu_count is not None:
        return order.gpu_count
    if order.tensor_parallel_size is not None:
        return order.tensor_parallel_size * (order.pipeline_parallel_size or 1)
    return None


def _chosen(order: LaunchOrder, snapshot: Snapshot, count: int) -> tuple[Gpu, ...]:
    """The GPUs to judge for: those named, else the largest; none when there are too few."""
    gpus = [reading.gpu for reading in snapshot.gpus]
    if order.gpu_ids is not None:
        wanted = {str(one).lower() for one in order.gpu_ids}
        gpus = [gpu for gpu in gpus if str(gpu.index) in wanted or gpu.uuid.lower() in wanted]
    largest = sorted(gpus, key=lambda gpu: (-gpu.total_bytes, gpu.index))
    return tuple(largest[:count]) if len(largest) >= count else ()


def _free(snapshot: Snapshot, gpus: Sequence[Gpu]) -> int | None:
    """Bytes free on the fullest of ``gpus`` now, None where a reading does not say."""
    found = []
    for gpu in gpus:
        reading = snapshot.reading(gpu.uuid)
        if reading is None or reading.unknown is not None or reading.used_bytes is None:
            return None
        found.append(max(0, gpu.total_bytes - reading.used_bytes))
    return min(found, default=None)


def _report(spec: LaunchSpec, placement: Placement, known: ModelFacts, room: Room, gpus_here: int) -> FitReport:
    if known.config is None:
        return FitReport(None, f"Cannot be told: {known.why}.")
    if unreckoned := sorted(_UNRECKONED & {name.replace("_", "-") for name in spec.extra_args}):
        return FitReport(None, f"Cannot be told: {', '.join(unreckoned)} changes what is needed.")
    wish = wish_of(spec, placement)
    share = placement.share_milli / WHOLE_MILLI
    case = Case(
        read_shape(known.config), known.weights, wish, room, gpus_here, share, vllm_command.WHOLE_GPU_FRACTION
    )  # fmt: skip
    found = advice.report(case)
    if known.weights is None and known.why is not None and found.fits is None:
        return replace(found, why=f"Cannot be told: {known.why}.")
    return found


def wish_of(spec: LaunchSpec, placement: Placement) -> Wish:
    """What a launch asks for, with what the engine's command line will say. Raises ``BadRequest`` when it asks for more
    of a GPU than its share."""
    fields = spec.fields
    dtype = vllm_command.dtype(spec, placement)
    return Wish(
        dtype=None if dtype == "auto" else dtype,
        quantization=fields.get("quantization"),
        max_model_len=fields.get("max_model_len"),
        max_num_seqs=vllm_command.slots(spec),
        max_num_batched_tokens=fields.get("max_num_batched_tokens"),
        kv_cache_dtype=fields.get("kv_cache_dtype"),
        cache_bytes=fields.get("kv_cache_memory_bytes"),
        enforce_eager=bool(fields.get("enforce_eager")),
        fraction=vllm_command.memory_fraction(spec, placement),
        tensor=placement.tensor_parallel_size,
        pipeline=placement.pipeline_parallel_size,
    )


def _message(model: str, found: FitReport) -> str:
    said = " ".join(str(one["message"]) for one in found.suggestions)
    return f"{model} does not fit. {found.why}{f' {said}' if said else ''}"


def _param(found: FitReport) -> str | None:
    return next((str(one["field"]) for one in found.suggestions if "field" in one), None)


def _details(found: FitReport) -> dict[str, object]:
    figures = asdict(found)
    suggested = figures.pop("suggestions")
    return {"fit": figures, "suggestions": [dict(one) for one in suggested]}
