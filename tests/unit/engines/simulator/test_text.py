import json
import math
import subprocess
import sys

import pytest

from vllm_bootstrap.engines.simulator.text import (
    REMEMBERED_TOKENS,
    Vocabulary,
    answer_to,
    count_tokens,
    embedding,
    escaped,
    pieces,
    score,
)


@pytest.mark.parametrize("text", ["", "a", " a  b ", "one two\nthree\t", "x" * 50, "wörter 漢字", "\n\n"])
def test_pieces_joined_are_the_text(text):
    assert "".join(pieces(text)) == text


def test_words_are_tokens_and_long_ones_are_cut():
    assert pieces("one two three") == ["one", " two", " three"]
    assert count_tokens("x" * 33) == 3


def test_the_answer_echoes_the_prompt_and_stops():
    answer = answer_to("Say hello to me", max_tokens=100)
    assert (answer.text(), answer.count, answer.finish_reason) == ("Say hello to me", 4, "stop")


def test_an_answer_is_cut_at_max_tokens():
    answer = answer_to("a b c d", max_tokens=2)
    assert (answer.text(), answer.finish_reason) == ("a b", "length")


def test_the_end_needs_room_as_an_end_token_does():
    assert answer_to("a b", max_tokens=2).finish_reason == "length"
    assert answer_to("a b", max_tokens=3).finish_reason == "stop"


def test_ignoring_the_end_repeats_the_words():
    answer = answer_to("a b", max_tokens=5, ignore_eos=True)
    assert (answer.text(), answer.count, answer.finish_reason) == ("a b a b a", 5, "length")


def test_a_least_number_of_tokens_is_kept():
    assert answer_to("a b", max_tokens=9, min_tokens=3).text() == "a b a"


def test_further_choices_start_elsewhere():
    assert answer_to("a b c", max_tokens=9, index=1).text() == "b c a"
    assert answer_to("a b c", max_tokens=9, index=3).text() == "a b c"


def test_an_empty_prompt_has_an_answer():
    assert answer_to("  ", max_tokens=9).text() == "ok"


def test_stop_strings_cut_and_are_named():
    answer = answer_to("one two three", max_tokens=9, stop=["", "nothing", " t", "two"])
    assert (answer.text(), answer.finish_reason, answer.stop_reason) == ("one", "stop", " t")
    assert answer_to("one", max_tokens=9, stop=["o"]).text() == ""
    assert answer_to("one", max_tokens=9, stop=["x"]).stop_reason is None


def test_pieces_are_ready_for_json():
    answer = answer_to('say "hö"\\ \ud800', max_tokens=8, ignore_eos=True)
    text = "".join(json.loads(b'"' + answer.encoded(i) + b'"') for i in range(answer.count))
    assert text == answer.text()
    assert escaped("ö") == "ö".encode()


def test_answers_and_vectors_do_not_depend_on_the_process():
    code = "from vllm_bootstrap.engines.simulator.text import *; print(embedding('a', 3), Vocabulary().encode('a b'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == f"{embedding('a', 3)} {Vocabulary().encode('a b')}"


def test_vectors_have_length_one_and_differ():
    vector = embedding("a", 64)
    assert math.isclose(sum(v * v for v in vector), 1, abs_tol=1e-3)
    assert vector != embedding("b", 64)


def test_likeness():
    assert score("a b", "B a") == 1
    assert score("a b", "b c") == pytest.approx(1 / 3, abs=1e-6)
    assert score("a", "b") == 0
    assert score("", "") == 1


def test_token_ids_lead_back_to_the_text():
    words = Vocabulary()
    assert words.decode(words.encode("one two ä")) == "one two ä"
    assert words.decode([1]) == "<1>"


def test_the_way_back_is_bounded():
    words = Vocabulary()
    first = words.encode("first")
    words.encode(" ".join(map(str, range(REMEMBERED_TOKENS))))
    assert words.decode(first) != "first"
