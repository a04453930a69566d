"""How answers and failures are read. Responses are made here, nothing is sent."""

import ssl

import httpx
import pytest

from vllm_bootstrap import errors
from vllm_bootstrap.sdk import calls, transport
from vllm_bootstrap.sdk.discovery import Target
from vllm_bootstrap.sdk.failures import DaemonUnreachable, UnexpectedAnswer
from vllm_bootstrap.sdk.launch import Launch

REQUEST = httpx.Request("GET", "http://127.0.0.1:8000/version")
TARGET = Target("http://127.0.0.1:8000", "secret-key")


def answer(status, body=b"", **headers):
    return httpx.Response(status, content=body, headers=headers, request=REQUEST)


@pytest.mark.parametrize("cls", sorted(set(errors.BY_CODE.values()), key=lambda cls: cls.code))
def test_the_daemons_errors_come_back_as_their_classes(cls):
    sent = cls() if cls is errors.Unauthorized else cls("why", param="p", details={"more": 1})
    response = httpx.Response(cls.status, json=sent.body(), headers=sent.headers(), request=REQUEST)
    with pytest.raises(cls) as caught:
        transport.check(response, response.content)
    assert caught.value.message == sent.message
    assert caught.value.param == sent.param


def test_an_error_carries_the_requests_id():
    error = transport.api_error(404, b"{}", {"x-request-id": "req-1"})
    assert error.__notes__ == ["request id: req-1"]
    assert not hasattr(transport.api_error(404, b"not JSON", {}), "__notes__")


def test_redirects_are_refused_and_say_where_they_led():
    response = answer(307, location="http://elsewhere/")
    with pytest.raises(UnexpectedAnswer, match="http://elsewhere/"):
        transport.check(response, b"")


def test_somebody_elses_answer_is_told_apart():
    with pytest.raises(UnexpectedAnswer, match="is something else there"):
        transport.read_answer(calls.version(), answer(200, b"<html>"))


@pytest.mark.parametrize(
    ("exc", "said", "never_met"),
    [
        (httpx.ConnectError("[Errno 111] Connection refused"), "connection refused", True),
        (httpx.ConnectError("Name or service not known"), "Name or service not known", True),
        (httpx.ConnectTimeout(""), "connecting took too long", True),
        (httpx.ReadTimeout(""), "did not answer in time", False),
        (httpx.RemoteProtocolError("peer closed"), "the connection broke (peer closed)", False),
        (httpx.ReadError(""), "the connection broke (ReadError)", False),
    ],
)
def test_failures_to_reach_it_are_told_in_words(exc, said, never_met):
    found = transport.unreachable(TARGET, exc)
    assert isinstance(found, DaemonUnreachable)
    assert said in str(found)
    assert found.never_met is never_met
    assert ("Start one with" in str(found)) is never_met


def test_no_client_follows_redirects_and_keys_stay_out_of_sight():
    assert transport.options(TARGET, 5)["follow_redirects"] is False
    assert "secret-key" not in repr(TARGET)


def test_a_silent_stream_is_given_up_but_a_thinking_model_is_not():
    assert transport.stream_options({}, {}, None)["timeout"].read == transport.STREAM_SILENCE_S
    assert transport.stream_options({}, {}, {"a": 1})["timeout"].read is None


def test_a_call_may_have_a_time_of_its_own():
    own = transport.request_options(calls.stop("l", wait=True, force=False, timeout_s=77))
    assert own["timeout"].read == 77
    assert "timeout" not in transport.request_options(calls.version())


def launch(url="http://127.0.0.1:8000", key="k", verify=True):
    from tests.support.statuses import ID, status  # noqa: PLC0415

    return Launch(status(launch_id=ID, served_model_name="short"), Target(url, key), verify)


def test_a_launch_knows_where_it_is():
    found = launch()
    assert found.base_url == f"http://127.0.0.1:8000/proxy/{found.id}/v1"
    assert found.served_model_name == "short"


@pytest.mark.parametrize("kind", ["openai", "async_openai"])
def test_a_launch_gives_stock_clients(kind):
    client = getattr(launch(), kind)(max_retries=0)
    assert str(client.base_url).rstrip("/") == launch().base_url
    assert (client.api_key, client.max_retries) == ("k", 0)
    # On this machine no proxy of the environment is asked; elsewhere it may be needed.
    assert client._client.trust_env is False
    assert getattr(launch("https://box.example.com"), kind)()._client.trust_env is True
    assert getattr(launch(key=None), kind)().api_key == "none"


def test_a_private_certificate_reaches_the_stock_client():
    assert launch(verify=ssl.create_default_context())._http()["verify"].__class__ is ssl.SSLContext
