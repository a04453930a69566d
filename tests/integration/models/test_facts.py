"""What is read of a model's files, and what a stand-in for the hub says."""

import asyncio
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from tests.support.model_folders import cache_model, write_model, write_safetensors
from tests.support.published_models import LLAMA_8B, TINY
from vllm_bootstrap.models import facts
from vllm_bootstrap.models.facts import read_local, read_remote, stamp, weight_files


def test_a_folder_with_one_file(tmp_path):
    folder = write_model(tmp_path / "m", TINY, 1000)
    found = read_local(str(folder), None)
    assert found.config == TINY
    assert (found.weights.by_dtype, found.weights.exact, found.why) == ({"BF16": 2000}, True, None)


def test_shards_of_a_cached_revision(tmp_path):
    cache_model(tmp_path, "org/model", TINY, 500)
    assert read_local("org/model", tmp_path).weights.stored_bytes == 1000
    assert read_local("org/model", tmp_path, "c" * 40).weights.stored_bytes == 1000
    assert read_local("org/model", tmp_path, "other").config is None
    assert read_local("org/model", None).why == "org/model is not on this machine, or has no config.json"


def test_shards_behind_links(tmp_path):
    """As huggingface_hub lays its cache out."""
    whole = write_model(tmp_path / "blobs", TINY, 4000, shards=4)
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in whole.iterdir():
        (linked / file.name).symlink_to(file)
    assert read_local(str(linked), None).weights.stored_bytes == 8000


def test_a_download_that_is_not_complete(tmp_path):
    folder = write_model(tmp_path / "m", TINY, 4000, shards=4)
    (folder / "model-00002-of-00004.safetensors").unlink()
    found = read_local(str(folder), None)
    assert found.weights is None
    assert "1 of 4 files are missing" in found.why
    short = write_model(tmp_path / "n", TINY, 4000)
    os.truncate(short / "model.safetensors", 200)
    assert "is not complete" in read_local(str(short), None).why


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, b"\xff" * 8, b"\x10\0\0\0\0\0\0\0not a header....", b"\x02\0\0\0\0\0\0\0[]"]
)
def test_files_that_are_no_safetensors(tmp_path, content):
    folder = write_model(tmp_path / "m", TINY, 10)
    (folder / "model.safetensors").write_bytes(content)
    found = read_local(str(folder), None)
    assert (found.config, found.weights) == (TINY, None)
    assert "cannot be judged" in found.why


def test_headers_are_read_within_bounds(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "m", TINY, 4000, shards=4)
    monkeypatch.setattr(facts, "MAX_HEADERS_BYTES", 150)
    assert "no header that could be read" in read_local(str(folder), None).why


def test_only_headers_are_read(tmp_path):
    """Forty gigabytes of holes take no time, because nobody looks into them."""
    folder = write_model(tmp_path / "m", LLAMA_8B, 20_000_000_000)
    assert read_local(str(folder), None).weights.stored_bytes == 40_000_000_000


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "float16"}, "F16"),
        ({"dtype": "torch.bfloat16"}, "BF16"),
        ({"text_config": {"dtype": "bfloat16"}}, "BF16"),
        ({}, "F32"),
    ],
)
def test_older_weights_are_judged_by_their_size(tmp_path, config, dtype):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pytorch_model.bin").write_bytes(b"x" * 300)
    (folder / "training_args.bin").write_bytes(b"x" * 5)
    found = read_local(str(folder), None)
    assert (found.weights.by_dtype, found.weights.exact) == ({dtype: 300}, False)


def test_no_weights_and_no_folder(tmp_path):
    folder = write_model(tmp_path / "m", TINY, 10)
    (folder / "model.safetensors").unlink()
    assert "there are none" in read_local(str(folder), None).why
    (folder / "model.safetensors.index.json").write_text("{")
    assert "cannot be judged" in read_local(str(folder), None).why
    assert read_local(str(tmp_path / "nowhere"), None).config is None


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["model.safetensors", "consolidated.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        (["a.safetensors", "adapter_model.safetensors", "original/b.safetensors"], ["a.safetensors"]),
        (["pytorch_model-1.bin", "optimizer.bin", "README.md"], ["pytorch_model-1.bin"]),
        (["model.pt", "onnx/model.safetensors"], ["model.pt"]),
        (["model.gguf"], []),
    ],
)
def test_which_files_an_engine_loads(names, wanted):
    assert weight_files(names) == wanted


def test_the_stamp_changes_with_the_folder(tmp_path):
    folder = write_model(tmp_path / "m", TINY, 10)
    first = stamp(str(folder), None)
    write_safetensors(folder / "more.safetensors", 10)
    os.utime(folder, (1, 1))
    assert stamp(str(folder), None) not in {None, first}
    shutil.rmtree(folder)
    assert stamp(str(folder), None) is None
    assert stamp("org/model", None) is None


# The hub


@contextmanager
def hub(answers: dict[str, tuple[int, bytes]]) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("authorization")))
            status, body = answers.get(self.path, (404, b"{}"))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


ABOUT, CONFIG = "/api/models/org/m/revision/main?blobs=true", "/org/m/resolve/main/config.json"


def answers(about, config=TINY):
    return {ABOUT: (200, json.dumps(about).encode()), CONFIG: (200, json.dumps(config).encode())}


def ask(said, **options):
    with hub(said) as (address, asked):
        return asyncio.run(read_remote("org/m", endpoint=address, **options)), asked


def test_parameters_as_the_hub_counted_them():
    about = {"safetensors": {"parameters": {"BF16": 1000, "F32": 10}, "total": 1010}, "siblings": []}
    found, asked = ask(answers(about), token="hf_x")
    assert found.config == TINY
    assert (found.weights.by_dtype, found.weights.exact) == ({"BF16": 2000, "F32": 40}, False)
    assert asked == [(ABOUT, "Bearer hf_x"), (CONFIG, "Bearer hf_x")]


@pytest.mark.parametrize("counted", [{}, {"safetensors": {"parameters": {"NEW": 3}}}, {"safetensors": 1}])
def test_sizes_of_files_as_the_hub_lists_them(counted):
    siblings = [{"rfilename": "model.safetensors", "size": 70}, {"rfilename": "x.safetensors"}, 3]
    found, asked = ask(answers({**counted, "siblings": siblings}))
    assert found.weights.by_dtype == {"F32": 70}
    assert asked[0][1] is None


def test_a_repository_without_weights():
    found, _ = ask(answers({"siblings": 4}))
    assert (found.config, found.weights) == (TINY, None)
    assert "no weights of a known kind" in found.why


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({ABOUT: (401, b"")}, "HF_TOKEN"),
        ({ABOUT: (403, b"")}, "gated"),
        ({}, "has no org/m"),
        ({ABOUT: (500, b"")}, "HTTP 500"),
        ({ABOUT: (200, b"no json")}, "does not answer"),
        ({ABOUT: (200, b"[]")}, "no object"),
    ],
)
def test_refusals_are_said(said, why):
    found, _ = ask(said)
    assert (found.config, found.weights) == (None, None)
    assert why in found.why


def test_an_answer_that_never_ends(monkeypatch):
    monkeypatch.setattr(facts, "MAX_ANSWER_BYTES", 100)
    found, _ = ask({ABOUT: (200, b"x" * 1000)})
    assert "too long" in found.why


def test_nobody_is_asked_about_a_path_or_offline(monkeypatch):
    assert "not on this machine" in asyncio.run(read_remote("/models/x")).why
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert asyncio.run(read_remote("org/m")).why == "HF_HUB_OFFLINE is set"


def test_nobody_answers():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = asyncio.run(read_remote("org/m", endpoint=f"http://127.0.0.1:{taken.getsockname()[1]}"))
    assert "does not answer" in found.why
