"""What the daemon asks for with "go", read and checked. Standard library only."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Refused(Exception):
    """The request is refused. ``kind``: ``bad_order``, ``gpu_locked``, ``spawn_failed``, ``already_started``,
    ``stopping``, ``not_yours``, ``unknown_op``, ``busy``. The text is a sentence for people."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Order:
    """The fields of ``launches.types.StartOrder``. Fields this version does not know are ignored."""

    def __init__(self, raw: Any) -> None:
        """Raises ``Refused`` (``bad_order``)."""
        try:
            self.argv = [str(part) for part in raw["argv"]]
            self.env = {str(name): str(value) for name, value in raw["env"].items()}
            self.cwd, self.tmp_dir = str(raw["cwd"]), str(raw["tmp_dir"])
            self.log_dir = str(raw["log_dir"])
            self.log_segment_bytes, self.log_max_bytes = int(raw["log_segment_bytes"]), int(raw["log_max_bytes"])
            self.secrets = [str(secret).encode("utf-8", "surrogateescape") for secret in raw.get("secrets", ())]
            self.lock_dir, self.lock_owner = str(raw.get("lock_dir", "")), str(raw.get("lock_owner", ""))
            self.gpu_locks = [str(uuid) for uuid in raw.get("gpu_locks", ())]
            self.shared = bool(raw.get("shared", False))
            self.uid, self.gid = _number(raw.get("uid")), _number(raw.get("gid"))
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise Refused("bad_order", f"the start order cannot be read: {exc!r}") from None
        if not self.argv:
            raise Refused("bad_order", "the start order has no command")
        if not (self.cwd.startswith("/") and self.tmp_dir.startswith("/") and self.log_dir.startswith("/")):
            raise Refused("bad_order", "the start order has a path that is not absolute")


def _number(value: Any) -> int | None:
    return None if value is None else int(value)
