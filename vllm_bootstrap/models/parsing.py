"""A catalogue out of the values of its file, or every reason why not. PURE.

Invariant: a catalogue with any mistake gives no catalogue. Each reason names the place as it stands in the file
(``models.qwen.gpus.count``) and says what to write instead. Whether a launch may have a model's arguments is asked of
``check``, with the same rules as for a launch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from vllm_bootstrap.errors import BadRequest
from vllm_bootstrap.models import names
from vllm_bootstrap.models.schema import (
    AdapterForm,
    ArgsForm,
    CatalogueForm,
    CommonForm,
    GpusForm,
    GroupForm,
    ModelForm,
    entry_of,
    group_of,
)
from vllm_bootstrap.models.types import NEVER_REWRITTEN, Catalogue, ModelEntry, Origin
from vllm_bootstrap.refused import refuse_fields

Check = Callable[[ModelEntry], None]
"""Refuses a model of which no launch could be made: raises ``BadRequest`` whose ``param`` is a launch's field."""

MAX_SHOWN = 10
_KWARGS = "chat_template_kwargs"  # could smuggle in what may not be set
_SHOULD = re.compile(r"^(?:Input|String|Value|List|Dictionary) should")
_INSTANCE = re.compile(r"must be a valid (?:dictionary|mapping).*")
_FORMS: Mapping[str, Any] = {
    "gpus": GpusForm, "args": ArgsForm, "adapters": AdapterForm, "groups": GroupForm, "models": ModelForm,
    "defaults": CommonForm,
}  # fmt: skip
# Where a launch's field stands in the catalogue.
_PLACES = {
    "model": "source", "served_model_name": "", "gpu_ids": "gpus.ids", "gpu_count": "gpus.count",
    "gpu_share": "gpus.share", "gpus.count": "gpus.count",
}  # fmt: skip
_OUTSIDE_ARGS = frozenset({"revision", "engine", "aliases", "max_parallel", "replicas", "sleep"})
_NESTED = ("extra_args", "env", "adapters")


class CatalogueError(ValueError):
    """The catalogue cannot be used. ``problems`` are pairs of place and reason."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        shown = [f"{place}: {reason}" if place else reason for place, reason in problems[:MAX_SHOWN]]
        if len(problems) > MAX_SHOWN:
            shown.append(f"and {len(problems) - MAX_SHOWN} more")
        super().__init__("\n".join(shown))
        self.problems = tuple(problems)


def parse(raw: object, check: Check, fixed: Sequence[ModelEntry] = ()) -> Catalogue:
    """The catalogue that a file's values describe, ``fixed`` (models that come from elsewhere) included.

    Raises ``CatalogueError`` with every problem that was found.
    """
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise CatalogueError([("", "the file must hold 'models:' with the models' names and what they are below it")])
    said = {key: value for key, value in raw.items() if value is not None}
    given, common = said.pop("models", {}), said.get("defaults", {})
    if not isinstance(given, Mapping):
        raise CatalogueError([("models", "must hold the models' names and what they are below it")])
    frame, problems = _frame(said)
    found = list(fixed)
    for name, body in given.items() if frame is not None else ():
        try:
            found.append(parse_entry(name, _merged(common, body), "file", check))
        except CatalogueError as exc:
            problems += [(f"models.{name}{'.' if place else ''}{place}", reason) for place, reason in exc.problems]
    problems += clashes(found)
    if frame is None or problems:
        raise CatalogueError(problems)
    groups = tuple(group_of(name, form) for name, form in frame.groups.items())
    known = {entry.name for entry in found}
    for group in groups:
        problems += [
            (f"groups.{group.name}.members", f"there is no model {member!r}{_near(member, known)}")
            for member in sorted(group.members - known)
        ]
    if problems:
        raise CatalogueError(problems)
    return Catalogue({entry.name: entry for entry in found}, groups)


def parse_entry(name: str, body: object, origin: Origin, check: Check) -> ModelEntry:
    """One model out of the values below its name. Raises ``CatalogueError`` with places below the model."""
    if not isinstance(body, Mapping):
        raise CatalogueError([("", "must hold at least 'source:' with a repository id or an absolute path")])
    try:
        form = ModelForm.model_validate({key: value for key, value in body.items() if value is not None})
    except ValidationError as exc:
        raise CatalogueError(_problems(exc, ModelForm)) from None
    entry = entry_of(name, form, origin)
    problems = list(_contradictions(entry))
    if problems:
        raise CatalogueError(problems)
    try:
        check(entry)
    except BadRequest as exc:
        raise CatalogueError([(_place(exc.param), _plain(exc))]) from None
    return entry


def names_of(entry: ModelEntry) -> Iterator[tuple[str, str]]:
    """Each name under which a model or one of its adapters is used, with its place in the file."""
    yield f"models.{entry.name}", entry.name
    for alias in entry.aliases:
        yield f"models.{entry.name}.aliases", alias
    for adapter in entry.adapters:
        place = f"models.{entry.name}.adapters.{adapter.name}"
        yield place, adapter.name
        for alias in adapter.aliases:
            yield f"{place}.aliases", alias


def clashes(entries: Iterable[ModelEntry]) -> list[tuple[str, str]]:
    """Names that are used twice, with their places."""
    found, seen = [], dict[str, str]()
    for entry in entries:
        for place, name in names_of(entry):
            if name in seen:
                found.append((place, f"the name {name!r} is used at {seen[name]} already: each name may be used once"))
            else:
                seen[name] = place
    return found


def _frame(raw: Mapping[str, Any]) -> tuple[CatalogueForm | None, list[tuple[str, str]]]:
    try:
        return CatalogueForm.model_validate(raw), []
    except ValidationError as exc:
        return None, _problems(exc, CatalogueForm)


def _merged(common: Mapping[str, Any], own: object) -> object:
    """A model's values with what holds for all below them: mappings key by key, everything else whole."""
    if not isinstance(own, Mapping):
        return own
    made = dict(common)
    for key, value in own.items():
        beneath = common.get(key)
        if not (isinstance(value, Mapping) and isinstance(beneath, Mapping)):
            made[key] = value
            continue
        inner = made[key] = {**beneath, **value}
        if key == "gpus" and "ids" in value and "count" not in value:
            inner.pop("count", None)  # its own list says how many
    return made


def _contradictions(entry: ModelEntry) -> Iterator[tuple[str, str]]:
    for name in entry.served_names:
        if (wrong := names.problem(name)) is not None:
            yield "", f"the name {name!r} {wrong}"
    gpus = entry.gpus
    alone = entry.replicas == 1  # else the count is of each, and the list of all
    if alone and gpus.ids is not None and gpus.count is not None and gpus.count != len(gpus.ids):
        yield "gpus.count", f"gpus.ids names {len(gpus.ids)}: leave count out"
    for key, named in (("strip", entry.rewrite.strip), ("defaults", entry.rewrite.defaults.keys())):
        if fixed := sorted(NEVER_REWRITTEN.intersection(named)):
            yield key, f"{fixed[0]} is not for the catalogue to change"
    try:
        refuse_fields({_KWARGS: entry.rewrite.defaults.get(_KWARGS)})
    except BadRequest as exc:
        yield "defaults", exc.message


def _problems(exc: ValidationError, form: Any) -> list[tuple[str, str]]:
    found = []
    for problem in exc.errors(include_url=False, include_input=False):
        loc = [str(part) for part in problem["loc"] if part != "[key]"]
        found.append((".".join(loc), _said(problem["type"], problem["msg"], loc, form)))
    return found


def _said(kind: str, message: str, loc: Sequence[str], form: Any) -> str:
    if kind == "missing":
        return "is missing: name a Hugging Face repository or an absolute path" if loc[-1] == "source" else "is missing"
    if kind == "extra_forbidden":
        for part in loc[:-1]:
            form = _FORMS.get(part, form)
        hint = _near(loc[-1], form.model_fields)
        if form is ArgsForm and not hint:
            hint = ": options that are no typed fields belong below extra_args"
            hint = ": it stands beside args" if loc[-1] == "revision" else hint
        return f"there is no such key{hint}"
    said = _SHOULD.sub("must", message.removeprefix("Value error, "))
    return _INSTANCE.sub("must hold keys with values below it", said)


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""


def _place(param: str | None) -> str:
    if param is None:
        return ""
    if param in _PLACES or param in _OUTSIDE_ARGS or param.split(".", 1)[0] in _NESTED:
        return _PLACES.get(param, param)
    return f"args.{param}"


def _plain(exc: BadRequest) -> str:
    """The reason without the field's name in front, which the place tells already."""
    return exc.message.removeprefix(f"{exc.param} ") if exc.param else exc.message
