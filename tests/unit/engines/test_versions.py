import pytest

from vllm_bootstrap.engines.versions import NEWEST, parse, show


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("0.32.0", (0, 32, 0)),
        ("0.8.5.post1", (0, 8, 5)),
        ("0.12", (0, 12, 0)),
        ("0.33.1rc2.dev5+g1234.cu130", (0, 33, 1)),
        ("1.0.0+cpu", (1, 0, 0)),
        ("dev", NEWEST),
        ("0.1.dev1+gabcdef", NEWEST),
    ],
)
def test_releases_are_compared_without_their_suffixes(text, version):
    assert parse(text) == version


def test_what_is_no_version_is_refused():
    with pytest.raises(ValueError, match="not a version"):
        parse("unknown")


def test_versions_order_as_numbers_not_as_text():
    assert parse("0.9.2") < parse("0.10.0")
    assert show(parse("0.10.0")) == "0.10.0"
