"""``run`` and ``chat`` against a server that says what a test wants."""

import json

import pytest

from tests.support import commands
from tests.support.listening import Listening


class Model:
    """``models`` are (id, status); an answer is the pieces of ``says``, then what ``ending`` is."""

    def __init__(self):
        self.models = [("tiny", "loaded")]
        self.says = ["Hel", "lo", "\x1b[2J!"]
        self.ending = b"data: [DONE]\n\n"
        self.status = 200
        self.asked = []

    async def __call__(self, scope, receive, send):
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        if scope["path"] == "/v1/models":
            found = [
                {"id": name, "created": 1, "root": name, "status": status, "launch_ids": []}
                for name, status in self.models
            ]
            await self.answer(send, json.dumps({"data": found}).encode())
            return
        self.asked.append(json.loads(body))
        if not self.asked[-1].get("stream"):
            await self.answer(send, b'{"choices": [{"message": {"content": "Hello"}}]}')
            return
        chunks = [{"choices": []}, {"choices": [{"delta": {"role": "assistant"}}]}]
        chunks += [{"choices": [{"delta": {"content": piece}}]} for piece in self.says]
        await self.answer(send, b"".join(b"data: %b\n\n" % json.dumps(c).encode() for c in chunks) + self.ending)

    async def answer(self, send, body):
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def run(model):
    with Listening(model) as server:
        yield lambda *args, **options: commands.run(*args, env={"VLLM_BOOTSTRAP_URL": server.url}, **options)


def test_one_answer(run, model):
    result = run("run", "--prompt", "Hi", "--system", "Be kind.", "--max-tokens", "9", "--temperature", "0")
    assert (result.code, result.out) == (0, "Hello\x1b[2J!\n")
    (asked,) = model.asked
    assert asked["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("tiny", 9, 0)


def test_a_terminal_is_not_at_the_models_mercy(run):
    assert run("run", "-p", "Hi", terminal=True).out == "Hello!\n"


def test_a_prompt_from_a_pipe(run, model):
    run("run", "-p", "-", stdin="From a file")
    assert model.asked[0]["messages"][0]["content"] == "From a file"


def test_an_answer_as_json(run, model):
    assert run("run", "-p", "Hi", "--json").json()["choices"][0]["message"]["content"] == "Hello"
    assert "stream" not in model.asked[0]


def test_the_model_is_chosen_when_there_is_one(run, model):
    model.models = [("a", "loaded"), ("b", "loading")]
    run("run", "-p", "Hi")
    run("run", "-p", "Hi", "--model", "other")
    assert [asked["model"] for asked in model.asked] == ["a", "other"]


@pytest.mark.parametrize("status", ["unloaded", "asleep", "failed"])
def test_the_only_model_that_is_configured_is_asked_when_none_is_ready(run, model, status):
    model.models = [("a", status)]
    run("run", "-p", "Hi")
    assert [asked["model"] for asked in model.asked] == ["a"]


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ([("a", "loaded"), ("b", "loaded")], "--model (a, b)"),
        ([("a", "loading")], "loading: a"),
        ([("a", "loading"), ("b", "unloaded")], "loading: a"),
        ([("a", "asleep"), ("b", "unloaded")], "which one to load with --model (a, b)"),
        ([], "Launch one"),
    ],
)
def test_otherwise_it_says_what_to_do(run, model, models, said):
    model.models = models
    for command in (["run", "-p", "Hi"], ["chat"]):
        result = run(*command)
        assert result.code == 1
        assert said in result.err


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (b"", "The answer broke off."),
        (b'data: {"error": {"message": "the engine died", "code": "upstream_error"}}\n\n', "the engine died"),
    ],
)
def test_an_answer_that_breaks_is_a_failure(run, model, ending, said):
    model.ending = ending
    result = run("run", "-p", "Hi")
    assert (result.code, result.out) == (1, "Hello\x1b[2J!")
    assert f"error: {said}" in result.err


def test_a_refusal(run, model):
    model.status = 503
    assert run("run", "-p", "Hi", "--model", "x").code == 1


def test_a_conversation(run, model):
    result = run("chat", "--system", "Be kind.", stdin="Hi\n\nAgain\n/clear\nNew\n/quit\nNever asked\n")
    assert result.code == 0
    assert [len(asked["messages"]) for asked in model.asked] == [2, 4, 2]
    assert model.asked[1]["messages"][2] == {"role": "assistant", "content": "Hello\x1b[2J!"}
    assert result.out.count("Hello") == 3


def test_a_conversation_goes_on_after_an_error(run, model):
    model.ending = b""
    result = run("chat", stdin="Hi\nAgain\n", terminal=True)
    assert result.code == 0
    assert result.err.count("The answer broke off.") == 2
    assert "Talking to tiny" in result.out
