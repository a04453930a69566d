"""The docs say what there is: every setting with its default, every route, scope, error, failure class and metric."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import update_diagrams
import update_tables
from pydantic import AliasChoices
from pydantic_core import PydanticUndefined

from tests.support.control_plane import make
from vllm_bootstrap.api.app import build_api
from vllm_bootstrap.auth.keyfile import Entry
from vllm_bootstrap.auth.scopes import ALL
from vllm_bootstrap.engines.base import FailureClass
from vllm_bootstrap.engines.simulator.knobs import KNOBS, PROFILES
from vllm_bootstrap.engines.simulator.stepcost import Profile
from vllm_bootstrap.errors import BY_CODE
from vllm_bootstrap.gateway.targets import BY_MODEL
from vllm_bootstrap.settings import PREFIX, Settings
from vllm_bootstrap.wire import LaunchRequest, LaunchStatus, LogPage
from vllm_bootstrap.wire_batches import (
    BatchEventEntry,
    BatchObject,
    BatchProgress,
    BatchRequest,
    ItemObject,
    ItemRequest,
)

DOCS = Path(__file__).resolve().parent.parent / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows(text: str) -> dict[str, list[str]]:
    """Table rows by their first code word."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        word = re.match(r"`([^`]+)`", cells[0]) if cells else None
        if word:
            found[word[1]] = cells
    return found


SETTINGS = rows(page("configuration.md"))


def shown(value: object) -> str:
    """A default as the page writes it."""
    if value is None:
        return "unset"
    if value == ():
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_every_knob_and_profile_field_of_the_simulator_is_documented() -> None:
    text = page("simulator.md")
    table = rows(text)
    for name, knob in KNOBS.items():
        cells = table[name.replace("_", "-")]
        assert cells[1] == shown(knob.default)
        assert all(choice in cells[2] for choice in knob.metadata["choices"])
    assert {name for name in PROFILES if name in table} == set(PROFILES)
    assert all(f"`{field.name}`" in text for field in fields(Profile))


@pytest.mark.parametrize("field", sorted(Settings.model_fields))
def test_every_setting_is_documented_with_its_names_and_default(field: str) -> None:
    info = Settings.model_fields[field]
    cells = SETTINGS[PREFIX + field.upper()]
    alias = info.validation_alias
    established = [str(c) for c in alias.choices[1:]] if isinstance(alias, AliasChoices) else []
    assert re.findall(r"`([^`]+)`", cells[1]) == established
    assert len(cells[3]) > 8, "say what it means"
    if info.default is not PydanticUndefined:  # else it depends on the user and is said in words
        assert cells[2].strip("`") == shown(info.default)


def test_no_setting_is_documented_that_does_not_exist() -> None:
    documented = {name for name in SETTINGS if name.startswith(PREFIX)}
    assert documented == {PREFIX + field.upper() for field in Settings.model_fields}


def test_every_field_of_a_key_is_documented() -> None:
    _, _, section = page("configuration.md").partition("## The key file")
    for name in Entry.model_fields:
        assert f"`{name}`" in section, name


def routes() -> list[str]:
    app = build_api(make())
    found = [f"{entry.method} {entry.path.replace(':path', '')}" for entry in app.state.routes.entries]
    return found + [f"{route.method} {route.path}" for route in BY_MODEL.values()]


@pytest.mark.parametrize("route", routes())
def test_every_route_is_documented(route: str) -> None:
    assert f"`{route}`" in page("api.md")


MAIN_BODIES = [
    LaunchRequest, LaunchStatus, LogPage, BatchRequest, BatchObject, BatchProgress, BatchEventEntry, ItemRequest,
    ItemObject,
]  # fmt: skip


@pytest.mark.parametrize("model", MAIN_BODIES, ids=lambda model: model.__name__)
def test_the_fields_of_the_main_bodies_are_documented(model: type) -> None:
    obvious = {"api_version", "launch_id", "group_id", "node_id", "created_at", "state_changed_at"}
    words = set(re.findall(r"\w+", page("api.md")))
    assert set(model.model_fields) - obvious - words == set()  # type: ignore[attr-defined]


def test_tables_made_from_the_code_are_current() -> None:
    assert update_tables.main(["--check"]) == 0, "run: python scripts/update_tables.py"
    for scope in ALL:
        assert f"| `{scope}` |" in page("api.md")


def test_the_lifecycle_diagram_is_current() -> None:
    assert update_diagrams.main(["--check"]) == 0, "run: python scripts/update_diagrams.py"


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_code_is_documented_with_status_and_type(code: str) -> None:
    cls = BY_CODE[code]
    assert f"| {cls.status} | `{code}` | `{cls.type}` |" in page("api.md")


@pytest.mark.parametrize("failure", [failure.value for failure in FailureClass])
def test_every_failure_class_is_documented(failure: str) -> None:
    assert f"| `{failure}` |" in page("api.md")


@pytest.mark.parametrize("name", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_between_pages_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (DOCS / path).resolve() if path else DOCS / name
        assert file.exists(), f"{name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{name}: {target}"


def anchors(text: str) -> set[str]:
    """Anchors of headings, as forges make them."""
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}
