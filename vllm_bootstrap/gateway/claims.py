"""What a strict connection asks of its subclass: which requests are its own, and what to do with them. PURE.

Whoever claims a request owes one answer: it writes to ``transport`` and calls ``answer_done``, or it calls
``answer_error`` or ``cut``. What is not claimed is the ASGI app's.
"""

from __future__ import annotations

from vllm_bootstrap.errors import ApiError
from vllm_bootstrap.gateway.head import Head


class Claims:
    """To be overridden whole."""

    def claim(self, head: Head) -> bool:
        """Whether this request is the subclass's. May raise ``ApiError``: then it is refused."""
        raise NotImplementedError

    def claimed_begins(self, head: Head) -> None:
        """A claimed request's head is here."""
        raise NotImplementedError

    def claimed_whole(self, head: Head, body: bytes) -> None:
        """A claimed request is here with all of its body: instead of ``claimed_begins``, ``_body`` and ``_ends``."""
        raise NotImplementedError

    def claimed_body(self, piece: bytes) -> None:
        """A piece of its body."""
        raise NotImplementedError

    def claimed_ends(self) -> None:
        """The request is whole."""
        raise NotImplementedError

    def claimed_is_bad(self, error: ApiError) -> None:
        """Its body cannot be read on; the answer is still owed."""
        raise NotImplementedError

    def claimed_tick(self, now: float) -> None:
        """Look at deadlines of its own."""
        raise NotImplementedError

    def app_begins(self, head: Head) -> None:
        """A request for the app: feed its head to ``self.parser``, or answer with an error."""
        raise NotImplementedError

    def fail_app(self, error: ApiError) -> None:
        """Take the answer away from the app: ours when it has not begun, else a cut."""
        raise NotImplementedError
