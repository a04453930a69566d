"""Files, batches and items: both clients against the real control plane, with real files and made-up batches."""

import asyncio
import threading

import pytest

from tests.integration.sdk.test_clients import Async, Sync
from tests.support.batch_box import batch_box
from tests.support.batch_desks import batch_id, item_id
from tests.support.waiting import wait_for
from vllm_bootstrap import errors
from vllm_bootstrap.batches import jobs
from vllm_bootstrap.batches.types import BatchEvent, Counts
from vllm_bootstrap.client import AsyncClient, Client, DaemonUnreachable, EndTimeout, WebhookTo

LINES = b"".join(b'{"custom_id": "%d"}\n' % number for number in range(40_000))
ONE = batch_id(1)


class Of:
    """The methods of one part of a client, as plain calls."""

    def __init__(self, call, part):
        self.call, self.part = call, part

    def __getattr__(self, method):
        if issubclass(type(self.call), Async):
            return lambda *args, **kwargs: asyncio.run(self._awaited(method, args, kwargs))
        return lambda *args, **kwargs: self._done(method, args, kwargs)

    def _done(self, method, args, kwargs):
        with Client(self.call.url) as client:
            found = getattr(getattr(client, self.part), method)(*args, **kwargs)
            return list(found) if hasattr(found, "__next__") else found

    async def _awaited(self, method, args, kwargs):
        async with AsyncClient(self.call.url) as client:
            found = getattr(getattr(client, self.part), method)(*args, **kwargs)
            return [piece async for piece in found] if hasattr(found, "__anext__") else await found


@pytest.fixture
def box(tmp_path):
    with batch_box(tmp_path) as made:
        yield made


@pytest.fixture(params=[Sync, Async])
def call(request, box):
    return request.param(box.url)


@pytest.fixture
def files(call):
    return Of(call, "files")


@pytest.fixture
def batches(call):
    return Of(call, "batches")


@pytest.fixture
def items(call):
    return Of(call, "items")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(LINES)
    return path


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_file_goes_in_and_comes_back(files, source, tmp_path):
    seen = []
    stored = files.upload(source, expires_after_s=3600, on_progress=lambda done, total: seen.append((done, total)))
    assert (stored.bytes, stored.filename, stored.purpose) == (len(LINES), "prompts.jsonl", "batch")
    assert stored.expires_at == stored.created_at + 3600
    assert seen[-1] == (len(LINES), len(LINES))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 5, "it is told on the way, not at the end"
    assert files.get(stored.id) == stored
    assert [row.id for row in files.list(purpose="batch", limit=1).data] == [stored.id]
    assert b"".join(files.content(stored.id)) == LINES
    assert b"".join(files.content(stored.id, start=len(LINES) - 5)) == LINES[-5:]
    target = files.download(stored.id, tmp_path / "back.jsonl")
    assert target.read_bytes() == LINES
    assert not list(tmp_path.glob("*.part"))
    assert files.delete(stored.id).deleted
    with pytest.raises(errors.NotFound):
        files.content(stored.id)


def test_a_name_of_its_own_and_no_progress(files, source):
    assert files.upload(source, filename="other.jsonl").filename == "other.jsonl"


def test_a_download_that_is_cut_goes_on_where_it_was(box, files, source):
    stored = files.upload(source)
    box.cuts = [1000, 70_000, 3]
    box.ranges.clear()
    seen = []
    assert b"".join(files.content(stored.id, on_progress=lambda *at: seen.append(at))) == LINES
    assert box.ranges[0] is None
    assert [int(asked.removeprefix("bytes=").rstrip("-")) for asked in box.ranges[1:]] == [1000, 71_000, 71_003]
    assert seen[-1] == (len(LINES), len(LINES))


# -- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_is_made_looked_at_and_changed(box, files, batches, source):
    stored = files.upload(source)
    made = batches.create(
        stored.id, "/v1/completions", completion_window="7d", metadata={"a": "b"}, priority=-5,
        webhook=WebhookTo("https://example.com/hook", "a secret of some length"), output_expires_after_s=7200,
        idempotency_key="k",
    )  # fmt: skip
    (asked,) = box.batches.accepted.values()
    assert (asked.input_file_id, asked.endpoint, asked.window_s, asked.priority) == (
        stored.id, "/v1/completions", 7 * 86400, -5,
    )  # fmt: skip
    assert (asked.webhook.url, asked.webhook.secret) == ("https://example.com/hook", "a secret of some length")
    assert (asked.output_expires_after_s, asked.metadata, asked.idempotency_key) == (7200, {"a": "b"}, "k")
    assert batches.get(made.id).status == "validating"
    assert [found.id for found in batches.list(limit=5).data] == [made.id]
    assert batches.pause(made.id).paused
    assert not batches.resume(made.id).paused
    assert batches.set_priority(made.id, 100).priority == 100
    with pytest.raises(errors.Conflict):
        batches.delete(made.id)
    assert batches.cancel(made.id).status == "cancelling"
    with pytest.raises(errors.Conflict):
        batches.retry(made.id)
    box.batches.put(1, "local", phase=jobs.COMPLETED, counts=Counts(3, 2, 1))
    assert batches.retry(ONE).status == "in_progress"
    box.batches.put(1, "local", phase=jobs.FAILED)
    assert batches.delete(ONE).deleted
    with pytest.raises(errors.NotFound):
        batches.get(ONE)


def test_one_key_is_made_for_each_batch(box, files, batches, source):
    stored = files.upload(source)
    assert batches.create(stored.id, "/v1/completions").id != batches.create(stored.id, "/v1/completions").id
    assert all(asked.idempotency_key and asked.window_s == 86400 for asked in box.batches.accepted.values())


def test_history_comes_in_pages(box, batches):
    box.batches.put(1, "local")
    box.batches.history[ONE] = [
        BatchEvent(seq, ONE, 5.0, "created", None, "validating", {}) for seq in range(1, 2002)
    ]  # fmt: skip
    assert [row.seq for row in batches.history(ONE, after=1)] == list(range(2, 2002))


def test_watching_ends_with_the_batch(box, batches):
    box.batches.put(1, "local", phase=jobs.EXPIRED)
    assert [seen.status for seen in batches.watch(ONE)] == ["expired"]


def test_waiting_for_the_end(box, batches):
    box.batches.put(1, "local", counts=Counts(10, 1, 0))
    seen = []

    def look(batch):
        seen.append(batch.request_counts.completed)
        done = len(seen) * 5
        box.batches.put(
            1, "local", counts=Counts(10, done, 0), phase=jobs.COMPLETED if done == 10 else jobs.IN_PROGRESS
        )

    assert batches.wait(ONE, on_progress=look).status == "completed"
    assert seen == [1, 5, 10]


def test_the_wait_may_end_before_the_batch(box, batches):
    box.batches.put(1, "local")
    with pytest.raises(EndTimeout, match=r"has not ended after 0\.05 s"):
        batches.wait(ONE, timeout_s=0.05)


def test_what_there_is_so_far(box, batches):
    box.batches.put(1, "local")
    box.batches.pieces = {False: [b"a\n", b"b\n"], True: [b"c\n"]}
    assert b"".join(batches.output(ONE)) == b"a\nb\n"
    assert b"".join(batches.errors(ONE)) == b"c\n"
    with pytest.raises(errors.NotFound):
        batches.output(batch_id(2))


def test_a_cut_answer_is_not_taken_for_a_whole_one(box, batches):
    box.batches.put(1, "local")
    box.batches.pieces[False] = [b"a\n", RuntimeError("the disk")]
    with pytest.raises(DaemonUnreachable):
        batches.output(ONE)


# -- items ----------------------------------------------------------------------------------------------------------


def test_an_item_is_handed_in_and_waited_for(box, items):
    made = items.submit(model="m", prompt="p", max_tokens=5, priority=7, expires_after_s=60)
    (asked,) = box.items.accepted.values()
    assert (asked.path, asked.model, asked.priority, asked.expires_after_s) == ("/v1/completions", "m", 7, 60)
    assert dict(asked.body) == {"model": "m", "prompt": "p", "max_tokens": 5}
    assert items.get(made.id).status == "queued"
    ended = []
    waiter = threading.Thread(target=lambda: ended.append(items.wait(made.id, timeout_s=30)))
    waiter.start()
    wait_for(lambda: box.items.waiting, 10)
    items.cancel(made.id)
    box.items.changed[made.id].set()
    waiter.join(10)
    assert ended[0].status == "cancelled"
    assert box.items.patience[0] <= 30
    assert [found.id for found in items.list(state="cancelled").data] == [made.id]


def test_chat_items(box, items):
    items.submit(launch_id="l1", messages=[{"role": "user", "content": "hi"}])
    assert box.items.accepted[item_id(1)].path == "/v1/chat/completions"
    assert (
        items.submit(model="m", prompt="p", idempotency_key="k").id
        == items.submit(model="m", prompt="p", idempotency_key="k").id
    )


def test_waiting_for_an_item_may_end_before_it(box, items):
    made = items.submit(model="m", prompt="p")
    with pytest.raises(EndTimeout):
        items.wait(made.id, timeout_s=0.05)
