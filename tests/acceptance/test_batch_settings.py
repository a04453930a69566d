"""The limits of batches and items as the operator sets them, against a running daemon without any engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess
from vllm_bootstrap.client import Client, WebhookTo
from vllm_bootstrap.errors import BadRequest, QueueFull, TooManyRequests
from vllm_bootstrap.wire_batches import BatchObject

SMALL = {
    "batch_max_lines": 2,
    "batch_max_line_bytes": 1024,
    "batch_max_unfinished": 2,
    "items_max_queued": 1,
    "item_expires_after_s": 90,
}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with DaemonProcess(**SMALL) as daemon, daemon.client() as made:
        yield made


def submit(client: Client, path: Path, *prompts: str) -> BatchObject:
    lines = [
        {
            "custom_id": str(at),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "absent", "prompt": prompt},
        }
        for at, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return client.batches.create(client.files.upload(path).id, "/v1/completions")


@pytest.mark.parametrize("prompts", [("a", "b", "c"), ("a", "b" * 1024)], ids=["too many lines", "too long a line"])
def test_a_larger_input_is_refused(client: Client, tmp_path: Path, prompts: tuple[str, ...]) -> None:
    ended = client.batches.wait(submit(client, tmp_path / "in", *prompts).id, timeout_s=20)
    assert ended.status == "failed"
    assert ended.errors is not None
    assert ended.errors.data[0].line in {None, len(prompts)}


def test_only_so_many_batches_may_be_unfinished(client: Client, tmp_path: Path) -> None:
    waiting = [submit(client, tmp_path / str(number), "a", "b") for number in range(2)]
    with pytest.raises(TooManyRequests, match="2 batches"):
        submit(client, tmp_path / "one more", "a")
    for batch in waiting:
        client.batches.cancel(batch.id)
        assert client.batches.wait(batch.id, timeout_s=20).status == "cancelled"
    client.batches.cancel(submit(client, tmp_path / "again", "a").id)


def test_only_so_many_items_may_wait_and_for_so_long(client: Client) -> None:
    made = client.items.submit(model="absent", prompt="a")
    assert made.expires_at - made.created_at in {89, 90, 91}
    with pytest.raises(QueueFull):
        client.items.submit(model="absent", prompt="b")
    assert client.items.cancel(made.id).status == "cancelled"
    other = client.items.submit(model="absent", prompt="b", expires_after_s=600)
    assert other.expires_at - other.created_at in {599, 600, 601}
    client.items.cancel(other.id)


def test_a_webhook_to_a_private_address_or_without_a_secret_is_refused(client: Client, tmp_path: Path) -> None:
    made = submit(client, tmp_path / "in", "a")
    for webhook in (WebhookTo("http://127.0.0.1:9/", "a secret of some length"), WebhookTo("https://example.com/")):
        with pytest.raises(BadRequest, match=r"(?i)webhook"):
            client.batches.create(made.input_file_id, "/v1/completions", webhook=webhook)
    client.batches.cancel(made.id)
