"""What is told of a batch's end, and how it is signed: checked with the stock OpenAI client."""

import base64
import json
import time

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_bootstrap.batches.types import Webhook
from vllm_bootstrap.batches.webhooks import announcement, delay_after, signed_headers, signing_key

SECRET = "a secret of sixteen characters"
ENCODED = f"whsec_{base64.b64encode(b'0123456789abcdef').decode()}"
STATES = ("completed", "failed", "expired", "cancelled")


def made(state="completed", secret=SECRET, at=1_800_000_000.7):
    return announcement("batch_1", "night", Webhook("https://example.com/hook", secret), state, at, bytes(range(7)))


@pytest.mark.parametrize("state", STATES)
def test_the_body_is_an_event_as_openai_sends_it(state):
    row = made(state)
    event = json.loads(row.payload)
    assert event == {
        "id": row.id, "object": "event", "type": f"batch.{state}", "created_at": 1_800_000_000,
        "data": {"id": "batch_1"},
    }  # fmt: skip
    assert row.id.startswith("evt_")
    assert (row.owner_id, row.next_at, row.attempts) == ("night", 1_800_000_000.7, 0)


@pytest.mark.parametrize("secret", [SECRET, ENCODED])
@pytest.mark.parametrize("state", STATES)
def test_the_openai_client_believes_it(state, secret):
    row = made(state, secret)
    headers = signed_headers(row, time.time())
    client = openai.OpenAI(api_key="none", webhook_secret=secret)
    event = client.webhooks.unwrap(row.payload, headers)
    assert (event.type, event.data.id, event.id) == (f"batch.{state}", "batch_1", row.id)
    for bad in ({**headers, "webhook-id": "evt_other"}, {**headers, "webhook-timestamp": str(int(time.time()) + 1)}):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(row.payload, bad)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(row.payload, headers, secret="another secret")


def test_without_a_secret_there_is_no_signature():
    assert "webhook-signature" not in signed_headers(made(secret=""), 5.0)


def test_a_secret_that_is_no_base_64_is_told_without_showing_it():
    with pytest.raises(ValueError, match="not base 64") as caught:
        signing_key("whsec_abcde")
    with pytest.raises(ValueError, match="base 64"):  # a lenient decoder would sign with an empty key
        signing_key("whsec_!!!!!!!!!!!!!!!!")
    assert "abcde" not in str(caught.value)


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_delays_grow_up_to_an_hour(attempts, chance):
    delay = delay_after(attempts, chance)
    assert 5 <= delay <= 3600
    assert delay_after(attempts, 0) <= delay <= delay_after(attempts + 1, 1)
    assert delay_after(attempts, 1) == 2 * delay_after(attempts, 0)
