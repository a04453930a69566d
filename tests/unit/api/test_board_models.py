"""What the page shows of the catalogue."""

import pytest

from tests.support.model_desk import OOM, entry
from tests.support.statuses import ID, status
from vllm_bootstrap.api.board_models import MODELS_SHOWN, models_part
from vllm_bootstrap.models.types import ModelLaunch, ModelProgress, ModelView


def row(state="unloaded", *launches, **fields):
    name = fields.pop("name", "org/chat")
    entry_fields = fields.pop("entry", {})
    return models_part([ModelView(entry(name, **entry_fields), state, **fields)], launches, None).rows[0]


def test_what_needs_a_look_comes_first_and_is_counted():
    states = {"a": "unloaded", "b": "loaded", "c": "failed", "d": "loading", "e": "unloaded"}
    part = models_part([ModelView(entry(name), state) for name, state in states.items()], [], "line 3 is broken")
    assert [one.name for one in part.rows] == ["c", "d", "b", "a", "e"]
    assert part.headline == "1 failed · 1 loading · 1 loaded · 2 unloaded"
    assert (part.more, part.note) == ("", "line 3 is broken")


def test_of_very_many_the_last_are_only_counted():
    part = models_part([ModelView(entry(f"m{n:03}"), "unloaded") for n in range(MODELS_SHOWN + 3)], [], None)
    assert (len(part.rows), part.more, part.note) == (MODELS_SHOWN, "and 3 more", "")


@pytest.mark.parametrize(
    ("state", "fields", "said"),
    [
        ("unloaded", {}, ""),
        ("unloaded", {"load_est_s": 42, "wake_est_s": 2}, "loads in 42 s"),
        ("asleep", {"load_est_s": 42, "wake_est_s": 2}, "wakes in 2.0 s"),
        ("asleep", {"load_est_s": 42}, "wakes in 42 s"),
        ("loading", {"waiting": {"realtime": 2, "batch": 1}}, "3 waiting"),
        ("loaded", {"in_flight": 3, "idle_s": 0.0, "load_est_s": 42}, "3 in flight"),
        ("loaded", {"idle_s": 75, "batch_lines": 7, "outdated": True},
         "0 in flight · 7 batch lines · idle 1 m 15 s · changed since it was loaded"),
        ("unloading", {"in_flight": 1}, "1 in flight"),
    ],
)  # fmt: skip
def test_one_line_of_figures(state, fields, said):
    assert row(state, **fields).figures == said


@pytest.mark.parametrize(
    ("state", "buttons"),
    [
        ("unloaded", (True, False)), ("failed", (True, False)), ("asleep", (True, True)), ("loaded", (False, True)),
        ("loading", (False, True)), ("waking", (False, True)), ("unresponsive", (False, True)),
        ("unloading", (False, False)), ("falling_asleep", (False, False)),
    ],
)  # fmt: skip
def test_only_what_can_be_done_is_offered(state, buttons):
    shown = row(state)
    assert (shown.can_load, shown.can_unload) == buttons


def test_where_it_is_comes_from_its_launches():
    here = [ModelLaunch(ID, "ready", 0), ModelLaunch("unknown", "ready", 0)]
    gpus = [{"uuid": f"GPU-{n}", "index": n, "share": 1.0} for n in (1, 3)]
    assert row("loaded", status(gpus=gpus), launches=here, entry={"pin": True}).about == "GPU 1, 3 · pinned"
    assert row("loaded", status(gpus=[{"uuid": "cpu", "share": 1.0}]), launches=here).about == "CPU"
    assert row("loaded", status(gpus=[{"uuid": "GPU-x", "share": 1.0}]), launches=here).about == "GPU GPU-x"
    assert row("unloaded").about == ""


@pytest.mark.parametrize(
    ("progress", "percent", "label"),
    [
        (ModelProgress("weights", 0.25, 12, None), 25, "loading weights 25 % · 12 s"),
        (ModelProgress("weights", 0.25, 12, 4), 75, "loading weights 25 % · 12 s · about 4.0 s left"),
        (ModelProgress("weights", None, 12, 0), 99, "loading weights · 12 s · longer than last time"),
        (ModelProgress(None, None, 0, 0), None, "starting · 0.0 s · longer than last time"),
        (ModelProgress("compile", None, 3, None), None, "compiling · 3.0 s"),
    ],
)
def test_the_bar_goes_by_earlier_loads_where_there_were_any(progress, percent, label):
    assert row("loading", progress=progress).bar == (percent, label)


def test_trouble_has_words_and_a_hint():
    shown = row("failed", trouble=OOM, why="It is tried again in 30 s.")
    assert shown.trouble == ("oom: The weights need more than there is.", "Give it more GPUs.")
    assert (shown.tone, shown.label, shown.why) == ("failed", "failed", "It is tried again in 30 s.")
    assert row("loading", trouble=OOM).trouble is None
    assert row("loaded", progress=ModelProgress("serve", None, 1, None)).bar is None
    assert row("loaded").tone == "ready"
    assert row("asleep").tone == "asleep"
    assert row("falling_asleep").label == "falling asleep"
