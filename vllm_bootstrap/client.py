"""The Python client: the public face of ``vllm_bootstrap.sdk``. Needs neither Linux nor a GPU library.

    from vllm_bootstrap.client import Client

    with Client() as client, client.launched("Qwen/Qwen3-0.6B") as launch:
        answer = launch.openai().chat.completions.create(
            model=launch.served_model_name, messages=[{"role": "user", "content": "Hello"}]
        )

Errors that the daemon answers with are the classes of ``vllm_bootstrap.errors``.
"""

from __future__ import annotations

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.sdk.async_client import AsyncClient
from vllm_bootstrap.sdk.batch_calls import BatchFields, WebhookTo
from vllm_bootstrap.sdk.calls import LaunchFields
from vllm_bootstrap.sdk.failures import (
    ClientError,
    DaemonUnreachable,
    DownloadFailed,
    EndTimeout,
    LaunchFailed,
    LoadFailed,
    PrefetchFailed,
    UnexpectedAnswer,
    WaitTimeout,
)
from vllm_bootstrap.sdk.launch import Launch
from vllm_bootstrap.sdk.model_calls import EntryFields
from vllm_bootstrap.sdk.sync_client import Client

__all__ = [
    "ApiError",
    "AsyncClient",
    "BatchFields",
    "Client",
    "ClientError",
    "DaemonUnreachable",
    "DownloadFailed",
    "EndTimeout",
    "EntryFields",
    "Launch",
    "LaunchFailed",
    "LaunchFields",
    "LoadFailed",
    "PrefetchFailed",
    "UnexpectedAnswer",
    "WaitTimeout",
    "WebhookTo",
]
