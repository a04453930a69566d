"""Who asks, for what, under which rule. PURE: values shared by key handling, guard, data plane and routes."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request before its body. Header names are lower case; ``path`` is percent-decoded once."""

    method: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    query: bytes = b""

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]

    def first(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)


@dataclass(frozen=True, slots=True)
class Rule:
    """Access to one route: public, or any one of ``scopes``. ``media``: content types of a body on an unsafe method
    (empty: any). ``always_public``: open even where the operator protects all public routes."""

    public: bool = False
    scopes: frozenset[str] = frozenset()
    media: tuple[str, ...] = ("application/json",)
    always_public: bool = False

    def __post_init__(self) -> None:
        if self.public == bool(self.scopes):
            raise ValueError("a rule is either public or names at least one scope")


@dataclass(frozen=True, slots=True)
class Principal:
    """A known key, without its token. ``models`` None: all. Limits None: none. ``cold_start_hold_s``: for how many
    seconds its requests wait for a model that must be loaded first, None: as the daemon is set."""

    name: str
    scopes: frozenset[str]
    models: tuple[str, ...] | None = None
    max_class: str | None = None
    requests_per_minute: int | None = None
    max_parallel: int | None = None
    max_sequences: int | None = None
    expires_at: float | None = None
    tokens_per_minute: int | None = None
    max_enqueued_tokens: int | None = None
    cold_start_hold_s: float | None = None
    labels: dict[str, str] = field(default_factory=dict)

    def may_use(self, *models: str) -> bool:
        """Whether this key may use a launch: every given name (asked for, served, base) must match one of its globs."""
        globs = self.models
        return globs is None or all(any(fnmatchcase(m, g) for g in globs) for m in models)
