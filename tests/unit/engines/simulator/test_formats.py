import json

import pytest

from vllm_bootstrap.engines.simulator.formats import (
    DONE,
    Chat,
    Completion,
    Format,
    Messages,
    Reply,
    Responses,
    Transcription,
    dumps,
    error_body,
)
from vllm_bootstrap.engines.simulator.text import answer_to

PROMPT = 'say "hö" \\ now'


def reply(*, choices=1, include_usage=False, max_tokens=100, stop=()):
    answers = [answer_to(PROMPT, max_tokens=max_tokens, index=i, stop=stop) for i in range(choices)]
    return Reply("id-1", 1_800_000_000, "m", answers, 4, include_usage)


def streamed(form):
    """All events of a stream: (event name or None, decoded data or text)."""
    counts = [answer.count for answer in form.reply.answers]
    raw = form.opening()
    raw += b"".join(form.token(index, i) for index, count in enumerate(counts) for i in range(count))
    raw += form.closing()
    events = []
    for block in raw.decode().removesuffix("\n\n").split("\n\n"):
        name = None
        for line in block.split("\n"):
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            else:
                events.append((name, value if value == "[DONE]" else json.loads(value)))
    return events


def test_a_chat_stream_says_what_the_whole_answer_says():
    form = Chat(reply(choices=2))
    events = [data for _, data in streamed(form)]
    assert events[-1] == "[DONE]"
    texts, ends = ["", ""], [None, None]
    for chunk in events[:-1]:
        assert (chunk["object"], chunk["id"], chunk["model"]) == ("chat.completion.chunk", "id-1", "m")
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"]["content"]
        assert ends[choice["index"]] is None
        ends[choice["index"]] = choice["finish_reason"]
    whole = json.loads(Chat(reply(choices=2)).body())
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert ends == [choice["finish_reason"] for choice in whole["choices"]] == ["stop", "stop"]
    assert [e["choices"][0]["delta"].get("role") for e in events[:3]] == ["assistant", "assistant", None]


def test_usage_comes_last_when_wanted():
    events = [data for _, data in streamed(Chat(reply(include_usage=True)))]
    assert events[-2]["choices"] == []
    assert events[-2]["usage"] == json.loads(Chat(reply()).body())["usage"]
    assert events[-2]["usage"]["total_tokens"] == 8


def test_completions_stream_and_whole_agree():
    form = Completion(reply(max_tokens=2))
    events = [data for _, data in streamed(form)][:-1]
    whole = json.loads(form.body())
    assert "".join(chunk["choices"][0]["text"] for chunk in events) == whole["choices"][0]["text"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert {chunk["object"] for chunk in events} == {whole["object"]} == {"text_completion"}


@pytest.mark.parametrize("form", [Chat, Completion])
def test_a_stop_string_is_named(form):
    made = form(reply(stop=[" now"]))
    last = [data for _, data in streamed(made)][-2]
    assert last["choices"][0]["stop_reason"] == json.loads(made.body())["choices"][0]["stop_reason"] == " now"


def test_anthropic_events_come_in_their_order():
    form = Messages(reply())
    events = streamed(form)
    assert all(name == data["type"] for name, data in events)
    assert [name for name, _ in events][:2] == ["message_start", "content_block_start"]
    assert [name for name, _ in events][-3:] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta")
    whole = json.loads(form.body())
    assert text == whole["content"][0]["text"] == PROMPT
    assert whole["stop_reason"] == events[-2][1]["delta"]["stop_reason"] == "end_turn"


def test_anthropic_reasons():
    assert json.loads(Messages(reply(max_tokens=1)).body())["stop_reason"] == "max_tokens"
    assert json.loads(Messages(reply(stop=["now"])).body())["stop_reason"] == "stop_sequence"


def test_responses_events_are_numbered_and_agree_with_the_whole():
    events = streamed(Responses(reply()))
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    text = "".join(data["delta"] for name, data in events if name == "response.output_text.delta")
    whole = json.loads(Responses(reply()).body())
    assert text == whole["output"][0]["content"][0]["text"] == PROMPT
    assert events[-1][1]["response"] == whole
    assert whole["status"] == "completed"


def test_a_cut_response_is_incomplete():
    events = streamed(Responses(reply(max_tokens=1)))
    assert events[-1][0] == "response.incomplete"
    assert events[-1][1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_transcriptions():
    form = Transcription(reply())
    events = [data for _, data in streamed(form)]
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in events[:-1])
    assert text == json.loads(form.body())["text"] == PROMPT
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


def test_failures_after_the_start():
    error = error_body(500, "m", "t")
    assert Chat(reply()).failure(error) == b"data: " + error + b"\n\n" + DONE
    assert Messages(reply()).failure(error) == b"event: error\ndata: " + error + b"\n\n"


def test_errors_have_the_status_as_code():
    assert json.loads(error_body(404, "gone", "NotFoundError", "model")) == {
        "error": {"message": "gone", "type": "NotFoundError", "param": "model", "code": 404}
    }


def test_lone_surrogates_do_not_break_the_answer():
    assert json.loads(dumps({"a": "\ud800"})) == {"a": "\ud800"}


def test_the_base_has_no_shape_of_its_own():
    with pytest.raises(NotImplementedError):
        Format(reply())
