"""From a launch order to a ``LaunchSpec``: an allow-list for fields, extra arguments and environment.

Invariant: what leaves here holds only names that were looked up, in their canonical spelling, with values that cannot
become other options. Whether the installed engine has them is asked later (``Engine.check``). Nothing is read from
disk but the flag policy, nothing is executed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vllm_bootstrap.engines import arguments, environment
from vllm_bootstrap.engines.base import Engine, LaunchSpec
from vllm_bootstrap.engines.capabilities import known_flags
from vllm_bootstrap.engines.policy import Policy, policy_of
from vllm_bootstrap.errors import BadRequest, UnknownField
from vllm_bootstrap.launches.types import LaunchOrder

DTYPES = frozenset({"auto", "half", "float16", "bfloat16", "float", "float32"})
MODEL_URL = "model-url"
LORA_MODULES = "lora-modules"
MAX_EXTRA_ARGS = 100
WHOLE_MILLI = 1000
# Where an engine listens and who it lets in is the daemon's, whatever engine it is.
_LISTENING = frozenset({"host", "port", "uds", "api-key", "root-path", "model", "served-model-name"})


def _positive(value: Any, param: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadRequest(f"{param} must be a positive whole number.", param=param)


def _length(value: Any, param: str) -> None:
    if value != "auto":
        _positive(value, param)


def _share(value: Any, param: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise BadRequest(f"{param} must be above 0 and at most 1.", param=param)


def _whole(value: Any, param: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequest(f"{param} must be a whole number.", param=param)


def _flag(value: Any, param: str) -> None:
    if not isinstance(value, bool):
        raise BadRequest(f"{param} must be true or false.", param=param)


def _dtype(value: Any, param: str) -> None:
    if value not in DTYPES:
        raise BadRequest(f"{param} must be one of {', '.join(sorted(DTYPES))}.", param=param)


def _name(value: Any, param: str) -> None:
    if not isinstance(value, str):
        raise BadRequest(f"{param} must be text.", param=param)
    arguments.safe_name(value, param)


FIELDS: Mapping[str, Callable[[Any, str], object]] = {
    "dtype": _dtype,
    "max_model_len": _length,
    "gpu_memory_utilization": _share,
    "kv_cache_memory_bytes": _positive,
    "max_num_seqs": _positive,
    "max_num_batched_tokens": _positive,
    "quantization": arguments.word,
    "kv_cache_dtype": arguments.word,
    "revision": _name,
    "tokenizer": _name,
    "seed": _whole,
    "enforce_eager": _flag,
    "enable_prefix_caching": _flag,
    "trust_remote_code": _flag,
}


def make_spec(order: LaunchOrder, engine: Engine, allow_dangerous: Iterable[str] = ()) -> LaunchSpec:
    """Validate and normalise ``order`` for ``engine``. ``allow_dangerous``: flags and variables the operator allows.

    Raises ``BadRequest`` (``UnknownField`` for names nobody knows) with ``param`` naming the field.
    """
    allowed = frozenset(_operator_names(allow_dangerous))
    arguments.safe_name(order.model, "model")
    _check_model(order.model, "model", allowed)
    served = order.served_model_name if order.served_model_name is not None else order.model
    arguments.safe_name(served, "served_model_name")
    fields = _fields(order.fields, allowed)
    _must_be_within_share(fields, order.gpu_share)
    return LaunchSpec(
        model=order.model,
        engine=engine.name,
        served_model_name=served,
        fields=fields,
        extra_args=_extra_args(order.extra_args, engine, allowed),
        env=_env(order.env, allowed),
        aliases=_aliases(order, served, engine),
        adapters=_adapters(order, served, engine, allowed),
        max_parallel=_max_parallel(order.max_parallel),
        sleep=_sleep(order.sleep, engine),
        folder=order.folder,
    )


def _operator_names(given: Iterable[str]) -> Iterable[str]:
    """Flags in their canonical spelling; variables (upper case) as they are."""
    for name in given:
        yield name if name.isupper() else name.removeprefix("--").replace("_", "-")


def _check_model(model: str, param: str, allowed: frozenset[str]) -> None:
    arguments.no_parent(model, param)
    if model.startswith(("~", "./", ".\\")):
        raise BadRequest(f"{param} must be a repository id or an absolute path.", param=param)
    if "://" in model and MODEL_URL not in allowed:
        raise BadRequest(
            f"{param} must be a repository id or an absolute path. The operator may allow addresses by naming "
            f"{MODEL_URL} in VLLM_BOOTSTRAP_ALLOW_DANGEROUS_ARGS.",
            param=param,
        )


def _aliases(order: LaunchOrder, served: str, engine: Engine) -> tuple[str, ...]:
    if order.aliases:
        _must_serve_more_names(engine, "aliases")
    for alias in order.aliases:
        arguments.safe_name(alias, "aliases")
    if len({served, *order.aliases}) <= len(order.aliases):
        raise BadRequest("aliases holds a name twice, or the model's own.", param="aliases")
    return tuple(order.aliases)


def _adapters(order: LaunchOrder, served: str, engine: Engine, allowed: frozenset[str]) -> dict[str, str]:
    if order.adapters:
        _must_serve_more_names(engine, "adapters")
        if any(arguments.normal_name(key, f"extra_args.{key}") == LORA_MODULES for key in order.extra_args):
            raise BadRequest(
                f"extra_args.{LORA_MODULES} cannot be given together with adapters.", param=f"extra_args.{LORA_MODULES}"
            )
    for name, source in order.adapters.items():
        param = f"adapters.{name}"
        arguments.safe_name(name, param)
        if name == served or name in order.aliases:
            raise BadRequest(f"{param} is a name of the model itself.", param=param)
        arguments.safe_name(source, param)
        _check_model(source, param, allowed)
    return dict(order.adapters)


def _must_serve_more_names(engine: Engine, param: str) -> None:
    if not getattr(engine, "serves_more_names", False):
        raise BadRequest(f"The engine {engine.name!r} serves one name only: it takes no {param}.", param=param)


def _max_parallel(value: int | None) -> int | None:
    if value is not None:
        _positive(value, "max_parallel")
    return value


def _sleep(value: int, engine: Engine) -> int:
    if value not in {0, 1, 2}:
        raise BadRequest("sleep must be 0, 1 or 2.", param="sleep")
    if value and not getattr(engine, "can_sleep", False):
        raise BadRequest(f"The engine {engine.name!r} cannot sleep.", param="sleep")
    return int(value)


def _fields(given: Mapping[str, object], allowed: frozenset[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        check = FIELDS.get(name)
        if check is None:
            raise UnknownField(f"Unknown field {name!r}.", param=name)
        check(value, name)
        if name == "trust_remote_code" and value:
            _must_be_allowed(name.replace("_", "-"), name, allowed)
        found[name] = value
    return found


def _must_be_within_share(fields: Mapping[str, Any], share: float | None) -> None:
    """Wherever it will be placed: its part of each GPU's memory is not more than what it claims of the GPU. A share is
    counted in thousandths."""
    asked = fields.get("gpu_memory_utilization")
    if asked is not None and share is not None:
        refuse_beyond_share(asked, max(1, round(share * WHOLE_MILLI)))


def refuse_beyond_share(asked: float, share_milli: int) -> None:
    """Raise ``BadRequest`` when an engine is to take more of a GPU's memory than its launch claims of the GPU."""
    share = share_milli / WHOLE_MILLI
    if asked > share:
        raise BadRequest(
            f"gpu_memory_utilization {asked:g} is more than gpu_share {share:g}: another launch may own the rest.",
            param="gpu_memory_utilization",
        )


def _must_be_allowed(name: str, param: str, allowed: frozenset[str]) -> None:
    if name not in allowed:
        raise BadRequest(
            f"{param} is refused: it can run code, reach files or open connections. The operator may allow it by "
            f"naming {name} in VLLM_BOOTSTRAP_ALLOW_DANGEROUS_ARGS.",
            param=param,
        )


def _extra_args(given: Mapping[str, object], engine: Engine, allowed: frozenset[str]) -> dict[str, Any]:
    if len(given) > MAX_EXTRA_ARGS:
        raise BadRequest(f"extra_args holds more than {MAX_EXTRA_ARGS} entries.", param="extra_args")
    found: dict[str, Any] = {}
    for key, value in given.items():
        param = f"extra_args.{key}"
        name = arguments.normal_name(key, param)
        if name in found:
            raise BadRequest(f"{param} is given twice in different spellings.", param=param)
        if name in _LISTENING:
            raise BadRequest(f"{param} is set by the daemon.", param=param)
        if getattr(engine, "takes_vllm_flags", False):
            _check_vllm_flag(name, value, param, allowed)
        arguments.check_value(value, param)
        found[name] = value
    return found


def _check_vllm_flag(name: str, value: object, param: str, allowed: frozenset[str]) -> None:
    """1. not a flag → unknown  2. ours → refused  3. has a field → refused  4. guarded → operator  5. word  6. fine."""
    if f"--{name}" not in known_flags():  # 1
        raise UnknownField(f"{param} is not a flag of any known vLLM.{_nearest(name)}", param=param)
    policy = policy_of(name)
    if policy is Policy.OURS:  # 2
        raise BadRequest(f"{param} is set by the daemon.", param=param)
    if policy is Policy.FIELD:  # 3
        raise BadRequest(f"{param}: use the field {name.replace('-', '_')} instead.", param=param)
    if policy is Policy.GUARDED:  # 4
        _must_be_allowed(name, param, allowed)
    elif policy is Policy.WORD:  # 5
        arguments.word(value, param)


def _nearest(name: str) -> str:
    plain = name.removeprefix("no-")
    if plain != name and f"--{plain}" in known_flags():
        return f" To turn {plain} off, give it the value false."
    near = difflib.get_close_matches(f"--{name}", known_flags(), n=1)
    return f" Did you mean {near[0].removeprefix('--')}?" if near else ""


def _env(given: Mapping[str, str], allowed: frozenset[str]) -> dict[str, str]:
    for name, value in given.items():
        param = f"env.{name}"
        verdict = environment.judge(name)
        if verdict is environment.Verdict.NEVER:
            raise BadRequest(f"{param} may not be set by a launch.", param=param)
        if verdict is environment.Verdict.GUARDED and name not in allowed:
            raise BadRequest(
                f"{param} is not on the list of harmless variables. The operator may allow it by naming {name} in "
                "VLLM_BOOTSTRAP_ALLOW_DANGEROUS_ARGS.",
                param=param,
            )
        if not isinstance(value, str):
            raise BadRequest(f"{param} must be text.", param=param)
        arguments.plain_text(value, param)
    return dict(given)
