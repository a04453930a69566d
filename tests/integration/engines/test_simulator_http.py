"""The simulator's API over real sockets: stock clients where they exist, raw bytes where framing is the subject."""

import asyncio
import base64
import hashlib
import json
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import websockets
from websockets.asyncio.client import unix_connect

from tests.support.simulator import Simulator
from tests.support.waiting import wait_for
from vllm_bootstrap.engines.routes import vllm_routes
from vllm_bootstrap.engines.simulator.knobs import Options
from vllm_bootstrap.engines.simulator.server import Server
from vllm_bootstrap.engines.simulator.text import embedding
from vllm_bootstrap.engines.simulator.tree import EngineProcess

KEY = "internal-key"
AUTH = {"authorization": f"Bearer {KEY}"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "one two three"}]}


@pytest.fixture(scope="module")
def simulator():
    with Simulator(tokens_per_second=200, echo_headers=True, keep_alive_timeout=1, max_num_seqs=8) as running:
        yield running


@pytest.fixture(scope="module")
def client(simulator):
    transport = httpx.HTTPTransport(uds=simulator.uds)
    with (
        httpx.Client(transport=transport) as http,
        openai.OpenAI(base_url="http://engine/v1", api_key="x", http_client=http, max_retries=0) as made,
    ):
        yield made


def post(simulator, path, body, **headers):
    return simulator.request("POST", path, body, headers)


def error_of(reply):
    error = reply.json()["error"]
    assert error["code"] == reply.status
    assert error.keys() == {"message", "type", "param", "code"}
    return error


class Raw:
    """A bare connection."""

    def __init__(self, simulator):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(simulator.uds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def read_until(self, end):
        data = b""
        while not data.endswith(end):
            more = self.socket.recv(65536)
            assert more, data
            data += more
        return data

    def read_all(self):
        data = b""
        while more := self.socket.recv(65536):
            data += more
        return data


def request_bytes(path, body=b"", method=b"POST", version=b"1.1", extra=b""):
    return b"%b %b HTTP/%b\r\nhost: e\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n%b" % (
        method, path, version, len(body), extra, body,
    )  # fmt: skip


# -- generating ----------------------------------------------------------------------------------------------------


def test_chat_with_the_stock_client(client):
    whole = client.chat.completions.create(**CHAT, n=2)
    assert [choice.message.content for choice in whole.choices] == ["one two three", "two three one"]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 6)
    stream = client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}, max_tokens=2)
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == "one two"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.total_tokens == 5


def test_completions_with_the_stock_client(client):
    many = client.completions.create(model="tiny", prompt=["a b", "c"], n=2, max_tokens=5)
    assert [choice.text for choice in many.choices] == ["a b", "b a", "c", "c"]
    stream = client.completions.create(model="tiny", prompt=["a b", "c d"], stream=True)
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["a b", "c d"]


def test_responses_with_the_stock_client(client):
    assert client.responses.create(model="tiny", input="hello there", instructions="be kind").output_text == (
        "hello there"
    )
    with client.responses.stream(model="tiny", input=[{"role": "user", "content": "hello there"}]) as stream:
        final = stream.get_final_response()
    assert (final.output_text, final.status) == ("hello there", "completed")


def test_messages(simulator):
    asked = {"model": "tiny", "max_tokens": 50, "system": "x y", "messages": CHAT["messages"], "stop_sequences": ["th"]}
    answer = post(simulator, "/v1/messages", asked).json()
    assert answer["content"] == [{"type": "text", "text": "one two "}]
    assert (answer["stop_reason"], answer["usage"]["input_tokens"]) == ("stop_sequence", 5)
    assert post(simulator, "/v1/messages/count_tokens", asked).json() == {"input_tokens": 5}
    assert error_of(post(simulator, "/v1/messages", {"messages": CHAT["messages"]}))["param"] == "max_tokens"


def test_token_ids_are_prompts_too(simulator):
    tokens = post(simulator, "/tokenize", {"prompt": "red green", "return_token_strs": True}).json()
    assert (tokens["count"], tokens["token_strs"]) == (2, ["red", " green"])
    assert post(simulator, "/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "red green"}
    one = post(simulator, "/v1/completions", {"prompt": tokens["tokens"]}).json()
    assert one["choices"][0]["text"] == "red green"
    two = post(simulator, "/v1/completions", {"prompt": [tokens["tokens"], [1]]}).json()
    assert [choice["text"] for choice in two["choices"]] == ["red green", "<1>"]
    talk = post(simulator, "/tokenize", {"messages": CHAT["messages"]}).json()
    assert talk["count"] == 3


def test_parts_of_a_message(simulator):
    parts = [{"type": "text", "text": "look "}, {"type": "image_url", "image_url": {"url": "x"}}]
    talk = [{"role": "assistant", "content": None}, {"role": "user", "content": parts}]
    answer = post(simulator, "/v1/chat/completions", {"messages": talk}).json()
    assert answer["choices"][0]["message"]["content"] == "look"
    assert answer["usage"]["prompt_tokens"] == 3


def test_the_callers_request_id_is_in_the_answers(simulator):
    answer = post(simulator, "/v1/completions", {"prompt": "a"}, **{"x-request-id": "r-7"}).json()
    assert answer["id"] == "cmpl-r-7"


# -- reading -------------------------------------------------------------------------------------------------------


def test_embeddings_with_the_stock_client(client, simulator):
    found = client.embeddings.create(model="tiny", input=["a", "b"], dimensions=8)
    assert found.data[0].embedding == pytest.approx(embedding("a", 8), abs=1e-6)
    assert (found.data[1].index, found.usage.total_tokens) == (1, 2)
    coded = post(simulator, "/v1/embeddings", {"input": "a", "encoding_format": "base64"}).json()
    raw = base64.b64decode(coded["data"][0]["embedding"])
    assert struct.unpack("<32f", raw) == pytest.approx(embedding("a", 32), abs=1e-6)


def test_scores_and_rankings(simulator):
    answer = post(simulator, "/v1/score", {"text_1": "a b", "text_2": ["a b", "c"]}).json()
    assert [pair["score"] for pair in answer["data"]] == [1, 0]
    pairs = post(simulator, "/score", {"queries": ["a", "b"], "documents": ["a", "c"]}).json()
    assert [pair["score"] for pair in pairs["data"]] == [1, 0]
    assert error_of(post(simulator, "/score", {"text_1": ["a", "b"], "text_2": "a"}))["param"] == "text_1"
    ranked = post(simulator, "/v1/rerank", {"query": "a", "documents": ["b", "a", "a c"], "top_n": 2}).json()
    assert [result["index"] for result in ranked["results"]] == [1, 2]


def test_transcriptions_tell_what_arrived(simulator, client):
    sound = bytes(range(256)) * 4000
    found = client.audio.transcriptions.create(model="tiny", file=("a b.wav", sound))
    assert found.text == f"a b.wav {len(sound)} bytes sha256 {hashlib.sha256(sound).hexdigest()}"
    form = {"content-type": "multipart/form-data; boundary=b"}
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % part
        for part in ((b'file"; filename="s.wav', b"x"), (b"stream", b"true"))
    )
    stream = post(simulator, "/v1/audio/translations", body + b"--b--\r\n", **form)
    assert stream.body.count(b"transcription.chunk") > 3
    assert stream.body.endswith(b"data: [DONE]\n\n")


def test_broken_forms_are_refused(simulator):
    assert post(simulator, "/v1/audio/transcriptions", {"model": "tiny"}).status == 415
    form = {"content-type": "multipart/form-data"}
    assert "boundary" in error_of(post(simulator, "/v1/audio/transcriptions", b"x", **form))["message"]
    form = {"content-type": "multipart/form-data; boundary=b"}
    assert post(simulator, "/v1/audio/transcriptions", b"not a form", **form).status == 400
    assert post(simulator, "/v1/audio/transcriptions", b"--b\r\nhalf", **form).status == 400
    big = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + b"x" * 70_000 + b"\r\n--b--\r\n"
    assert "too large" in error_of(post(simulator, "/v1/audio/transcriptions", big, **form))["message"]
    other = b'--b\r\nContent-Type: x\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny\r\n--b--\r\n'
    assert "missing" in error_of(post(simulator, "/v1/audio/transcriptions", other, **form))["message"]


# -- refusing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/chat/completions", {"model": "other", "messages": CHAT["messages"]}, 404, "model"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, 400, "messages"),
        ("/v1/chat/completions", {**CHAT, "n": 0}, 400, "n"),
        ("/v1/chat/completions", {**CHAT, "n": 20_000}, 400, "n"),
        ("/v1/chat/completions", {**CHAT, "n": True}, 400, "n"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 40_000}, 400, "max_tokens"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/chat/completions", {**CHAT, "stop": 5}, 400, "stop"),
        ("/v1/chat/completions", {**CHAT, "stream_options": {}}, 400, "stream_options"),
        ("/v1/chat/completions", {**CHAT, "priority": "high"}, 400, "priority"),
        ("/v1/completions", {"prompt": "x " * 40_000}, 400, "input_tokens"),
        ("/v1/completions", {"prompt": None}, 400, "prompt"),
        ("/v1/completions", [], 400, None),
        ("/v1/messages", {**CHAT, "max_tokens": 9, "stop_sequences": 5}, 400, "stop_sequences"),
        ("/v1/embeddings", {"input": []}, 400, "input"),
        ("/v1/embeddings", {"input": "x " * 40_000}, 400, None),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens"),
    ],
)
def test_wrong_requests_are_refused_in_vllms_shape(simulator, path, body, status, param):
    reply = post(simulator, path, body)
    assert reply.status == status
    assert error_of(reply)["param"] == param


def test_bodies_that_are_no_json(simulator):
    wrong = {"content-type": "application/json"}
    assert post(simulator, "/v1/completions", b"{", **wrong).status == 400
    assert post(simulator, "/v1/completions", b"[" * 100_000, **wrong).status == 400
    assert post(simulator, "/v1/completions", b"{}", **{"content-type": "text/plain"}).status == 415
    assert post(simulator, "/v1/completions", {"prompt": "a"}, **{"x-vllm-priority": "soon"}).status == 400


def test_unknown_routes_and_methods(simulator):
    assert error_of(simulator.request("GET", "/nowhere"))["type"] == "Not Found"
    assert simulator.request("GET", "/v1/completions").status == 405


def test_every_route_that_the_proxy_knows_is_there(simulator):
    for route in vllm_routes():
        status = simulator.request(route.method, route.path).status
        adapters = "lora" in route.path
        assert (status == 404) == (adapters or route.websocket), route.path


def test_dangerous_routes_answer(simulator):
    for path in ("/collective_rpc", "/sleep?level=2", "/invocations"):
        assert post(simulator, path, {}).json() == {"reached": path.partition("?")[0]}


def test_information(simulator):
    assert simulator.request("GET", "/version").json()["version"].startswith("0.32")
    assert simulator.request("GET", "/load").json() == {"server_load": 0}
    assert simulator.request("POST", "/ping").status == 200
    card = simulator.request("GET", "/v1/models").json()["data"][0]
    assert (card["id"], card["max_model_len"]) == ("tiny", 32768)


def test_the_internal_key_is_wanted_where_vllm_wants_it():
    with Simulator(env={"VLLM_API_KEY": KEY}) as locked:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}, {"x-api-key": KEY}):
            reply = locked.request("GET", "/v1/models", headers=headers)
            assert (reply.status, reply.json()) == (401, {"error": "Unauthorized"})
        assert locked.request("GET", "/v1/models", headers=AUTH).status == 200
        for path in ("/health", "/metrics", "/version"):
            assert locked.request("GET", path).status == 200
        assert locked.request("OPTIONS", "/v1/models").status == 405

        async def websocket():
            async with unix_connect(locked.uds, "ws://e/v1/realtime") as _:
                raise AssertionError("let in without a key")

        with pytest.raises(websockets.InvalidStatus, match="401"):
            asyncio.run(websocket())


def test_tasks_decide_which_routes_exist():
    with Simulator(tasks="embed") as embedder:
        assert post(embedder, "/v1/embeddings", {"input": "a"}).status == 200
        assert post(embedder, "/v1/completions", {"prompt": "a"}).status == 404
        assert embedder.request("GET", "/v1/models").status == 200


def test_adapters_are_names_while_loaded():
    with Simulator(env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}) as simulator:
        wanted = {"lora_name": "style", "lora_path": "/x"}
        assert b"Success" in post(simulator, "/v1/load_lora_adapter", wanted).body
        assert post(simulator, "/v1/load_lora_adapter", wanted).status == 400
        assert post(simulator, "/v1/completions", {"model": "style", "prompt": "a"}).json()["model"] == "style"
        assert post(simulator, "/v1/unload_lora_adapter", wanted).status == 200
        assert post(simulator, "/v1/unload_lora_adapter", {"lora_name": "tiny"}).status == 404
        assert post(simulator, "/v1/completions", {"model": "style", "prompt": "a"}).status == 404


def test_a_bug_answers_500_and_is_in_the_log(capfd):
    """A broken server, made in this process: the connection stays, the traceback is seen."""

    async def ask():
        loop = asyncio.get_running_loop()
        core = EngineProcess(workers=(), ignore_sigterm=False, noise_bytes_per_second=0)
        server = Server(Options(model="m"), {}, loop, core)
        server.app.metrics = None
        listener = await loop.create_server(server.protocol, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
        writer.write(request_bytes(b"/metrics", method=b"GET") + request_bytes(b"/version", method=b"GET"))
        answer = await reader.readuntil(b'+simulator"}')
        writer.close()
        listener.close()
        await writer.wait_closed()
        return answer

    answer = asyncio.run(ask())
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"InternalServerError" in answer
    assert b"HTTP/1.1 200 " in answer
    assert "AttributeError" in capfd.readouterr().out


# -- time, slots and counters --------------------------------------------------------------------------------------


def test_health_may_be_slow():
    with Simulator(health_delay=0.3) as slow:
        began = time.monotonic()
        assert slow.request("GET", "/health").status == 200
        assert time.monotonic() - began >= 0.3


def start(simulator, body, **headers):
    connection = simulator.connect()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json", **headers})
    return connection


def test_priorities_and_counters_with_one_slot():
    with Simulator(max_num_seqs=1, tokens_per_second=100) as simulator:
        long = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True}
        first = start(simulator, {**long, "stream": True})
        wait_for(lambda: simulator.metric("num_requests_running") == 1)
        waiting = [
            start(simulator, {**long, "max_tokens": 10, "prompt": "p2", "priority": 2}),
            start(simulator, {**long, "max_tokens": 10, "prompt": "p1", "priority": 1}),
            start(simulator, {**long, "max_tokens": 10, "prompt": "p0", "priority": 1}, **{"x-vllm-priority": "-5"}),
        ]
        wait_for(lambda: simulator.metric("num_requests_waiting") == 3)
        first.close()
        order = []

        def read(connection):
            order.append(json.loads(connection.getresponse().read())["choices"][0]["text"][:2])
            connection.close()

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(read, waiting))
        assert order == ["p0", "p1", "p2"]
        assert simulator.metric("request_success_total", finished_reason="abort") == 1
        assert simulator.metric("request_success_total", finished_reason="length") == 3
        wait_for(lambda: simulator.metric("num_requests_running") == 0)
        queue = simulator.metric("request_queue_time_seconds_count")
        assert queue == 4


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot_at_once(simulator, stream):
    body = {"prompt": "a", "max_tokens": 5000, "ignore_eos": True, "stream": stream, "n": 3}
    connection = start(simulator, body)
    wait_for(lambda: simulator.metric("num_requests_running") == 3)
    connection.close()
    wait_for(lambda: simulator.metric("num_requests_running") == 0, timeout_s=1)


def test_a_slow_reader_gets_every_byte_and_holds_no_memory(simulator):
    asked = {"prompt": "word " * 20, "stream": True, "n": 8, "max_tokens": 300, "ignore_eos": True}
    body = json.dumps(asked).encode()
    with Raw(simulator) as raw:
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.send(request_bytes(b"/v1/completions", body))
        wait_for(lambda: simulator.metric("num_requests_running") == 0, timeout_s=20)
        data = raw.read_until(b"0\r\n\r\n")
    assert data.count(b'"text":') == 8 * 300
    assert data.count(b'"finish_reason":"length"') == 8


def test_no_time_means_at_once():
    with Simulator(tokens_per_second=0, prefill_tokens_per_second=0) as fast:
        answer = fast.complete("a b c", max_tokens=20_000, ignore_eos=True)
        assert answer.json()["usage"]["completion_tokens"] == 20_000
        streamed = fast.complete("a b c", max_tokens=500, ignore_eos=True, stream=True)
        assert streamed.body.count(b'"text":') == 500


# -- with a profile ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Steps of 5 ms, a cache of 16 blocks of 4 tokens."""
    costs = {"step_base_s": 0.005, "api_request_s": 0.001, "block_size": 4, "kv_blocks": 16}
    file = tmp_path_factory.mktemp("profile") / "small.json"
    file.write_text(json.dumps({"name": "small", "source": "a test", "measured": False, **costs}))
    with Simulator(profile=file, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16) as running:
        yield running


def test_a_profile_batches_continuously_and_prefixes_are_shared(profiled):
    text = " ".join(f"w{i}" for i in range(20))
    for _ in range(2):
        answer = profiled.complete(text, max_tokens=5, ignore_eos=True)
        usage = answer.json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (20, 5)
    assert profiled.metric("prefix_cache_queries_total") == 40
    assert profiled.metric("prefix_cache_hits_total") == 16
    # The same words as a conversation, as token ids and behind a system prompt are other prefixes.
    chat = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": text}]}
    for body in (chat, chat, {**chat, "messages": [{"role": "system", "content": "Be kind."}, *chat["messages"]]}):
        assert post(profiled, "/v1/chat/completions", body).status == 200
    for _ in range(2):
        assert profiled.complete(list(range(9)), max_tokens=1).status == 200


def test_without_blocks_somebody_is_preempted_and_all_are_answered(profiled):
    before = profiled.metric("num_preemptions_total")
    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(profiled.complete, f"{i} {i} {i} {i}", max_tokens=40, ignore_eos=True, stream=bool(i % 2))
            for i in range(4)
        ]
        assert all(answer.result().status == 200 for answer in answers)
    assert profiled.metric("num_preemptions_total") > before
    assert profiled.metric("kv_cache_usage_perc") == 0
    assert profiled.metric("num_requests_running") == profiled.metric("num_requests_waiting") == 0


def test_an_embedding_and_a_vanished_client_with_a_profile(profiled):
    assert post(profiled, "/v1/embeddings", {"input": "a b c"}).status == 200
    connection = start(profiled, {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "stream": True})
    wait_for(lambda: profiled.metric("num_requests_running") == 1)
    connection.close()
    wait_for(lambda: profiled.metric("num_requests_running") == 0, timeout_s=1)
    wait_for(lambda: profiled.metric("kv_cache_usage_perc") == 0, timeout_s=1)


# -- HTTP ----------------------------------------------------------------------------------------------------------


def test_what_was_received_can_be_looked_at(simulator):
    body = b'{"prompt": "a",  "x":1}'
    headers = {"X-Odd": "v", "content-type": "application/json", "te": "trailers"}
    simulator.request("POST", "/v1/completions?q=1", body, headers)
    seen = simulator.request("GET", "/debug/last_request?path=/v1/completions").json()
    assert (seen["method"], seen["target"], seen["body"]) == ("POST", "/v1/completions?q=1", body.decode())
    assert (seen["body_bytes"], seen["body_sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
    assert ["x-odd", "v"] in seen["headers"]
    assert ["te", "trailers"] in seen["headers"]
    assert simulator.request("GET", "/debug/requests").json()["requests"][-1] == seen
    assert simulator.request("GET", "/debug/last_request?path=/none").status == 404


def test_without_the_knob_nothing_is_kept():
    with Simulator() as closed:
        closed.complete()
        assert closed.request("GET", "/debug/last_request").status == 404
        assert closed.request("GET", "/debug/requests").status == 404


def test_pipelined_requests_are_answered_in_order(simulator):
    bodies = [b'{"prompt":"w%d x y","max_tokens":%d}' % (i, 1 + i % 3) for i in range(100)]
    with Raw(simulator) as raw:
        raw.send(b"".join(request_bytes(b"/v1/completions", body) for body in bodies))
        raw.send(request_bytes(b"/health", method=b"GET", extra=b"connection: close\r\n"))
        answers = raw.read_all().split(b"HTTP/1.1 200 OK")[1:]
    assert len(answers) == 101
    for i, answer in enumerate(answers[:-1]):
        assert b'"text":"w%d' % i in answer


def test_requests_may_arrive_byte_by_byte(simulator):
    with Raw(simulator) as raw:
        for byte in request_bytes(b"/v1/completions", b'{"prompt":"a"}', extra=b"connection: close\r\n"):
            raw.send(bytes([byte]))
        assert b'"text":"a"' in raw.read_all()


def test_chunked_bodies_and_continue(simulator):
    with Raw(simulator) as raw:
        raw.send(
            b"POST /v1/completions HTTP/1.1\r\nhost: e\r\ncontent-type: application/json\r\nexpect: 100-continue\r\n"
            b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        )
        raw.read_until(b"HTTP/1.1 100 Continue\r\n\r\n")
        raw.send(b'5\r\n{"pro\r\n9\r\nmpt":"a"}\r\n0\r\n\r\n')
        assert b'"text":"a"' in raw.read_all()


def test_http_1_0_gets_no_chunks(simulator):
    with Raw(simulator) as raw:
        raw.send(request_bytes(b"/v1/completions", b'{"prompt":"a","stream":true}', version=b"1.0"))
        data = raw.read_all()
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert body.startswith(b"data: ")
    assert body.endswith(b"data: [DONE]\n\n")


def test_garbage_is_refused_and_ends_the_connection(simulator):
    with Raw(simulator) as raw:
        raw.send(b"what is this\r\n\r\n")
        assert raw.read_all().startswith(b"HTTP/1.1 400 ")
    with Raw(simulator) as raw:  # while a request runs there is no telling whose answer it would be
        raw.send(request_bytes(b"/v1/completions", b'{"prompt":"a","max_tokens":500,"ignore_eos":true}') + b"\x00\x00")
        assert raw.read_all() == b""
    wait_for(lambda: simulator.metric("num_requests_running") == 0)


def test_an_idle_connection_is_closed_after_the_timeout(simulator):
    with Raw(simulator) as raw:
        raw.send(request_bytes(b"/health", method=b"GET"))
        began = time.monotonic()
        assert raw.read_all().startswith(b"HTTP/1.1 200 ")
        assert 0.9 < time.monotonic() - began < 5


def test_an_upgrade_nobody_offers_is_a_plain_request(simulator):
    extra = b"connection: upgrade\r\nupgrade: h2c\r\n"
    with Raw(simulator) as raw:
        raw.send(request_bytes(b"/version", method=b"GET", extra=extra) + request_bytes(b"/version", method=b"GET"))
        data = raw.read_until(b"}")
        while data.count(b"HTTP/1.1 200 ") < 2:
            data += raw.read_until(b"}")


def test_head_has_no_body(simulator):
    with Raw(simulator) as raw:
        raw.send(request_bytes(b"/nowhere", method=b"HEAD", extra=b"connection: close\r\n"))
        assert raw.read_all().endswith(b"\r\n\r\n")


# -- websocket -----------------------------------------------------------------------------------------------------


def test_realtime_with_a_stock_client(simulator):
    async def talk():
        async with unix_connect(simulator.uds, "ws://e/v1/realtime?model=tiny", subprotocols=["realtime"]) as peer:
            assert peer.subprotocol == "realtime"
            assert json.loads(await peer.recv())["type"] == "session.created"
            for message in ("hällo", b"\x00\xff" * 40_000, ""):
                await peer.send(message)
                assert await peer.recv() == message
            await peer.send(["in ", "parts"])
            assert await peer.recv() == "in parts"
            await (await peer.ping())
            assert await asyncio.to_thread(simulator.metric, "websocket_connections_active") == 1
            await peer.send("close:4001:enough")
            with pytest.raises(websockets.ConnectionClosed):
                await peer.recv()
            return peer.close_code, peer.close_reason

    assert asyncio.run(talk()) == (4001, "enough")
    wait_for(lambda: simulator.metric("websocket_connections_active") == 0)


def test_messages_right_behind_the_handshake_are_not_lost(simulator):
    head = (
        b"GET /v1/realtime HTTP/1.1\r\nhost: e\r\nconnection: Upgrade\r\nupgrade: WebSocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    with Raw(simulator) as raw:
        raw.send(head + b"\x81\x82\x00\x00\x00\x00hi")
        assert raw.read_until(b"\x81\x02hi").startswith(b"HTTP/1.1 101 ")
        raw.send(b"\x88\x80\x00\x00\x00\x00")
        assert raw.read_all() == b"\x88\x00"


def test_a_handshake_must_be_whole_and_at_its_place(simulator):
    upgrade = b"connection: Upgrade\r\nupgrade: websocket\r\n"
    for path, extra, status in (
        (b"/v1/realtime", upgrade, b"400"),
        (b"/v1/models", upgrade + b"sec-websocket-version: 13\r\nsec-websocket-key: x\r\n", b"404"),
    ):
        with Raw(simulator) as raw:
            raw.send(request_bytes(path, method=b"GET", extra=extra))
            assert raw.read_all().startswith(b"HTTP/1.1 " + status)


def test_stopping_says_goodbye_to_websockets():
    with Simulator() as simulator:

        async def talk():
            async with unix_connect(simulator.uds, "ws://e/v1/realtime") as peer:
                await peer.recv()
                simulator.process.terminate()
                with pytest.raises(websockets.ConnectionClosed):
                    await peer.recv()
                return peer.close_code

        assert asyncio.run(talk()) == 1001
        assert simulator.process.wait(5) == 0
