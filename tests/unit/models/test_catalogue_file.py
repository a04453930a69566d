"""YAML as the catalogue takes it: nothing twice, nothing hidden, no surprises of types."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_bootstrap.engines import build_engines
from vllm_bootstrap.models.catalogue_file import MAX_BYTES, read, values_of
from vllm_bootstrap.models.checks import checker
from vllm_bootstrap.models.parsing import CatalogueError, parse

EXAMPLE = Path(__file__).resolve().parents[3] / "config" / "example.models.yaml"


def test_plain_values():
    assert values_of("a: {b: [1, 0.5, yes, text, '7']}") == {"a": {"b": [1, 0.5, True, "text", "7"]}}
    assert values_of("") is None
    assert values_of("revision: 2026-01-02") == {"revision": "2026-01-02"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' stands here twice"),
        ("a:\n  b: 1\n  b: 1", "line 3, column 3: the key 'b' stands here twice"),
        ("7: 1", "line 1, column 1: the key '7' is not text: put it in quotes"),
        ("on: 1", "line 1, column 1: the key 'on' is not text: put it in quotes"),
        ("a: &x 1\nb: *x", "line 2, column 4: anchors and aliases are not read"),
        ("a: !!python/object/apply:os.system ['true']", "line 1, column 4: could not determine a constructor"),
        ("a: !!binary eA==", "line 1, column 4: could not determine a constructor"),
        ("a: !!timestamp 2026-01-01", "line 1, column 4: could not determine a constructor"),
        ("a: [1", "line 1, column 6: "),
        ("a: 'x", "line 1, column 6: "),
        ("a: \x07", "unacceptable character"),
        ("[" * 5000, "nested too deeply"),
        ("? [a]\n: 1", "line 1, column 3: the key"),
    ],
)
def test_what_is_refused(text, said):
    with pytest.raises(CatalogueError) as caught:
        values_of(text)
    assert str(caught.value).startswith(said)


def test_many_mentions_of_one_thing_cannot_grow(tmp_path):
    bomb = "a: &a [x, x]\n" + "".join(f"k{n}: &k{n} [*a, *a]\n" for n in range(40))
    with pytest.raises(CatalogueError, match="anchors"):
        values_of(bomb)


def test_the_size_is_bounded_and_the_text_must_be_utf8(tmp_path):
    path = tmp_path / "models.yaml"
    path.write_text("a: " + "x" * MAX_BYTES)
    with pytest.raises(CatalogueError, match="larger than"):
        read(path)
    path.write_bytes(b"a: \xff")
    with pytest.raises(CatalogueError, match="not UTF-8 at byte 3"):
        read(path)
    path.write_bytes(b"\xef\xbb\xbfa: 1")
    assert read(path)[0] == {"a": 1}


def test_the_example_is_a_valid_catalogue():
    first, raw = EXAMPLE.read_text().splitlines()[0], read(EXAMPLE)[0]
    assert first == "# yaml-language-server: $schema=models.schema.json"
    catalogue = parse(raw, checker(build_engines(), "vllm"))
    assert {"Qwen/Qwen2.5-3B-Instruct", "support"} <= set(catalogue.entries["qwen"].served_names)
    assert catalogue.entries["big"].gpus.count == 2
    assert catalogue.entries["embed"].gpus.share == 0.2
    assert [group.together for group in catalogue.groups] == [False]
