"""Which engine keeps which stored response, and for whom. PURE.

Invariant: an id is of use only to the key that made it; for everybody else it does not exist. Engines keep responses
in one process's memory, so a request that names one goes where it was made. Bounded: the id used longest ago goes
first. Knows no sockets, no engines and not whether an engine still has what it was asked to keep.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_bootstrap.errors import BadRequest, NotFound

MAX_RESPONSES = 20_000
MAKES = "/v1/responses"
"""The route whose answers have ids that later requests name."""


class _Kept(NamedTuple):
    launch_id: str
    owner: str


class Responses:
    """Ids of responses that engines may have kept."""

    def __init__(self, most: int = MAX_RESPONSES) -> None:
        self._most = most
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def remember(self, response_id: str, launch_id: str, owner: str) -> None:
        """``owner``'s request made this response there. An id that another key has already is not taken over."""
        known = self._kept.get(response_id)
        if known is not None and known.owner != owner:
            return
        self._kept[response_id] = _Kept(launch_id, owner)
        self._kept.move_to_end(response_id)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def find(self, response_id: str, owner: str) -> str:
        """The launch that made it. Raises ``NotFound``, the same for unknown ids and those of others."""
        known = self._kept.get(response_id)
        if known is None or known.owner != owner:
            raise NotFound(f"There is no response {response_id[:128]!r} of this key", param="response_id")
        self._kept.move_to_end(response_id)
        return known.launch_id


def named_before(path: str, fields: Mapping[str, Any]) -> str | None:
    """The earlier response a new one is to go on from. Raises ``BadRequest`` when it is no string."""
    if not path.endswith(MAKES):
        return None
    named = fields.get("previous_response_id")
    if named is not None and not isinstance(named, str):
        raise BadRequest("previous_response_id must be a string", param="previous_response_id")
    return named


def is_kept(path: str, fields: Mapping[str, Any]) -> bool:
    """Whether the answer's id may be of use later. Engines keep responses unless told otherwise."""
    return path.endswith(MAKES) and fields.get("store") is not False


def named_in(path: str) -> str:
    """The id in a path below ``/v1/responses/``."""
    return path.partition(MAKES + "/")[2].partition("/")[0]
