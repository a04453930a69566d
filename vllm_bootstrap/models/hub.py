"""The hub as the download helper sees it: what a revision is, what a repository holds, where a file comes from.

A thin layer over huggingface_hub, whose errors become ``HubTrouble`` here. Blocking. Only the download helper imports
this: the library is large, and the daemon needs none of it. Endpoint, proxies and token come from the environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile as HubFile

from vllm_bootstrap.models.choosing import RepoFile

ONLY_IN_CHUNKS_BYTES = 50 * 10**9
"""The hub gives larger files out only through its chunk store, which huggingface_hub knows how to ask."""

USER_AGENT = "vllm-bootstrap"
_TRANSPORTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"})
T = TypeVar("T")


class HubTrouble(Exception):
    """``name`` is one of ``troubles``' words. ``retry_after_s``: what the hub asks for."""

    def __init__(self, name: str, detail: str = "") -> None:
        super().__init__(detail)
        self.name, self.detail = name, detail


class Origin(NamedTuple):
    """Where one file comes from. ``blob``: its checksum, as the cache names it. ``headers`` hold the token: whoever
    follows a redirect to another host leaves it behind."""

    blob: str
    size: int
    url: str
    headers: dict[str, str]


class Hub:
    """One repository on the hub."""

    def __init__(self, repo: str) -> None:
        self.repo = repo
        self._token = os.environ.get("HF_TOKEN") or False
        self._api = HfApi(token=self._token)

    def commit_of(self, revision: str) -> str:
        """The commit a branch or tag is at now. Raises ``HubTrouble``."""
        commit = _told(lambda: self._api.model_info(self.repo, revision=revision).sha)
        if not commit:
            raise HubTrouble("hub", "It does not say which commit the revision is.")
        return commit

    def files(self, commit: str) -> list[RepoFile]:
        """All files of a commit. Raises ``HubTrouble``."""
        entries = _told(lambda: list(self._api.list_repo_tree(self.repo, recursive=True, revision=commit)))
        files = [entry for entry in entries if isinstance(entry, HubFile)]
        return [RepoFile(file.path, file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in files]

    def origin(self, commit: str, file: RepoFile) -> Origin:
        """Raises ``HubTrouble``."""
        url = hf_hub_url(self.repo, file.path, revision=commit)
        found = _told(lambda: get_hf_file_metadata(url, token=self._token))
        if not found.etag:
            raise HubTrouble("hub", f"It gives no checksum of {file.path}.")
        size = file.size if found.size is None else found.size
        headers = {"user-agent": USER_AGENT}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        return Origin(found.etag, size, url, headers)

    def fetch_whole(self, commit: str, file: RepoFile, cache: Path) -> None:
        """Have huggingface_hub bring a file into the cache. What was cut off is fetched anew. Raises ``HubTrouble``."""
        _told(lambda: hf_hub_download(self.repo, file.path, revision=commit, token=self._token, cache_dir=cache))


def _told(ask: Callable[[], T]) -> T:
    """The answer, or our word for why there is none."""
    try:
        return ask()
    except GatedRepoError as exc:
        raise HubTrouble("gated") from exc
    except RevisionNotFoundError as exc:
        raise HubTrouble("no_revision") from exc
    except (RepositoryNotFoundError, HFValidationError) as exc:
        raise HubTrouble(*_missing(exc)) from exc
    except EntryNotFoundError as exc:
        raise HubTrouble("hub", _first_line(exc)) from exc
    except OfflineModeIsEnabled as exc:
        raise HubTrouble("offline") from exc
    except HfHubHTTPError as exc:
        status = exc.response.status_code
        raise HubTrouble("token" if status in {401, 403} else "hub", f"(HTTP {status})") from exc
    except Exception as exc:
        if type(exc).__module__.partition(".")[0] in _TRANSPORTS:
            raise HubTrouble("connection", _first_line(exc)) from exc
        raise


def _missing(exc: Exception) -> tuple[str, str]:
    """The hub says 401 for what does not exist and for what may not be seen; with a token it would say which."""
    response = getattr(exc, "response", None)
    if response is not None and response.status_code == 401 and not os.environ.get("HF_TOKEN"):
        return "no_repository", "(or it may not be seen without HF_TOKEN)"
    return "no_repository", ""


def _first_line(exc: Exception) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
