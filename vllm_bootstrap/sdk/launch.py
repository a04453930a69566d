"""A launch as its user sees it: where it answers, under which name, and ready-made ``openai`` clients for it.

Invariant: nothing here talks to the daemon. The package ``openai`` is imported only when somebody asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_bootstrap.sdk.discovery import Target
from vllm_bootstrap.sdk.transport import Verify
from vllm_bootstrap.wire import LaunchGroup, LaunchStatus

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI


def id_of(started: LaunchStatus | LaunchGroup) -> str:
    """What stop, status and proxy take for it."""
    return started.group_id if isinstance(started, LaunchGroup) else started.launch_id


@dataclass(frozen=True, slots=True)
class Launch:
    """A ready launch, or a group of replicas all of which are. ``status`` is from the moment it became ready."""

    status: LaunchStatus | LaunchGroup
    target: Target = field(repr=False)
    verify: Verify = field(default=True, repr=False)

    @property
    def id(self) -> str:
        return id_of(self.status)

    @property
    def served_model_name(self) -> str:
        """What requests name as ``model``."""
        return self.status.served_model_name

    @property
    def base_url(self) -> str:
        """The base of OpenAI-shaped routes of this very launch, without a trailing slash."""
        return f"{self.target.url}/proxy/{self.id}/v1"

    def openai(self, **options: Any) -> OpenAI:
        """An ``openai.OpenAI`` for this launch; ``options`` go to it. Raises ``ImportError`` without that package."""
        import openai  # noqa: PLC0415 - optional

        client = openai.DefaultHttpxClient(**self._http())
        return openai.OpenAI(**{**self._openai(), "http_client": client, **options})

    def async_openai(self, **options: Any) -> AsyncOpenAI:
        """Likewise an ``openai.AsyncOpenAI``."""
        import openai  # noqa: PLC0415 - optional

        client = openai.DefaultAsyncHttpxClient(**self._http())
        return openai.AsyncOpenAI(**{**self._openai(), "http_client": client, **options})

    def _openai(self) -> dict[str, Any]:
        # Without any key that package refuses to start; an open daemon takes whatever comes.
        return {"base_url": self.base_url, "api_key": self.target.key or "none"}

    def _http(self) -> dict[str, Any]:
        # As in our own transport: no redirects with the key, no proxies on the way to this machine.
        return {"follow_redirects": False, "trust_env": not self.target.is_loopback, "verify": self.verify}
