"""A whole daemon with a catalogue, for acceptance tests of models: its file, its keys, its models as readers see
them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import openai

from tests.support.daemon import ENDED, Answer, DaemonProcess
from tests.support.waiting import wait_for

QUICK = {"model_min_loaded_s": "0.3", "model_max_wait_s": "1"}
"""How long models stay, short."""

MODEL_LABEL = "vllm-bootstrap.model"


class ModelBox(DaemonProcess):
    """``models`` and ``groups`` as in the catalogue's file. ``keys``: name to the fields of that key, whose token is
    ``k-`` and the name; the box itself talks as ``root``. All else as for ``DaemonProcess``."""

    def __init__(
        self,
        models: Mapping[str, Any] | None = None,
        *,
        groups: Mapping[str, Any] | None = None,
        keys: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**{"use_mock_model": "true", "on_demand": "catalogue", **QUICK, **options})
        self.catalogue = self.root / "models.yaml"
        if models is not None:
            self.write(models, groups)
            self.configure(models_file=self.catalogue)
        if keys is not None:
            self.key = "k-root"
            everybody = {"root": {"scopes": ["admin", "realtime", "batch", "upload"]}, **keys}
            entries = [{"name": name, "token": f"k-{name}", **fields} for name, fields in everybody.items()]
            path = self.root / "keys.json"
            path.write_text(json.dumps({"keys": entries}))
            path.chmod(0o600)
            self.configure(auth_keys_file=path)

    def write(self, models: Mapping[str, Any], groups: Mapping[str, Any] | None = None) -> None:
        """Write the catalogue's file, as editors do: whole or not at all. JSON is YAML."""
        beside = self.catalogue.with_suffix(".new")
        beside.write_text(json.dumps({"models": models, "groups": groups or {}}))
        beside.replace(self.catalogue)

    # -- talking to it -------------------------------------------------------------------------------------------

    def api(self, key: str = "", **options: Any) -> openai.OpenAI:
        """The stock client, which does not repeat by itself."""
        token = f"k-{key}" if key else self.key or "none"
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, **{"max_retries": 0, "timeout": 20, **options})

    def complete(self, model: str, *, key: str | None = None, cold_start: str | None = None, **body: Any) -> Answer:
        """One completion, whole. ``cold_start``: the header."""
        headers = {} if cold_start is None else {"x-cold-start": cold_start}
        asked = {"model": model, "prompt": "one two", "max_tokens": 2, **body}
        token = None if key is None else f"k-{key}"
        return self.request("POST", "/v1/completions", asked, headers, key=token, timeout_s=30)

    def serves(self, model: str, **options: Any) -> str:
        """A completion that must be answered; the launch that did."""
        answer = self.complete(model, **options)
        assert answer.status == 200, answer.body
        assert answer.json()["choices"][0]["text"].split() == ["one", "two"]
        return answer.headers["x-launch-id"]

    def model(self, name: str) -> dict[str, Any]:
        answer = self.request("GET", f"/models/{name}")
        assert answer.status == 200, answer.body
        found: dict[str, Any] = answer.json()
        return found

    def wait_model(self, name: str, *states: str, timeout_s: float = 15.0) -> dict[str, Any]:
        """Wait until the model is in one of these states."""

        def arrived() -> dict[str, Any] | None:
            found = self.model(name)
            return found if found["state"] in states else None

        return wait_for(arrived, timeout_s, 0.03, f"{name} {states}") or {}

    def models(self) -> dict[str, dict[str, Any]]:
        return {one["name"]: one for one in self.request("GET", "/models").json()["data"]}

    def loaded(self) -> set[str]:
        return {name for name, one in self.models().items() if one["state"] == "loaded"}

    def everything(self) -> list[dict[str, Any]]:
        """All launches that are remembered."""
        found: list[dict[str, Any]] = self.request("GET", "/launches?all=true&limit=1000").json()["data"]
        return found

    def launches_of(self, model: str, *, active: bool = True) -> list[dict[str, Any]]:
        return [
            launch
            for launch in self.everything()
            if launch["labels"].get(MODEL_LABEL) == model and not (active and launch["state"] in ENDED)
        ]

    def unload_all(self, *, force: bool = False) -> None:
        """Put everything away that is loaded, and find that nothing is left."""
        suffix = "?force=true" if force else ""
        for name, one in self.models().items():
            if one["launches"]:
                answer = self.request("POST", f"/models/{name}/unload{suffix}", timeout_s=30)
                assert answer.status == 200, answer.body
        self.assert_no_leftovers()


def codes(answers: Sequence[Answer]) -> list[object]:
    """Of each answer its status, or the code of its error."""
    return [answer.status if answer.status == 200 else answer.error["code"] for answer in answers]
