"""Foreign text on a terminal, lines in a pipe."""

from datetime import UTC, datetime, timedelta

import pytest

from vllm_bootstrap.cli import text


@pytest.mark.parametrize(
    "evil",
    [
        "\x1b[2J", "\x1b[1;1H", "\x1b[?1049h", "\x1b]0;title\x07", "\x1b]52;c;ZXZpbA==\x1b\\", "\x1bP1$r\x1b\\",
        "\x1bc", "\x1b(0", "\x9b", "\x07", "\x08", "\x7f", "\x00", "\x9d0;t\x9c",
    ],
)  # fmt: skip
def test_control_sequences_are_taken_out(evil):
    assert text.harmless(f"a{evil}b") == "ab"


def test_colours_stay_where_they_are_wanted():
    red = "\x1b[31;1mred\x1b[0m"
    assert text.harmless(red) == red
    assert text.harmless(red, colours=False) == "red"


def test_lines_tabs_and_other_letters_stay():
    plain = "Grüße\t你好\r\n🙂\n"
    assert text.harmless(plain) == plain


def test_columns_are_aligned_and_end_without_blanks():
    assert text.columns(["ID", "MODEL"], [["l1", "a"], ["l22222", "long"]]) == [
        "ID      MODEL",
        "l1      a",
        "l22222  long",
    ]


def test_age():
    assert text.age(datetime.now(UTC) - timedelta(hours=3, seconds=5)) == "3 h 0 m"
