from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from tests.support.aio import run
from vllm_bootstrap.batches.output import (
    Rendered,
    answer_line,
    error_line,
    pieces,
    record_id,
    usage_of,
    write_file,
)
from vllm_bootstrap.batches.types import NO_USAGE, TokenUsage


def answered(body: bytes, status: int = 200, custom_id: str = "a") -> Rendered:
    return answer_line("batch_req_1", custom_id, status, "req-1", body)


def test_an_answer_stands_in_its_line_as_the_engine_wrote_it() -> None:
    body = '{"choices":[ {"text": "grün 🙂", "logprob": -1.50} ],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
    made = answered(body.encode(), custom_id='"ü"')
    assert made.ok
    assert body.encode() in made.data
    assert json.loads(made.data) == {
        "id": "batch_req_1",
        "custom_id": '"ü"',
        "response": {"status_code": 200, "request_id": "req-1", "body": json.loads(body)},
        "error": None,
    }
    assert made.usage == TokenUsage(3, 0, 2, 0)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\u2028", "\x85", "\u2029"])
def test_every_line_is_one_line_for_every_reader(end: str) -> None:
    inside, between = ("", end) if end.isascii() else (end, "")
    body = f'{{{between}  "a": "one{inside}two"{between}}}{between}'
    made = answered(body.encode())
    assert made.ok
    assert len(made.data.decode().splitlines()) == 1
    assert json.loads(made.data)["response"]["body"] == json.loads(body)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b'{"a": NaN}', b'{"a": 1} x', b"\xff", b'{"a": "\xc3"}', b"[" * 100_000, b'{"a": "\n"}']
)
def test_what_is_no_json_becomes_an_error(body: bytes) -> None:
    made = answered(body)
    assert not made.ok
    assert made.usage == NO_USAGE
    value = json.loads(made.data)
    assert value["response"] is None
    assert value["error"]["code"] == "upstream_error"
    assert "200" in value["error"]["message"]
    assert len(made.data) < 1200
    assert b"\n" not in made.data


@pytest.mark.parametrize(("status", "ok"), [(200, True), (299, True), (400, False), (404, False), (503, False)])
def test_an_answer_that_refuses_is_a_failed_line_with_the_engines_words(status: int, ok: bool) -> None:
    made = answered(b'{"error": {"message": "too long"}}', status)
    assert made.ok is ok
    value = json.loads(made.data)
    assert value["error"] is None
    assert value["response"]["status_code"] == status
    assert value["response"]["body"] == {"error": {"message": "too long"}}


def test_a_line_without_an_answer() -> None:
    assert json.loads(error_line("i", "a", "batch_expired", "Too late.")) == {
        "id": "i", "custom_id": "a", "response": None, "error": {"code": "batch_expired", "message": "Too late."},
    }  # fmt: skip


def test_ids_of_records_are_those_of_lines() -> None:
    assert record_id("batch_x1", 7) == "batch_req_x1_7"
    assert len({record_id(batch, number) for batch in ("batch_a", "batch_b") for number in range(50)}) == 100


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4},
          "completion_tokens_details": {"reasoning_tokens": 3}}, TokenUsage(5, 4, 7, 3)),
        ({"input_tokens": 5, "output_tokens": 7, "input_tokens_details": {"cached_tokens": 4},
          "output_tokens_details": {"reasoning_tokens": 3}}, TokenUsage(5, 4, 7, 3)),
        ({"prompt_tokens": 5, "total_tokens": 5}, TokenUsage(5)),
        ({"total_tokens": 5}, TokenUsage(5)),
        ({"prompt_tokens": 5, "completion_tokens_details": {"reasoning_tokens": True}}, TokenUsage(5)),
        ({"prompt_tokens": 5, "completion_tokens_details": {"reasoning_tokens": -1}}, TokenUsage(5)),
        ({"completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 10**30}}, TokenUsage(0, 0, 5, 5)),
        ({"prompt_tokens": 5, "completion_tokens_details": None}, TokenUsage(5)),
        ({}, NO_USAGE),
        ("much", NO_USAGE),
        (None, NO_USAGE),
    ],
)  # fmt: skip
def test_usage_in_every_dialect(usage: Any, expected: TokenUsage) -> None:
    assert usage_of({"usage": usage}) == expected


def test_an_answer_that_is_no_object_has_no_usage() -> None:
    assert answered(b"[1, 2]").usage == NO_USAGE


class Kept:
    """Records in chunks of two."""

    def __init__(self, *lines: bytes) -> None:
        self.lines = list(enumerate(lines, 1))

    async def records(self, ok: bool, after_line: int = 0) -> AsyncGenerator[list[tuple[int, bytes]], None]:
        found = [item for item in self.lines if item[0] > after_line] if ok else []
        for at in range(0, len(found), 2):
            yield found[at : at + 2]


class Sunk:
    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    async def write(self, piece: bytes) -> None:
        self.pieces.append(piece)


def test_files_are_written_chunk_by_chunk() -> None:
    sink = Sunk()
    assert run(write_file(Kept(b"1", b"22", b"3"), sink, ok=True)) == 7
    assert sink.pieces == [b"1\n22\n", b"3\n"]
    assert run(write_file(Kept(b"1"), sink, ok=False)) == 0


def test_a_file_can_be_gone_on_with() -> None:
    async def rest() -> bytes:
        return b"".join([piece async for piece in pieces(Kept(b"1", b"2", b"3"), ok=True, after_line=1)])

    assert run(rest()) == b"2\n3\n"
