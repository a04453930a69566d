"""Engine logs over the API, from real segment files."""

import asyncio
import json

import pytest

from tests.support.control_plane import Browser, key, launch_id, make, sse_events, view
from vllm_bootstrap.launches.logs import LogReader
from vllm_bootstrap.launches.shim.logwriter import segment_name

PATH = f"/logs/{launch_id(1)}"
TEXT = "one\ntwo ünïcode\nthree\n"


class Box:
    """A control plane with one launch whose log lies in ``folder``."""

    def __init__(self, folder):
        self.folder = folder
        self.services = make()
        self.browser = Browser(self.services)
        self.services.supervisor.add(view(1))
        self.services.supervisor.logs[launch_id(1), 1] = LogReader(folder)
        self.write(TEXT)

    def write(self, text, start=0):
        with (self.folder / segment_name(start)).open("ab") as file:
            file.write(text.encode())

    def end(self, **fields):
        self.services.supervisor.add(view(1, state="stopped", **fields))


@pytest.fixture
def box(tmp_path):
    return Box(tmp_path)


def test_a_page_has_offsets_in_bytes_and_tells_the_end(box):
    size = len(TEXT.encode())
    page = box.browser.get(PATH).json()
    assert page == {
        "api_version": "v1", "launch_id": launch_id(1), "attempt": 1, "offset": 0, "next_offset": size, "content": TEXT,
        "size": size, "eof": False, "truncated_before": None,
    }  # fmt: skip
    box.end()
    assert box.browser.get(PATH).json()["eof"] is True
    assert box.browser.get(f"{PATH}?limit=16").json()["eof"] is False


def test_pages_join_to_the_whole_and_never_cut_a_character(box):
    offset, content = 0, ""
    while True:
        page = box.browser.get(f"{PATH}?offset={offset}&limit=16").json()
        assert "\ufffd" not in page["content"]
        content += page["content"]
        if page["next_offset"] == offset:
            break
        offset = page["next_offset"]
    assert content == TEXT


def test_the_end_is_an_empty_page_and_beyond_it_is_416(box):
    size = len(TEXT.encode())
    page = box.browser.get(f"{PATH}?offset={size}").json()
    assert (page["content"], page["next_offset"]) == ("", size)
    for headers in ({}, {"accept": "text/event-stream"}):
        answer = box.browser.get(f"{PATH}?offset={size + 1}", **headers)
        assert (answer.status, answer.error["code"]) == (416, "offset_out_of_range")


def test_what_was_rotated_away_is_said(box, tmp_path):
    (tmp_path / segment_name(0)).unlink()
    box.write("later\n", start=1000)
    page = box.browser.get(f"{PATH}?offset=5").json()
    assert (page["offset"], page["truncated_before"], page["content"]) == (1000, 1000, "later\n")


def test_tail_gives_the_last_lines(box):
    assert box.browser.get(f"{PATH}?tail=1").json()["content"] == "three\n"
    assert box.browser.get(f"{PATH}?tail=0").json()["offset"] == len(TEXT.encode())
    assert box.browser.get(f"{PATH}?tail=1&offset=0").error["param"] == "tail"


def test_earlier_attempts_can_be_read(box, tmp_path):
    box.end(attempt=2)
    (tmp_path / "2").mkdir()
    box.services.supervisor.logs[launch_id(1), 2] = LogReader(tmp_path / "2")
    assert box.browser.get(PATH).json()["size"] == 0
    assert box.browser.get(f"{PATH}?attempt=1").json()["content"] == TEXT
    assert box.browser.get(f"{PATH}?attempt=3").status == 404
    assert box.browser.get(f"{PATH}?attempt=0").error["param"] == "attempt"


@pytest.mark.parametrize("query", ["offset=-1", "offset=x", "limit=1", "limit=99999999", "tail=-1", "lines=3"])
def test_wrong_parameters_are_refused_by_name(box, query):
    answer = box.browser.get(f"{PATH}?{query}")
    assert (answer.status, answer.error["param"]) == (400, query.partition("=")[0])


@pytest.mark.parametrize(("query", "headers"), [("?follow=true", {}), ("", {"accept": "text/event-stream"})])
def test_a_stream_has_pages_with_resumable_ids_and_an_end(box, query, headers):
    box.end()
    events = sse_events(box.browser.get(PATH + query, **headers).body)
    assert json.loads(events[0]["data"])["content"] == TEXT
    assert events[0]["id"] == str(len(TEXT.encode()))
    assert events[-1] == {"event": "end", "data": "{}"}


def test_a_stream_resumes_at_the_last_event_id_or_begins_with_the_tail(box):
    box.end()
    resumed = sse_events(box.browser.get(f"{PATH}?follow=true", last_event_id="4").body)
    assert json.loads(resumed[0]["data"])["content"] == TEXT[4:]
    at_end = sse_events(box.browser.get(f"{PATH}?follow=true", last_event_id=str(len(TEXT.encode()))).body)
    assert [event.get("event") for event in at_end] == ["end"]
    tail = sse_events(box.browser.get(f"{PATH}?follow=true&tail=1").body)
    assert json.loads(tail[0]["data"])["content"] == "three\n"
    assert box.browser.get(f"{PATH}?follow=true", last_event_id="9999").status == 416


def test_a_stream_follows_what_is_written_until_the_client_leaves(box):
    async def scenario():
        written = []

        def seen(sent):
            if b"three" in sent and not written:
                written.append(box.write("four\n"))
            return b"four" in sent

        return await box.browser.exchange("GET", f"{PATH}?follow=true", leave_after=seen)

    answer = asyncio.run(asyncio.wait_for(scenario(), 10))
    assert "".join(json.loads(event["data"])["content"] for event in sse_events(answer.body)) == TEXT + "four\n"


def test_a_head_request_does_not_stream(box):
    answer = box.browser.call("HEAD", f"{PATH}?follow=true")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")


def test_monitor_is_not_enough():
    services = make([key("watch", "monitor"), key("read", "logs")])
    services.supervisor.add(view(1))
    assert Browser(services, "watch").get(PATH).error["needed_scopes"] == ["logs"]
    assert Browser(services, "read").get(f"{PATH}?attempt=7").status == 404
