"""Which files of a repository an engine needs, and whether those that are here are all of them. PURE.

Rule: everything but what is known to be of no use. Weights in safetensors are preferred, folder by folder, to the same
weights as pickles; weights for other programs, pictures and what training leaves behind are left out. GGUF files are
taken only where there is nothing else. Sizes in bytes; paths are relative, with ``/``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

INDEXES = ("model.safetensors.index.json", "consolidated.safetensors.index.json", "pytorch_model.bin.index.json")
"""Tables of which file holds which tensor: they name the parts that a model consists of."""

_OTHER_PROGRAMS = frozenset({"original", "onnx", "openvino", "coreml", "gguf", "metal", "flax", "tensorflow", "mlx"})
_SAFE, _PICKLES, _GGUF = (".safetensors",), (".bin", ".pt", ".pth"), (".gguf",)
_NEVER = (
    ".msgpack", ".h5", ".ot", ".onnx", ".onnx_data", ".tflite", ".mlmodel", ".pb", ".ckpt", ".pkl", ".npz", ".npy",
    ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf", ".mp4", ".mov", ".wav", ".mp3", ".flac", ".ipynb",
    ".zip", ".tar", ".gz", ".parquet", ".arrow",
)  # fmt: skip
_LEFT_BY_TRAINING = (
    "training_args.bin", "optimizer*", "scheduler.pt", "rng_state*", "trainer_state.json", "events.out.tfevents*",
    "checkpoint-*",
)  # fmt: skip
_NOT_CONSOLIDATED = frozenset({"hf", "safetensors", "fastsafetensors", "pt", "npcache"})


class RepoFile(NamedTuple):
    """One file of a repository. ``blob``: its checksum where it is known, as the cache names it."""

    path: str
    size: int
    blob: str | None = None


class NothingToLoad(Exception):
    """The repository has no weights that an engine could load; the message says what it has instead."""


def choose(files: Sequence[RepoFile], load_format: str | None = None) -> list[RepoFile]:
    """The files that an engine needs, in the order of ``files``. ``load_format`` as vLLM's: where a repository has its
    weights twice (Mistral's), both are taken unless it says which, because releases of vLLM differ in what they prefer.

    Raises ``NothingToLoad``.
    """
    useful = [file for file in files if _is_useful(file.path)]
    by_folder: dict[str, list[RepoFile]] = defaultdict(list)
    for file in useful:
        by_folder[_folder(file.path)].append(file)
    left_out = {file.path for group in by_folder.values() for file in _duplicates(group, load_format)}
    chosen = [file for file in useful if file.path not in left_out]
    if not any(file.path.endswith(_SAFE + _PICKLES) for file in chosen):
        chosen += _only_gguf([file for file in files if file.path.endswith(_GGUF)])
    return chosen


def is_weights(path: str) -> bool:
    return path.endswith(_SAFE + _PICKLES + _GGUF)


def is_complete(sizes: Mapping[str, int], indexed: Mapping[str, Iterable[str]]) -> bool | None:
    """Whether a folder holds a whole model, as far as it can be told without the repository. ``sizes``: its files;
    ``indexed``: for each of ``INDEXES`` that is there, the files it names. None: it looks whole, but nothing in it says
    how many parts there should be."""
    weights = [path for path in sizes if "/" not in path and is_weights(path)]
    if not weights or ("config.json" not in sizes and "params.json" not in sizes and not weights[0].endswith(_GGUF)):
        return False
    if indexed:
        return any(all(sizes.get(part, 0) > 0 for part in parts) for parts in indexed.values())
    whole = {"model.safetensors", "consolidated.safetensors", "pytorch_model.bin"}
    return True if whole & set(weights) or (len(weights) == 1 and weights[0].endswith(_GGUF)) else None


def _is_useful(path: str) -> bool:
    *folders, name = path.split("/")
    if name.startswith(".") or name.lower().endswith(_NEVER + _GGUF):
        return False
    if any(folder.lower() in _OTHER_PROGRAMS or folder.startswith(".") for folder in folders):
        return False
    return not any(fnmatchcase(part, pattern) for part in (*folders, name) for pattern in _LEFT_BY_TRAINING)


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _duplicates(group: Sequence[RepoFile], load_format: str | None) -> Iterable[RepoFile]:
    """What of one folder is there a second time, in a form that is not preferred."""
    safe = [file for file in group if file.path.endswith(_SAFE)]
    if safe and load_format not in {"pt", "npcache"}:
        yield from (file for file in group if file.path.endswith(_PICKLES))
    consolidated = [file for file in safe if _name(file).startswith("consolidated")]
    if consolidated and load_format in _NOT_CONSOLIDATED and len(consolidated) < len(safe):
        yield from consolidated
    elif consolidated and load_format == "mistral":
        yield from (file for file in safe if file not in consolidated)


def _name(file: RepoFile) -> str:
    return file.path.rpartition("/")[2]


def _only_gguf(found: Sequence[RepoFile]) -> Sequence[RepoFile]:
    if not found:
        raise NothingToLoad("The repository has no weights that vLLM can load (no .safetensors, .bin, .pt or .gguf).")
    if len(found) > 1:
        names = ", ".join(file.path for file in found[:3])
        raise NothingToLoad(
            f"The repository has {len(found)} GGUF files ({names}, …) and nothing else: fetch the one you want with "
            "'hf download REPOSITORY FILE' and give the model its path as source."
        )
    return found
