"""The catalogue's file as a form: which keys there are, of which type, and what they become. PURE.

Invariant: every key is named here once; the JSON schema in ``config/`` is made from it. What the keys say together
(names that clash, arguments no engine takes) is judged elsewhere (``parsing``); no file is read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from vllm_bootstrap.models.types import AdapterEntry, GpuNeed, Group, ModelEntry, Origin, Rewrite

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?) ?([smhd]?)")
_PREFIXES = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY = {"Ki": 1024, "Mi": 1024**2, "Gi": 1024**3, "Ti": 1024**4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT]i?)?B)?")
MAX_NAME = 256
MAX_PARALLEL = 65_536


def seconds(value: object) -> float:
    """A duration: seconds, or a number with s, m, h or d behind it. Raises ``ValueError``."""
    if isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())):
        return float(match[1]) * _UNITS[match[2] or "s"]
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return float(value)
    raise ValueError('must be seconds, or text such as "15m" or "2h"')


def size(value: object) -> int:
    """A size: bytes, or a number with B, KB, KiB … TiB behind it. Raises ``ValueError``."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        unit = match[2] or ""
        return int(float(match[1]) * (_BINARY[unit] if unit in _BINARY else _PREFIXES[unit]))
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError('must be bytes, or text such as "40GiB"')


def _count_or_each(value: object) -> object:
    if value == "per_gpu" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("must be a whole number from 1, or per_gpu")


def _length(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("must be a whole number from 1, or auto")


def _device(value: object) -> object:
    if isinstance(value, str | int) and not isinstance(value, bool):
        return value
    raise ValueError("must be the index of a GPU or its UUID")


def _level(value: object) -> int:
    if value is False:  # YAML reads off and no as false
        return 0
    if isinstance(value, int) and value is not True and value in {0, 1, 2}:
        return value
    raise ValueError("must be 0 (unload instead), 1 or 2")


def _json_object(value: object) -> object:
    if not isinstance(value, Mapping):
        raise ValueError("must hold fields of a request's body with their values")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("must hold only what JSON can: no infinite or undefined numbers") from None
    return dict(value)


Duration = Annotated[float, PlainValidator(seconds), WithJsonSchema(
    {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)? ?[smhd]?$"}]}
)]  # fmt: skip
Size = Annotated[int, PlainValidator(size), WithJsonSchema(
    {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)? ?([KMGT]i?)?B?$"}]}
)]  # fmt: skip
Replicas = Annotated[int | str, PlainValidator(_count_or_each), WithJsonSchema(
    {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "per_gpu"}]}
)]  # fmt: skip
Length = Annotated[int | str, PlainValidator(_length), WithJsonSchema(
    {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}
)]  # fmt: skip
Device = Annotated[int | str, PlainValidator(_device), WithJsonSchema({"type": ["integer", "string"]})]
SleepLevel = Annotated[Literal[0, 1, 2], PlainValidator(_level), WithJsonSchema({"enum": [0, 1, 2, False]})]
RequestFields = Annotated[dict[str, Any], PlainValidator(_json_object), WithJsonSchema({"type": "object"})]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Gpus = Annotated[int, Field(ge=1, le=64)]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class GpusForm(_Form):
    """Which GPUs the model needs."""

    count: Gpus | None = Field(None, description="How many GPUs. Left out: as few as it fits on, else one.")
    ids: Annotated[list[Device], Field(min_length=1, max_length=64)] | None = Field(
        None, description="Only these GPUs: indices or UUIDs."
    )
    min_memory: Size | None = Field(None, description='What each GPU must have in all: bytes, or text such as "40GiB".')
    share: Share | None = Field(None, description="The part of each GPU that it takes; several models may share one.")


class AdapterForm(_Form):
    """A LoRA adapter that is served as a model of its own, by its base model's engine."""

    source: Name = Field(description="Repository id, or absolute path of a folder.")
    aliases: list[Name] = Field(default=[], description="Further names of it.")


class ArgsForm(_Form):
    """Typed fields of a launch."""

    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] | None = None
    max_model_len: Length | None = None
    gpu_memory_utilization: Share | None = None
    kv_cache_memory_bytes: Size | None = None
    max_num_seqs: Annotated[int, Field(ge=1, le=16384)] | None = None
    max_num_batched_tokens: Positive | None = None
    quantization: Name | None = None
    kv_cache_dtype: Name | None = None
    tokenizer: Name | None = None
    seed: int | None = None
    enforce_eager: bool | None = None
    enable_prefix_caching: bool | None = None
    trust_remote_code: bool | None = None
    tensor_parallel_size: Gpus | None = None
    pipeline_parallel_size: Gpus | None = None


class CommonForm(_Form):
    """What ``defaults`` can say for all models."""

    revision: Name | None = Field(None, description="Branch, tag or commit of the repository.")
    engine: Name | None = Field(None, description="vllm, simulator, or an engine of the engines file.")
    args: ArgsForm = Field(default=ArgsForm(), description="Typed fields of a launch.")
    extra_args: dict[str, Any] = Field(default={}, description="Further options of the engine, as in a launch.")
    env: dict[str, str] = Field(default={}, description="Environment variables of the engine, as in a launch.")
    gpus: GpusForm = Field(default=GpusForm(), description="Which GPUs it needs.")
    replicas: Replicas = Field(1, description="How many engines at once, or per_gpu.")
    restart: Literal["never", "on-failure"] = Field("on-failure", description="What happens when its engine dies.")
    ttl: Duration | None = Field(
        None, description="Unload it after so long without a request, 0: never. Left out: what the daemon does."
    )
    pin: bool = Field(False, description="Never unload it to make room, nor for being idle.")
    preload: bool = Field(False, description="Load it when the daemon starts.")
    priority: Annotated[int, Field(ge=-100, le=100)] = Field(0, description="Higher stays longer and is loaded first.")
    max_parallel: Annotated[int, Field(ge=1, le=MAX_PARALLEL)] | None = Field(
        None, description="At most so many sequences at once on each engine."
    )
    sleep: SleepLevel = Field(0, description="Put it to sleep at this level instead of unloading it, 0: unload.")
    show_loading: bool = Field(False, description="Show a streaming chat how the load goes on, as comments.")
    defaults: RequestFields = Field(default={}, description="Fields of a request's body where the client sent none.")
    strip: list[Name] = Field(default=[], description="Fields of a request's body that are taken out.")
    description: Annotated[str, Field(max_length=2000)] | None = Field(None, description="For people.")


class ModelForm(CommonForm):
    """One model."""

    source: Name = Field(description="Repository id, or absolute path of a folder.")
    aliases: list[Name] = Field(default=[], description="Further names of it.")
    adapters: dict[Name, AdapterForm] = Field(
        default={}, description="LoRA adapters, by the name they are served under."
    )


class GroupForm(_Form):
    """Models that may, or may not, be loaded at the same time."""

    members: Annotated[list[Name], Field(min_length=1)] = Field(description="Names of models.")
    together: bool = Field(True, description="False: at most one of them is loaded at a time.")
    exclusive: bool = Field(False, description="While one of them is loaded, no model outside of the group is.")


class CatalogueForm(_Form):
    """Models that this daemon serves by name. See docs/models.md."""

    models: dict[Name, ModelForm] = Field(default={}, description="Models by the name that requests use.")
    groups: dict[Name, GroupForm] = Field(default={}, description="Groups of models.")
    defaults: CommonForm = Field(default=CommonForm(), description="What holds for every model that says nothing else.")


def json_schema() -> dict[str, Any]:
    """The JSON schema of the catalogue's file, for editors."""
    made = CatalogueForm.model_json_schema()
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, **made, "title": "vllm-bootstrap catalogue of models"}


def entry_of(name: str, form: ModelForm, origin: Origin) -> ModelEntry:
    """The model that a form describes."""
    return ModelEntry(
        name=name,
        source=form.source,
        origin=origin,
        revision=form.revision,
        aliases=tuple(form.aliases),
        engine=form.engine,
        args=form.args.model_dump(exclude_none=True),
        extra_args=form.extra_args,
        env=form.env,
        gpus=_need(form.gpus),
        replicas=form.replicas,  # type: ignore[arg-type]  # checked: a number or per_gpu
        restart=form.restart,
        ttl_s=form.ttl,
        pin=form.pin,
        preload=form.preload,
        priority=form.priority,
        max_parallel=form.max_parallel,
        sleep=form.sleep,
        show_loading=form.show_loading,
        rewrite=Rewrite(form.defaults, frozenset(form.strip)),
        adapters=tuple(AdapterEntry(n, a.source, tuple(a.aliases)) for n, a in form.adapters.items()),
        description=form.description,
    )


def group_of(name: str, form: GroupForm) -> Group:
    """The group that a form describes."""
    return Group(name, frozenset(form.members), together=form.together, exclusive=form.exclusive)


def _need(form: GpusForm) -> GpuNeed:
    ids = None if form.ids is None else tuple(form.ids)
    return GpuNeed(count=form.count, ids=ids, min_memory=form.min_memory, share=form.share)
