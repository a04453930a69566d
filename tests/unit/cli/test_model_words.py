from vllm_bootstrap.cli import model_progress, model_words
from vllm_bootstrap.wire import Progress
from vllm_bootstrap.wire_models import ModelEntry, ModelFiles, ModelStatus


def test_what_lies_on_the_disk_in_one_line():
    def said(**fields):
        return model_words.files(ModelFiles(model="m", source="s", **fields))

    assert said(bytes=0) == "nothing on the disk"
    assert said(bytes=0, incomplete_bytes=5, complete=False) == "0 B on the disk, incomplete"
    assert said(bytes=2048, cached_bytes=1024, complete=True) == "2.0 KiB on the disk, 1.0 KiB of it in memory"


def test_how_far_a_load_is_goes_by_earlier_ones_where_nothing_else_is_known():
    status = ModelStatus(
        name="m", state="loading", origin="file", entry=ModelEntry(source="s"), load_est_s=40.0,
        progress=Progress(phase="load", elapsed_s=10.0),
    )  # fmt: skip
    look = model_progress.of_load(status)
    assert (look.doing, look.fraction, look.rest) == ("loading the model", 0.25, "10 s, about 30 s left")


def test_a_load_that_has_not_begun_waits():
    for state in ("unloaded", "asleep"):
        status = ModelStatus(name="m", state=state, why="Waits for room.", origin="file", entry=ModelEntry(source="s"))
        look = model_progress.of_load(status)
        assert (look.doing, look.fraction, look.rest) == ("waiting", None, "Waits for room.")
