"""The example env files show every setting with its true default, and nothing that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import AliasChoices

from vllm_bootstrap.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
# What reads names of .env that are not the daemon's.
AROUND = ["docker-compose.yml", "scripts/run_image.sh", "scripts/build_image.sh", "scripts/container_setup.py"]


def pairs(name: str, *, commented: bool) -> dict[str, str]:
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        text = line.removeprefix("#") if commented else line
        key, is_pair, value = text.partition("=")
        if is_pair and not key.startswith(("#", " ")):
            found[key] = value
    return found


def names_of(field: str) -> set[str]:
    alias = Settings.model_fields[field].validation_alias
    choices = alias.choices if isinstance(alias, AliasChoices) else []
    return {str(choice) for choice in choices} | {PREFIX + field.upper()}


@pytest.mark.parametrize("field", sorted(Settings.model_fields))
def test_every_setting_is_shown_once_with_its_default(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {key: value for key, value in pairs(".env.example", commented=True).items() if key in names_of(field)}
    assert len(shown) == 1, f"{field} is shown as {sorted(shown)}"
    defaults = Settings.model_construct().model_dump()
    for key, value in shown.items():
        monkeypatch.setenv(key, value)
    assert Settings().model_dump()[field] == defaults[field]


def test_nothing_else_is_shown() -> None:
    known = set().union(*(names_of(field) for field in Settings.model_fields))
    assert set(pairs(".env.example", commented=True)) <= known
    used_around_containers = set(re.findall(r"[A-Z][A-Z_]+", "".join((ROOT / name).read_text() for name in AROUND)))
    assert set(pairs(".env.vllm.example", commented=True)) <= known | used_around_containers


def test_the_vllm_example_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    values = pairs(".env.vllm.example", commented=False)
    for key, value in values.items():
        monkeypatch.setenv(key, value)
    settings = Settings()
    assert settings.host == "0.0.0.0"
    assert (values["VLLM_ACCESS_KEY"], settings.access_key) == ("", None), "a key that everybody can read is none"
