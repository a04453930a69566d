from __future__ import annotations

import json

import pytest

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.gateway.loading import Loading, Refusal


class Said:
    """Takes a relay's place."""

    def __init__(self) -> None:
        self.announced = False
        self.head: tuple[str, bytes] | None = None
        self.comments: list[str] = []

    def announce(self, request_id: str, own: bytes) -> None:
        assert not self.announced
        self.announced = True
        self.head = (request_id, own)

    def comment(self, text: str) -> None:
        assert self.announced
        self.comments.append(text)


class Load:
    """A load that is told about."""

    def __init__(self, line: str | None) -> None:
        self.line, self.said = line, Said()
        self.news = Loading(self.said, "req_1", lambda: self.line, lambda: b"x-own: 1\r\n", 100.0)  # type: ignore[arg-type]

    def look(self, *moments: float) -> list[str]:
        before = len(self.said.comments)
        for moment in moments:
            self.news.look(moment)
        return self.said.comments[before:]


def test_nothing_is_said_in_the_first_second() -> None:
    load = Load("loading m: 1 %")
    assert load.look(100.0, 100.5, 100.99) == []
    assert load.look(101.0) == ["loading m: 1 %"]
    assert load.said.head is not None
    request_id, own = load.said.head
    assert request_id == "req_1"
    assert own.startswith(b"x-own: 1\r\ndate: ")
    assert own.endswith(b" GMT\r\n")


def test_nothing_is_said_of_what_is_not_loaded() -> None:
    load = Load(None)
    assert load.look(101.0, 105.0, 130.0) == []
    assert not load.said.announced
    load.line = "loading m"
    assert load.look(131.0) == ["loading m"]


def test_it_is_said_when_it_changes_and_once_a_second_at_most() -> None:
    load = Load("1 %")
    load.look(101.0)
    load.line = "2 %"
    assert load.look(101.5, 101.9) == []
    assert load.look(101.999) == ["2 %"]
    assert load.look(103.0, 104.0, 105.0) == []
    load.line = "3 %"
    assert load.look(105.1) == ["3 %"]


def test_no_proxy_hears_nothing_for_longer_than_ten_seconds() -> None:
    load = Load("0 %")
    assert load.look(*(100.0 + second for second in range(32))) == ["0 %", "0 %", "0 %", "0 %"]
    load.line = None  # loaded, and others are before it in the queue
    assert load.look(132.0, 135.0, 142.0) == ["waiting for its turn", "waiting for its turn"]


def test_a_comment_is_one_line() -> None:
    load = Load("loading\r\ndata: x\n\n  now")
    assert load.look(101.0) == ["loading data: x now"]


@pytest.mark.parametrize(
    "words", [b"", b"no JSON", b"[" * 100_000, b'"text"', b"{}", b'{"error": "Unauthorized"}', b"\xff"]
)
def test_what_is_no_error_is_told_in_our_own_words(words: bytes) -> None:
    body = Refusal(418, words).body()
    assert body["error"]["code"] == "upstream_error"
    assert "418" in body["error"]["message"]


def test_an_engines_error_is_told_in_its_words() -> None:
    said = {"error": {"message": "too long", "type": "BadRequestError", "code": 400}}
    refusal = Refusal(400, json.dumps(said).encode())
    assert refusal.body() == said
    assert isinstance(refusal, ApiError)
