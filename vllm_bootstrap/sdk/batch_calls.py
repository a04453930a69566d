"""Every call about files, batches and single items as a value: what is sent, and how the answer is read.

Invariant: as in ``calls``, of which this is a part: no input or output here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, TypedDict

from pydantic import TypeAdapter

from vllm_bootstrap.sdk.calls import Call, Form, StreamCall, given, segment
from vllm_bootstrap.wire import Listing
from vllm_bootstrap.wire_batches import (
    BatchDeleted,
    BatchEventEntry,
    BatchObject,
    FileDeleted,
    FileObject,
    ItemObject,
    Page,
)

UPLOAD_TIMEOUT_S = 600.0  # the daemon answers when the whole file is synced to its disk
LONGEST_ITEM_WAIT_S = 60.0
ENDED_BATCH = frozenset({"completed", "failed", "expired", "cancelled"})
ENDED_ITEM = frozenset({"completed", "failed", "cancelled", "expired"})
DEFAULT_WINDOW = "24h"

Change = Literal["cancel", "pause", "resume", "retry"]


@dataclass(frozen=True, slots=True)
class WebhookTo:
    """Whom to tell of a batch's end. Without a ``secret``, the daemon's own signs."""

    url: str
    secret: str | None = None


class BatchFields(TypedDict, total=False):
    """What may go along with a batch. ``completion_window``: how long it may take (``24h``, ``7d``). ``priority``: from
    -100 to 100, higher first. ``metadata``: up to 16 pairs; a ``launch_id`` in it sends all lines to that launch."""

    completion_window: str
    metadata: Mapping[str, str] | None
    priority: int
    webhook: WebhookTo | None
    output_expires_after_s: int | None


class FileFilter(TypedDict, total=False):
    """Which files are wanted. ``after``: the ``last_id`` of the page before."""

    purpose: str | None
    after: str | None
    limit: int
    order: Literal["asc", "desc"]


class ItemFilter(TypedDict, total=False):
    """Which items are wanted. ``after``: the ``last_id`` of the page before."""

    state: Literal["queued", "in_progress", "completed", "failed", "cancelled", "expired"] | None
    after: str | None
    limit: int


_FILES: TypeAdapter[Page[FileObject]] = TypeAdapter(Page[FileObject])
_BATCHES: TypeAdapter[Page[BatchObject]] = TypeAdapter(Page[BatchObject])
_EVENTS: TypeAdapter[Listing[BatchEventEntry]] = TypeAdapter(Listing[BatchEventEntry])
_ITEMS: TypeAdapter[Page[ItemObject]] = TypeAdapter(Page[ItemObject])


# -- files --------------------------------------------------------------------------------------------------------


def upload(source: BinaryIO, filename: str, purpose: str, expires_after_s: int | None) -> Call[FileObject]:
    fields = {"purpose": purpose}
    if expires_after_s is not None:
        fields |= {"expires_after[anchor]": "created_at", "expires_after[seconds]": str(expires_after_s)}
    form = Form(source, filename, fields)
    return Call("POST", "/v1/files", FileObject.model_validate_json, form=form, timeout_s=UPLOAD_TIMEOUT_S)


def file(file_id: str) -> Call[FileObject]:
    return Call("GET", _file(file_id), FileObject.model_validate_json, may_repeat=True)


def files(wanted: FileFilter) -> Call[Page[FileObject]]:
    return Call("GET", "/v1/files", _FILES.validate_json, given(_plain(wanted)), may_repeat=True)


def delete_file(file_id: str) -> Call[FileDeleted]:
    return Call("DELETE", _file(file_id), FileDeleted.model_validate_json)


def content_path(file_id: str) -> str:
    return f"{_file(file_id)}/content"


def _file(file_id: str) -> str:
    return f"/v1/files/{segment(file_id)}"


# -- batches ------------------------------------------------------------------------------------------------------


def create(input_file_id: str, endpoint: str, fields: BatchFields, idempotency_key: str) -> Call[BatchObject]:
    """``fields`` that are None are left out."""
    webhook, expires = fields.get("webhook"), fields.get("output_expires_after_s")
    told = None if webhook is None else {"url": webhook.url, "secret": webhook.secret}
    body = {
        "input_file_id": input_file_id,
        "endpoint": endpoint,
        "completion_window": fields.get("completion_window", DEFAULT_WINDOW),
        "metadata": fields.get("metadata"),
        "priority": fields.get("priority"),
        "webhook": None if told is None else _without_none(told),
        "output_expires_after": None if expires is None else {"anchor": "created_at", "seconds": expires},
    }
    headers = {"idempotency-key": idempotency_key}
    read = BatchObject.model_validate_json
    return Call("POST", "/v1/batches", read, body=_without_none(body), headers=headers, may_repeat=True)


def batch(batch_id: str) -> Call[BatchObject]:
    return Call("GET", _batch(batch_id), BatchObject.model_validate_json, may_repeat=True)


def batches(after: str | None, limit: int) -> Call[Page[BatchObject]]:
    params = given({"after": after, "limit": limit})
    return Call("GET", "/v1/batches", _BATCHES.validate_json, params, may_repeat=True)


def change(batch_id: str, what: Change) -> Call[BatchObject]:
    # Once more does no harm, except that a batch which runs again already refuses to.
    may_repeat = what != "retry"
    return Call("POST", f"{_batch(batch_id)}/{what}", BatchObject.model_validate_json, may_repeat=may_repeat)


def set_priority(batch_id: str, priority: int) -> Call[BatchObject]:
    path, body = f"{_batch(batch_id)}/priority", {"priority": priority}
    return Call("POST", path, BatchObject.model_validate_json, body=body, may_repeat=True)


def delete_batch(batch_id: str) -> Call[BatchDeleted]:
    return Call("DELETE", _batch(batch_id), BatchDeleted.model_validate_json)


def history(batch_id: str, after: int, limit: int) -> Call[Listing[BatchEventEntry]]:
    params = given({"after": after, "limit": limit})
    return Call("GET", f"{_batch(batch_id)}/events", _EVENTS.validate_json, params, may_repeat=True)


def watch(batch_id: str) -> StreamCall:
    return StreamCall(f"{_batch(batch_id)}/events", {})


def partial_path(batch_id: str, *, failed: bool) -> str:
    return f"{_batch(batch_id)}/{'errors' if failed else 'output'}"


def _batch(batch_id: str) -> str:
    return f"/v1/batches/{segment(batch_id)}"


# -- single items -------------------------------------------------------------------------------------------------


def submit(fields: Mapping[str, Any], idempotency_key: str) -> Call[ItemObject]:
    """``fields`` that are None are left out."""
    headers = {"idempotency-key": idempotency_key}
    body, read = _without_none(fields), ItemObject.model_validate_json
    return Call("POST", "/v1/batch/completions", read, body=body, headers=headers, may_repeat=True)


def item(item_id: str, wait_s: float) -> Call[ItemObject]:
    params: dict[str, str | int] = {"wait": f"{min(wait_s, LONGEST_ITEM_WAIT_S):g}"} if wait_s > 0 else {}
    patience = wait_s + 30 if wait_s > 0 else None
    return Call("GET", _item(item_id), ItemObject.model_validate_json, params, timeout_s=patience, may_repeat=True)


def items(wanted: ItemFilter) -> Call[Page[ItemObject]]:
    return Call("GET", "/v1/batch/completions", _ITEMS.validate_json, given(_plain(wanted)), may_repeat=True)


def cancel_item(item_id: str) -> Call[ItemObject]:
    return Call("DELETE", _item(item_id), ItemObject.model_validate_json, may_repeat=True)


def _item(item_id: str) -> str:
    return f"/v1/batch/completions/{segment(item_id)}"


def _plain(wanted: Mapping[str, Any]) -> dict[str, str | int | None]:
    return dict(wanted)


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
