"""Questions to engines over real sockets: what counts as ready, and that no answer can hurt."""

import asyncio
import json
import time

import pytest

from tests.support.aio import run
from tests.support.raw_upstream import RawUpstream, answer
from vllm_bootstrap.engines import client, probe
from vllm_bootstrap.engines.client import EngineClient, ProbeError
from vllm_bootstrap.serving import Endpoint

MODELS = json.dumps({"data": [{"id": "m"}, {"id": "other"}]}).encode()
REFUSED = answer(b"{}", status=b"404 Not Found")


class Engine:
    """Answers by path; what is not named is a 404. Counts the questions."""

    def __init__(self, tmp_path, **answers):
        self.upstream = RawUpstream(tmp_path / "e.sock", self.script)
        self.answers = {"/health": answer(b""), "/v1/models": answer(MODELS), **answers}
        self.asked = []

    async def script(self, visit):
        path = visit.lines[0].split()[1].decode()
        self.asked.append(path)
        await visit.send(self.answers.get(path, REFUSED))
        visit.writer.close()

    def ready(self, name="m", **options):
        async def main():
            async with self.upstream.running():
                return await probe.ready(self.upstream.endpoint, name, 2.0, task_timeout_s=2.0, **options)

        return run(main())


@pytest.mark.parametrize(
    ("task", "refusals"),
    [
        ("/v1/chat/completions", []),
        ("/v1/completions", ["/v1/chat/completions"]),
        ("/v1/embeddings", ["/v1/chat/completions", "/v1/completions"]),
        ("/v1/score", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]),
    ],
)
def test_ready_when_the_task_that_fits_was_done(tmp_path, task, refusals):
    engine = Engine(tmp_path, **{task: answer(b"{}")})
    assert engine.ready() is None
    assert engine.asked == ["/health", "/v1/models", *refusals, task]
    last = engine.upstream.requests[-1]
    assert json.loads(last.body)["model"] == "m"
    assert last.header(b"authorization") == [b"Bearer internal-key"]


def test_a_model_that_only_hears_gets_silence(tmp_path):
    engine = Engine(tmp_path, **{"/v1/audio/transcriptions": answer(b"{}")})
    assert engine.ready() is None
    body = engine.upstream.requests[-1].body
    assert b'name="model"\r\n\r\nm\r\n' in body
    assert b"RIFF" in body


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({"/health": answer(b"", status=b"503 Down")}, "/health answered 503"),
        ({"/v1/models": answer(b"{}", status=b"401 No")}, "(401) does not list 'm'"),
        ({"/v1/models": answer(b"[]")}, "does not list 'm'"),
        ({"/v1/models": answer(b"nonsense")}, "does not list 'm'"),
        ({"/v1/models": answer(b'{"data": [3, {"id": "x"}]}')}, "but ['x']"),
        ({"/v1/chat/completions": answer(b"sorry", status=b"500 Oops")}, "/v1/chat/completions answered 500: sorry"),
        ({}, "no kind of request fits this model"),
    ],
)
def test_not_ready_and_why(tmp_path, answers, says):
    assert says in Engine(tmp_path, **answers).ready()


def test_another_health_path(tmp_path):
    engine = Engine(tmp_path, **{"/ready": answer(b""), "/v1/chat/completions": answer(b"{}")})
    assert engine.ready(health_path="/ready") is None
    assert engine.asked[0] == "/ready"


def test_nobody_there(tmp_path):
    endpoint = Endpoint(uds=str(tmp_path / "none.sock"))
    assert "FileNotFoundError" in run(probe.ready(endpoint, "m", 1.0))
    assert not run(probe.healthy(endpoint, 1.0))
    assert run(probe.counters(endpoint, 1.0)) is None


def upstream(tmp_path, script):
    return RawUpstream(tmp_path / "e.sock", script)


def ask(tmp_path, script, **options):
    """One question to an engine that behaves as ``script`` says."""

    async def main():
        up = upstream(tmp_path, script)
        async with up.running():
            return await EngineClient(up.endpoint).request("GET", "/x", **{"timeout_s": 2.0, **options})

    return run(main())


def sends(*pieces):
    async def script(visit):
        await visit.send(*pieces)
        visit.writer.close()

    return script


def test_answers_in_pieces_chunks_and_without_length(tmp_path):
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    assert ask(tmp_path, sends(*(chunked[i : i + 1] for i in range(len(chunked))))).body == b"abcde"
    reply = ask(tmp_path, sends(b"HTTP/1.1 200 OK\r\nX-A: 1\r\n\r\nall ", b"there is"))
    assert (reply.body, reply.headers, reply.json()) == (b"all there is", {"x-a": "1"}, None)


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([b"garbage\r\n\r\n"], "not HTTP"),
        ([b""], "ended before"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"], "ended before"),
        ([b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 400], "larger than 100"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 150\r\n\r\n" + b"x" * 150], "larger than 100"),
        ([b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100], "larger than 100"),
    ],
)
def test_answers_that_cannot_be_used(tmp_path, pieces, says):
    with pytest.raises(ProbeError, match=says):
        ask(tmp_path, sends(*pieces), limit=100)


def test_an_engine_that_does_not_answer_costs_only_the_time_limit(tmp_path):
    async def hang(visit):
        await visit.gone()

    started = time.monotonic()
    with pytest.raises(ProbeError, match=r"within 0\.2 s"):
        ask(tmp_path, hang, timeout_s=0.2)
    assert time.monotonic() - started < 2


def test_an_engine_that_hangs_is_not_healthy(tmp_path):
    async def main():
        async def hang(visit):
            await visit.gone()

        up = upstream(tmp_path, hang)
        async with up.running():
            return await asyncio.gather(probe.healthy(up.endpoint, 0.2), probe.counters(up.endpoint, 0.2))

    assert run(main()) == [False, None]


def test_health_and_counters(tmp_path):
    async def main(metrics):
        engine = Engine(tmp_path, **{"/metrics": metrics})
        async with engine.upstream.running():
            endpoint = engine.upstream.endpoint
            return await probe.healthy(endpoint, 1.0), await probe.counters(endpoint, 1.0)

    assert run(main(answer(b"vllm:num_requests_running 2\n"))) == (True, probe.Counters(running=2.0))
    assert run(main(answer(b"", status=b"401 No")))[1] is None


def test_over_tcp_with_a_base_path():
    async def main():
        seen = []

        async def serve(reader, writer):
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer(b'{"a": 1}'))
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            endpoint = Endpoint(host="127.0.0.1", port=port, base_path="/base")
            reply = await EngineClient(endpoint).request("POST", "/x", b"{}", timeout_s=2)
        return seen[0], reply, port

    head, reply, port = run(main())
    assert head.startswith(b"POST /base/x HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % port)
    assert b"Content-Length: 2" in head
    assert b"Authorization" not in head
    assert reply.json() == {"a": 1}


def test_tls_is_not_given_up_silently():
    async def main():
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            endpoint = Endpoint(host="127.0.0.1", port=port, tls=True)
            return await probe.healthy(endpoint, 2.0)

    assert run(main()) is False


def test_errors_inside_the_parsers_callbacks_become_probe_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(client._Answer, "on_header", lambda *_: 1 / 0)
    with pytest.raises(ProbeError, match="could not be taken in"):
        ask(tmp_path, sends(answer(b"{}")))
